"""Which errors may have come from a rank that is gone."""

from __future__ import annotations

import pytest
import torch
import torch.distributed

from llara_dist.errors import InputError, RankLostError, RequeueError, RunFailedError
from llara_dist.supervision.watchdog import may_come_from_a_lost_rank


@pytest.mark.parametrize(
    ("error", "suspect"),
    [
        (RuntimeError("[pair.cc:537] Read error: Connection reset by peer"), True),
        (torch.distributed.DistBackendError("NCCL error: remote process exited"), True),
        (torch.distributed.DistNetworkError("the connection was closed"), True),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (RankLostError("rank 3 is dead"), False),
        (RequeueError("stopped"), False),
        (RunFailedError("too many skipped steps"), False),
        (InputError("shard 7 is damaged"), False),
        (FloatingPointError("the loss is nan"), False),
        (KeyboardInterrupt(), False),
        (SystemExit(75), False),
    ],
)
def test_own_errors_are_not_blamed_on_others(error: BaseException, suspect: bool) -> None:
    assert may_come_from_a_lost_rank(error) is suspect
