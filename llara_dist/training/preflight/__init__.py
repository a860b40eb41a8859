"""Everything that is wrong with a run, at once, before a weight is read."""
