"""What `deepspeed`, `torchrun` and `srun` start for training: the same code as `llara-dist train`."""

import sys

from llara_dist.cli import run_process

if __name__ == "__main__":
    run_process(["train", *sys.argv[1:]])
