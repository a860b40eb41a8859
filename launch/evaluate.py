"""What `deepspeed`, `torchrun` and `srun` start for evaluation: the same code as `llara-dist evaluate`."""

import sys

from llara_dist.cli import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
