"""The run directory: who runs which rows, what is committed, and the merge at the end."""
