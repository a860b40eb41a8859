"""A run looked at from a terminal, through the files in its folder: nothing is asked of its processes."""
