"""All ranks of a run hold its folder, or none does."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llara_dist.distributed import Job, gather_objects, read_world
from llara_dist.errors import InputError
from llara_dist.supervision.run_lock import hold_run
from tests.distributed.ranks import run_ranks


def hold_twice(out: Path) -> None:
    import torch.distributed

    world = read_world()
    method = os.environ["LLARA_DIST_INIT_METHOD"]
    torch.distributed.init_process_group("gloo", init_method=method, rank=world.rank, world_size=world.size)
    with hold_run(out, 0.2, world, Job("7")) as held:
        assert len(set(gather_objects(held.token))) == 1
        assert (held.lock is not None) == world.is_main
        held.check()
        with pytest.raises(InputError, match="job 7") as caught, hold_run(out, 0.2, world, Job("8")):
            pass
        assert caught.value.everywhere
        assert held.lost is None
    torch.distributed.destroy_process_group()


def test_every_rank_learns_of_a_refusal(tmp_path: Path) -> None:
    run_ranks(hold_twice, 2, tmp_path / "ranks", tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["lock-000001.json"]
