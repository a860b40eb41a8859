"""Whether this machine, or every node of a cluster, will carry a run: `llara-dist doctor`."""
