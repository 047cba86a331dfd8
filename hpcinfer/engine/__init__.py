"""A replica: one model instance over its ranks, ticking through microbatches."""
