"""SASRec: self-attentive sequential recommendation (Kang and McAuley, ICDM 2018), trained over all items.

Causal self-attention over the last items; the state at a position, multiplied with every item's vector, scores the
next item. As in the paper the item matrix is shared by input and output; unlike it the loss is the cross-entropy
over the whole catalogue, which needs no sampled negatives and makes the model much stronger (Klenitskiy and
Vasilev, RecSys 2023), blocks are pre-norm, and each item has a bias that takes up its popularity.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from llara_dist.recommenders.recommender import Recommender, last_state


class _Block(nn.Module):
    """One pre-norm transformer block: causal self-attention, then a pointwise feed-forward of the same width."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.attention_norm = nn.LayerNorm(dim)
        self.query_key_value = nn.Linear(dim, 3 * dim)
        self.attention_output = nn.Linear(dim, dim)
        self.feed_forward_norm = nn.LayerNorm(dim)
        self.feed_forward = nn.Sequential(
            nn.Linear(dim, dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(dim, dim), nn.Dropout(dropout)
        )

    def forward(self, states: Tensor) -> Tensor:
        rows, length, dim = states.shape
        mixed = self.query_key_value(self.attention_norm(states))
        query, key, value = mixed.view(rows, length, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        # Padding lies to the right of every position that is read, so the causal mask hides it already.
        attended = nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, dropout_p=self.dropout if self.training else 0.0
        )
        attended = self.attention_output(attended.transpose(1, 2).reshape(rows, length, dim))
        states = states + nn.functional.dropout(attended, self.dropout, self.training)
        return states + self.feed_forward(self.feed_forward_norm(states))


class SASRec(Recommender):
    """SASRec over histories padded on the right.

    Args:
        num_items: size of the catalogue.
        max_history: columns of a history.
        dim: width of item vectors and states.
        blocks: transformer blocks.
        heads: attention heads; divides `dim`.
        dropout: on embeddings, attention and feed-forward, while training.
    """

    def __init__(
        self, num_items: int, max_history: int, dim: int = 64, blocks: int = 2, heads: int = 2, dropout: float = 0.2
    ) -> None:
        super().__init__(num_items, max_history, dim)
        self.items = nn.Embedding(num_items + 1, dim, padding_idx=num_items)
        self.positions = nn.Embedding(max_history, dim)
        self.item_bias = nn.Parameter(torch.zeros(num_items))
        self.embedding_dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(_Block(dim, heads, dropout) for _ in range(blocks))
        self.norm = nn.LayerNorm(dim)
        for table in (self.items, self.positions):
            nn.init.normal_(table.weight, std=dim**-0.5 / 2)
        with torch.no_grad():
            self.items.weight[num_items].zero_()

    def states(self, histories: Tensor) -> Tensor:
        """States after each position, [rows, max_history, dim]; those at padding mean nothing."""
        states = self.items(histories) * math.sqrt(self.dim) + self.positions.weight
        states = self.embedding_dropout(states)
        for block in self.blocks:
            states = block(states)
        return self.norm(states)

    def _score(self, states: Tensor) -> Tensor:
        return nn.functional.linear(states, self.items.weight[: self.num_items], self.item_bias)

    def scores(self, histories: Tensor, lengths: Tensor) -> Tensor:
        """See `Recommender.scores`."""
        return self._score(last_state(self.states(histories), lengths))

    def loss(self, histories: Tensor, lengths: Tensor, targets: Tensor, every_position: bool = False) -> Tensor:
        """See `Recommender.loss`; padding is neither predicted nor predicted from."""
        if not every_position:
            return nn.functional.cross_entropy(self.scores(histories, lengths), targets)
        following = torch.cat([histories[:, 1:], histories.new_full((len(histories), 1), self.num_items)], dim=1)
        following[torch.arange(len(targets), device=targets.device), lengths - 1] = targets
        real = following != self.num_items
        return nn.functional.cross_entropy(self._score(self.states(histories)[real]), following[real])

    def item_vectors(self) -> Tensor:
        """See `Recommender.item_vectors`."""
        return self.items.weight.detach()[: self.num_items].float()
