import numpy as np
import pytest
import torch

from llara_dist.recommenders.sasrec import SASRec
from llara_dist.recommenders.windows import padded_histories


@pytest.fixture
def model() -> SASRec:
    torch.manual_seed(0)
    return SASRec(num_items=30, max_history=6, dim=16, dropout=0.5)


def test_histories_keep_the_newest_items_padded_on_the_right() -> None:
    histories, lengths = padded_histories(np.array([0, 2, 2, 7]), np.array([5, 6, 1, 2, 3, 4, 0]), 4, 9)
    assert histories.tolist() == [[5, 6, 9, 9], [9, 9, 9, 9], [2, 3, 4, 0]]
    assert lengths.tolist() == [2, 0, 4]


def test_no_history_at_all_is_a_row_of_padding() -> None:
    histories, lengths = padded_histories(np.array([0, 0]), np.zeros(0, np.int32), 3, 9)
    assert histories.tolist() == [[9, 9, 9]]
    assert lengths.tolist() == [0]


def test_scores_ignore_padding_and_what_lies_to_its_right(model: SASRec) -> None:
    model.eval()
    short = torch.tensor([[3, 4, 5, 30, 30, 30]])
    filled = torch.tensor([[3, 4, 5, 7, 8, 9]])
    length = torch.tensor([3])
    torch.testing.assert_close(model.scores(short, length), model.scores(filled, length))
    assert not torch.allclose(model.scores(short, length), model.scores(torch.tensor([[4, 3, 5, 30, 30, 30]]), length))


def test_loss_is_the_mean_over_every_position_of_its_own_prefix(model: SASRec) -> None:
    model.eval()
    histories = torch.tensor([[3, 4, 5, 30, 30, 30], [1, 2, 3, 4, 5, 6]])
    lengths, targets = torch.tensor([3, 6]), torch.tensor([9, 10])
    expected = []
    for row, length, target in zip(histories.tolist(), lengths.tolist(), targets.tolist(), strict=True):
        events = [*row[:length], target]
        for end in range(1, length + 1):
            prefix = torch.tensor([events[:end] + [30] * (6 - end)])
            scores = model.scores(prefix, torch.tensor([end]))
            expected.append(torch.nn.functional.cross_entropy(scores, torch.tensor([events[end]])))
    torch.testing.assert_close(
        model.loss(histories, lengths, targets, every_position=True), torch.stack(expected).mean()
    )
    torch.testing.assert_close(model.loss(histories, lengths, targets), torch.stack([expected[2], expected[8]]).mean())


def test_padding_row_is_no_item_and_gets_no_gradient(model: SASRec) -> None:
    histories = torch.tensor([[3, 4, 30, 30, 30, 30]])
    model.loss(histories, torch.tensor([2]), torch.tensor([5]), every_position=True).backward()
    assert model.items.weight.grad is not None
    assert model.items.weight.grad[30].abs().sum() == 0
    assert model.item_vectors().shape == (30, 16)
    assert not model.item_vectors().requires_grad
    assert model.scores(histories, torch.tensor([2])).shape == (1, 30)


def test_it_learns_a_rule_that_needs_the_order() -> None:
    torch.manual_seed(0)
    model = SASRec(num_items=12, max_history=4, dim=32, dropout=0.0)
    histories = torch.randint(12, (400, 4))
    targets = (histories[:, -1] + histories[:, -2]) % 12
    lengths = torch.full((400,), 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(150):
        loss = torch.nn.functional.cross_entropy(model.scores(histories, lengths), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    assert (model.scores(histories, lengths).argmax(dim=1) == targets).float().mean() > 0.9
