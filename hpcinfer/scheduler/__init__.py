"""Which tokens are computed in which tick. Host only, deterministic, replicated on every rank of a replica."""
