"""What `deepspeed`, `torchrun` and `srun` start for evaluation: the same code as `llara-dist evaluate`."""

import sys

from llara_dist.cli import run_process

if __name__ == "__main__":
    run_process(["evaluate", *sys.argv[1:]])
