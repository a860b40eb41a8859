"""The recommenders whose weights were published with LLaRA: their exact forward passes and a reader of their files.

SASRec differs here from the paper's in ways that its numbers depend on: one block, separate input and output item
matrices, and residuals that start from the normalised input. The padding id is the number of items, histories are
padded on the right, and the state is read at the last real position. Files are plain ``.npz`` archives of arrays by
parameter name; nothing in them is executed.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from llara_dist.errors import InputError
from llara_dist.recommenders.recommender import Recommender, last_state

# Layer norms of the published attention weights were trained with torch's default.
_EPS = 1e-5


class _Attention(nn.Module):
    """One-head causal self-attention whose residual is the query's input; no output projection."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear_q = nn.Linear(dim, dim)
        self.linear_k = nn.Linear(dim, dim)
        self.linear_v = nn.Linear(dim, dim)

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        # Padding lies to the right of every position that is read, so the causal mask hides it already.
        attended = nn.functional.scaled_dot_product_attention(
            self.linear_q(queries), self.linear_k(keys), self.linear_v(keys), is_causal=True
        )
        return attended + queries


class _FeedForward(nn.Module):
    """Two pointwise convolutions with a residual and a layer norm after it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.w_1 = nn.Conv1d(dim, dim, 1)
        self.w_2 = nn.Conv1d(dim, dim, 1)
        self.layer_norm = nn.LayerNorm(dim, eps=_EPS)

    def forward(self, states: Tensor) -> Tensor:
        hidden = self.w_2(torch.relu(self.w_1(states.transpose(1, 2)))).transpose(1, 2)
        return self.layer_norm(hidden + states)


class _Published(Recommender):
    def __init__(self, num_items: int, max_history: int, dim: int, state_dim: int | None = None) -> None:
        super().__init__(num_items, max_history, dim)
        self.item_embeddings = nn.Embedding(num_items + 1, dim)
        self.s_fc = nn.Linear(state_dim or dim, num_items)

    def item_vectors(self) -> Tensor:
        """See `Recommender.item_vectors`."""
        return self.item_embeddings.weight.detach()[: self.num_items].float()

    def _masked(self, histories: Tensor, embedded: Tensor) -> Tensor:
        return embedded * (histories != self.num_items).unsqueeze(-1)


class PublishedSASRec(_Published):
    """The published SASRec (Kang and McAuley, ICDM 2018, in the form LLaRA was trained with)."""

    def __init__(self, num_items: int, max_history: int, dim: int) -> None:
        super().__init__(num_items, max_history, dim)
        self.positional_embeddings = nn.Embedding(max_history, dim)
        self.ln_1 = nn.LayerNorm(dim, eps=_EPS)
        self.ln_2 = nn.LayerNorm(dim, eps=_EPS)
        self.ln_3 = nn.LayerNorm(dim, eps=_EPS)
        self.mh_attn = _Attention(dim)
        self.feed_forward = _FeedForward(dim)

    def scores(self, histories: Tensor, lengths: Tensor) -> Tensor:
        """See `Recommender.scores`."""
        states = self._masked(histories, self.item_embeddings(histories) + self.positional_embeddings.weight)
        states = self.mh_attn(self.ln_1(states), states)
        states = self.ln_3(self.feed_forward(self.ln_2(states)))
        return self.s_fc(last_state(states, lengths))


class PublishedGRU(_Published):
    """The published GRU4Rec (Hidasi et al., ICLR 2016): one GRU layer over the item embeddings."""

    def __init__(self, num_items: int, max_history: int, dim: int) -> None:
        super().__init__(num_items, max_history, dim)
        self.gru = nn.GRU(dim, dim, batch_first=True)

    def scores(self, histories: Tensor, lengths: Tensor) -> Tensor:
        """See `Recommender.scores`."""
        states, _ = self.gru(self.item_embeddings(histories))
        return self.s_fc(last_state(states, lengths))


class PublishedCaser(_Published):
    """The published Caser (Tang and Wang, WSDM 2018): 16 filters each over 2, 3 and 4 items, one over all of them."""

    def __init__(self, num_items: int, max_history: int, dim: int) -> None:
        super().__init__(num_items, max_history, dim, state_dim=3 * 16 + dim)
        self.horizontal_cnn = nn.ModuleList(nn.Conv2d(1, 16, (height, dim)) for height in (2, 3, 4))
        self.vertical_cnn = nn.Conv2d(1, 1, (max_history, 1))

    def scores(self, histories: Tensor, lengths: Tensor) -> Tensor:
        """See `Recommender.scores`; the whole padded row is read, whatever the lengths."""
        image = self._masked(histories, self.item_embeddings(histories)).unsqueeze(1)
        pooled = [torch.relu(conv(image)).amax(dim=(2, 3)) for conv in self.horizontal_cnn]
        return self.s_fc(torch.cat([*pooled, torch.relu(self.vertical_cnn(image)).flatten(1)], dim=1))


def _family(arrays: dict[str, np.ndarray]) -> type[PublishedSASRec] | type[PublishedGRU] | type[PublishedCaser] | None:
    if "positional_embeddings.weight" in arrays:
        return PublishedSASRec
    if "gru.weight_ih_l0" in arrays:
        return PublishedGRU
    if "vertical_cnn.weight" in arrays:
        return PublishedCaser
    return None


def load_published(path: Path, max_history: int = 10) -> PublishedSASRec | PublishedGRU | PublishedCaser:
    """Load a published recommender from its ``.npz``; which one it is follows from its parameters' names.

    Args:
        path: an archive of fp32 arrays by parameter name.
        max_history: columns of a history, where the file does not tell (GRU4Rec).

    Returns:
        The model, in evaluation mode, with every parameter from the file and none left over.

    Raises:
        InputError: no such file, not an archive of plain arrays, or its parameters fit none of the three models.
    """
    path = Path(path)
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except FileNotFoundError:
        raise InputError(f"{path}: not found; expected published recommender weights (.npz)") from None
    except (ValueError, OSError, zipfile.BadZipFile, AttributeError) as error:
        raise InputError(f"{path}: not an .npz of plain arrays ({error}); nothing else is loaded") from None
    family = _family(arrays)
    if family is None or "item_embeddings.weight" not in arrays or arrays["item_embeddings.weight"].ndim != 2:
        raise InputError(f"{path}: parameters of no known recommender (SASRec, GRU4Rec, Caser): {sorted(arrays)[:4]} …")
    rows, dim = arrays["item_embeddings.weight"].shape
    if "positional_embeddings.weight" in arrays:
        max_history = len(arrays["positional_embeddings.weight"])
    elif "vertical_cnn.weight" in arrays:
        max_history = arrays["vertical_cnn.weight"].shape[2]
    model = family(rows - 1, max_history, dim)
    try:
        model.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
    except RuntimeError as error:
        detail = " ".join(str(error).split())
        raise InputError(f"{path}: parameters do not fit {family.__name__}: {detail}") from None
    return model.eval()
