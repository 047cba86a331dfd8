"""Benchmarks: each says what limits its figure, and prints its result as one JSON object last."""
