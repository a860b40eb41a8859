"""One file a fused op: the public call, its eager reference, the kernel beside it."""
