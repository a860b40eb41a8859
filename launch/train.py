"""What `deepspeed`, `torchrun` and `srun` start for training: the same code as `llara-dist train`."""

import sys

from llara_dist.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
