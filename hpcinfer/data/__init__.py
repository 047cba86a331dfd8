"""HDF5 in and out: prompts, generations, and the ledger between them. Torch-free."""
