"""The projector: from the recommender's item space into the language model's input space."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llara_dist.model.ops.projector import output_rms, project_reference, write_behaviour_
from llara_dist.stream.batch import Batch


class Projector(nn.Module):
    """Linear, GELU, Linear, with biases, in float32 (LLaRA, section 3.2: 64 → 4096 → 4096).

    Args:
        item_dim: d, width of the item table.
        llm_dim: h, hidden size of the language model.
        hidden_dim: width between the layers; 0 = `llm_dim`.
    """

    def __init__(self, item_dim: int, llm_dim: int, hidden_dim: int = 0) -> None:
        super().__init__()
        hidden_dim = hidden_dim or llm_dim
        self.input = nn.Linear(item_dim, hidden_dim, dtype=torch.float32)
        self.output = nn.Linear(hidden_dim, llm_dim, dtype=torch.float32)

    def forward(self, items: Tensor) -> Tensor:
        """Project item embeddings.

        Args:
            items: [U, d] float32.

        Returns:
            [U, h] behaviour embeddings.
        """
        return project_reference(items, self.input.weight, self.input.bias, self.output.weight, self.output.bias)

    def write(self, row: Tensor, item_table: Tensor, batch: Batch) -> Tensor:
        """Project a row's items straight into their slots, by the fused op; `row` [T, h] is overwritten and returned.

        The parameters are read outside a module's call, so they must be whole: not under ZeRO-3.
        """
        return write_behaviour_(
            row,
            item_table,
            batch.unique_items,
            batch.item_slots,
            batch.item_offsets,
            self.input.weight,
            self.input.bias,
            self.output.weight,
            self.output.bias,
        )

    @torch.no_grad()
    def match_scale(self, items: Tensor, target_rms: float) -> None:
        """Scale the last layer once so that the projected `items` have root mean square `target_rms`.

        Behaviour embeddings that start far larger or smaller than token embeddings are ignored by, or drown, the
        first attention layers; a rate that moves the projector to the right scale is too high once it is there.

        Raises:
            ValueError: the projected items are all zero or not finite.
        """
        current = float(output_rms(self(items)))
        if not 0.0 < current < float("inf"):
            raise ValueError(f"projected item table has root mean square {current}; the table must be finite, not zero")
        self.output.weight.mul_(target_rms / current)
        self.output.bias.mul_(target_rms / current)
