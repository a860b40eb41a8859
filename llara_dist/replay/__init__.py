"""A step of a cluster run computed again, in one process."""
