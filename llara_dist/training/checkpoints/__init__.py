"""Checkpoints: whole tensors by name, complete or not there, for any number of ranks."""
