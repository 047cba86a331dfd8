"""Stages: which layers each holds, how activations travel between them, how a microbatch runs through one."""
