"""Prompts: every layout of input files, and the format of our own."""
