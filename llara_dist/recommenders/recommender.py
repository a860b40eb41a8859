"""What every sequential recommender here is: item histories in, a score for every item out, one vector an item."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llara_dist.errors import InputError


class Recommender(nn.Module):
    """Base of SASRec and of the published models: what training, evaluation and the item table need.

    A history is a row of `max_history` item ids, oldest first, filled up on the right with the padding id, which is
    `num_items`; its length counts the real ids and is at least 1.

    Args:
        num_items: size of the catalogue; item ids are 0 … num_items - 1.
        max_history: columns of a history.
        dim: width of an item's vector.
    """

    def __init__(self, num_items: int, max_history: int, dim: int) -> None:
        super().__init__()
        self.num_items = num_items
        self.max_history = max_history
        self.dim = dim

    def scores(self, histories: Tensor, lengths: Tensor) -> Tensor:
        """Score every item as the next one.

        Args:
            histories: int64 [rows, max_history].
            lengths: int64 [rows], each ≥ 1.

        Returns:
            Unnormalised log-probabilities [rows, num_items].
        """
        raise NotImplementedError

    def loss(self, histories: Tensor, lengths: Tensor, targets: Tensor, every_position: bool = False) -> Tensor:
        """Cross-entropy over all items of the next item, a scalar mean.

        Args:
            histories: int64 [rows, max_history].
            lengths: int64 [rows].
            targets: int64 [rows], the item that followed.
            every_position: whether the items inside the history are predicted too, each from those before it.

        Raises:
            InputError: `every_position` is asked of a model that has no state at each position.
        """
        if every_position:
            raise InputError(f"positions 'all': {type(self).__name__} predicts after the last position alone")
        return nn.functional.cross_entropy(self.scores(histories, lengths), targets)

    def item_vectors(self) -> Tensor:
        """The items' vectors, fp32 [num_items, dim], without the padding row: what becomes behaviour tokens."""
        raise NotImplementedError


def last_state(states: Tensor, lengths: Tensor) -> Tensor:
    """The state at each row's last real position: [rows, max_history, dim] → [rows, dim]."""
    return states[torch.arange(len(states), device=states.device), lengths - 1]
