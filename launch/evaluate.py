"""What `deepspeed`, `torchrun` and `srun` start for evaluation: the same code as `llara-dist evaluate`."""

import sys

from llara_dist.cli import main

if __name__ == "__main__":
    # The deepspeed launcher passes --local_rank, which the environment says as well.
    main(["evaluate", *(argument for argument in sys.argv[1:] if not argument.startswith("--local_rank"))])
