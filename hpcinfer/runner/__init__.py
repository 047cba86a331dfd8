"""A run: from the ledger's claims through a replica to committed rows."""
