"""The fastest settings for a machine, found by measuring a run's own micro-batches on it."""
