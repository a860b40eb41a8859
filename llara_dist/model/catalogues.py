"""Random catalogues to pre-train a tiny Llama on: rows to read, match and copy, each from another world.

A real language model can match titles and copy one before it is tuned; a tiny one has to be taught. In each catalogue
words take other roles, and genres and clusters other items; a row shows a user with a favourite genre and a favourite
cluster. In hybrid rows every slot holds the item's latent vector under a map drawn for the row: what a vector means can
then only be read off the row itself, as with a recommender never seen before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from llara_dist.data.candidates import draw_candidates
from llara_dist.data.prompts import PromptEncoder
from llara_dist.data.synthetic import words
from llara_dist.data.wording import DOMAINS, load_templates
from llara_dist.hashing import text_seed, uniform

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llara_dist.data.dataset import Dataset

LATENT_DIM = 64


@dataclass(frozen=True)
class Lesson:
    """How hard the rows of one step are."""

    rows: int
    num_history: int
    """history items a row, at most"""
    num_candidates: int
    hybrid: bool
    """slots filled; otherwise text-only rows"""
    ease: float
    """1 = every event follows a favourite and clusters lie tight, 0 = as in the worlds to come"""


@dataclass(frozen=True)
class DrawnRows:
    """Rows, and the titles they show.

    Shapes: history_offsets int64 [n+1] into history int32, candidates int32 [n, C], targets int64 [n] (index among the
    candidates), chances float32 [n, C] (how likely each candidate is the target, given the user's favourites),
    latents float32 [n, S, LATENT_DIM], a row's items in reading order, or None where rows are text-only.
    """

    encoder: PromptEncoder
    history_offsets: np.ndarray
    history: np.ndarray
    candidates: np.ndarray
    targets: np.ndarray
    chances: np.ndarray
    latents: np.ndarray | None


class RowSource(Protocol):
    """Where pre-training rows come from."""

    max_history: int
    max_candidates: int

    def draw(self, rng: np.random.Generator, lesson: Lesson) -> DrawnRows:
        """Draw the rows of one step; they depend on the generator's state and the lesson alone."""
        ...


class RandomCatalogues:
    """`count` synthetic catalogues, each a pure function of (seed, its number); every row shows one of them.

    A row each, not a step each: with one catalogue a step, matching did not emerge in a thousand steps, since all of a
    step's rows then say the same about the same few words.

    Args:
        tokenizer: encodes the prompts.
        seed: of the catalogues' contents.
        count: how many different catalogues.
        max_candidates: most candidates of a row.
    """

    max_history = 10

    def __init__(self, tokenizer: PreTrainedTokenizerBase, seed: int, count: int, max_candidates: int = 20) -> None:
        self.max_candidates = max_candidates
        self._tokenizer = tokenizer
        self._templates = [load_templates(domain) for domain in DOMAINS]
        self._words = np.array(words().all)
        self._seed = seed
        self._count = count

    def draw(self, rng: np.random.Generator, lesson: Lesson) -> DrawnRows:
        """Draw one user and their candidates from each of `lesson.rows` catalogues."""
        n, shown = lesson.rows, lesson.num_history + lesson.num_candidates
        catalogue = rng.integers(self._count, size=n)[:, None]
        everyone = np.arange(n)
        num_items = np.exp(self._draw("items", catalogue) * math.log(400 / 60) + math.log(60)).astype(np.int64)
        num_genres = 6 + (self._draw("genres", catalogue) * 35).astype(np.int64)
        num_clusters = 6 + (self._draw("clusters", catalogue) * 35).astype(np.int64)
        item = np.arange(num_items.max())
        exists = item < num_items
        genres = (self._draw("genre", catalogue, item) * num_genres).astype(np.int64)
        clusters = (self._draw("cluster", catalogue, item) * num_clusters).astype(np.int64)

        genre_share, cluster_share = _shares(rng, n, lesson)
        one, other = (rng.random((2, n)) * num_items[:, 0]).astype(np.int64)
        of_genre = exists & (genres == genres[everyone, one][:, None])
        of_cluster = exists & (clusters == clusters[everyone, other][:, None])
        free = exists.copy()
        events = np.empty((n, lesson.num_history + 1), dtype=np.int64)
        for event in range(lesson.num_history + 1):
            source = rng.random(n)
            by_genre = (source < genre_share)[:, None]
            by_cluster = ((source >= genre_share) & (source < genre_share + cluster_share))[:, None]
            wanted = free & np.where(by_genre, of_genre, ~by_cluster | of_cluster)
            wanted = np.where(wanted.any(1, keepdims=True), wanted, free)
            events[:, event] = np.where(wanted, rng.random(wanted.shape), -1.0).argmax(1)
            free[everyone, events[:, event]] = False
        score = np.where(free, rng.random(free.shape), -1.0)
        candidates = np.argpartition(-score, lesson.num_candidates - 1, axis=1)[:, : lesson.num_candidates]
        targets = rng.integers(lesson.num_candidates, size=n)
        candidates[everyone, targets] = events[:, -1]
        chances = np.maximum(1 - genre_share - cluster_share, 0.02)[:, None] / num_items
        chances = chances + _match(of_genre, candidates, genre_share) + _match(of_cluster, candidates, cluster_share)

        items = np.concatenate([events[:, :-1], candidates], axis=1)
        genre, cluster = genres[everyone[:, None], items], clusters[everyone[:, None], items]
        latents = self._latents(catalogue, items, genre, cluster, lesson.ease) if lesson.hybrid else None
        lengths = rng.integers(max(1, min(3, lesson.num_history)), lesson.num_history + 1, size=n)
        kept = np.arange(lesson.num_history) >= (lesson.num_history - lengths)[:, None]
        ids = np.arange(n * shown, dtype=np.int32).reshape(n, shown)
        return DrawnRows(
            encoder=PromptEncoder(
                self._tokenizer,
                self._titles(catalogue, items, genre, num_genres),
                self._templates[int(rng.integers(len(self._templates)))],
            ),
            history_offsets=np.concatenate([[0], np.cumsum(lengths)]),
            history=ids[:, : lesson.num_history][kept],
            candidates=ids[:, lesson.num_history :],
            targets=targets,
            chances=(chances / chances.sum(1, keepdims=True)).astype(np.float32),
            latents=latents,
        )

    def _draw(self, what: str, *fields: np.ndarray) -> np.ndarray:
        return uniform(text_seed(f"llara_dist/catalogues/{what}"), self._seed, *fields)

    def _titles(self, catalogue: np.ndarray, items: np.ndarray, genre: np.ndarray, num_genres: np.ndarray) -> list[str]:
        """Titles as data/synthetic.py makes them, of items [n, S] in reading order; words play other roles in each."""
        role = np.argsort(self._draw("role", catalogue, np.arange(len(self._words))), axis=1)
        num_names = len(self._words) - num_genres
        name = num_genres + (self._draw("name", catalogue, items) * num_names).astype(np.int64)
        parts = [self._words[np.take_along_axis(role, part, 1)].ravel() for part in (name, genre)]
        return [f"{one} {last}" for one, last in zip(*parts, strict=True)]

    def _latents(
        self, catalogue: np.ndarray, items: np.ndarray, genre: np.ndarray, cluster: np.ndarray, ease: float
    ) -> np.ndarray:
        """Item vectors as a recommender learns them: clusters, traces of genres, a common part, noise, cold items."""

        def spread(what: str, *fields: np.ndarray) -> np.ndarray:
            return (self._draw(what, catalogue[..., None], *fields, np.arange(LATENT_DIM)) - 0.5) * math.sqrt(12)

        trace = 0.3 * (self._draw("trace", catalogue) * 3).astype(np.int64)
        shift = 0.5 * (self._draw("shift", catalogue) * 3).astype(np.int64)
        noise = (0.2 + 0.7 * self._draw("noise", catalogue)) * (1 - ease) + 0.1 * ease
        cold = self._draw("cold", catalogue, items) < 0.1 * (1 - ease)
        known = spread("centre", cluster[..., None]) + trace[..., None] * spread("genre centre", genre[..., None])
        own = spread("item", items[..., None])
        latents = np.where(cold[..., None], own, known + noise[..., None] * own)
        latents = latents + shift[..., None] * spread("common")
        return (latents / np.sqrt(np.mean(latents**2, axis=(1, 2), keepdims=True))).astype(np.float32)


def _shares(rng: np.random.Generator, rows: int, lesson: Lesson) -> tuple[np.ndarray, np.ndarray]:
    """Each row's share of events by genre and by cluster: either alone, or both."""
    if not lesson.hybrid:
        genre = rng.uniform(0.35, 1.0, rows)
        return genre + lesson.ease * (1 - genre), np.zeros(rows)
    together = rng.uniform(0.8, 1.0, rows)
    kind = rng.random(rows)
    part = np.where(kind < 0.25, 0.0, np.where(kind < 0.4, 1.0, rng.random(rows)))
    together = together + lesson.ease * (1 - together)
    return together * part, together * (1 - part)


def _match(of: np.ndarray, candidates: np.ndarray, share: np.ndarray) -> np.ndarray:
    """How likely a draw from the favourite's items takes each candidate, times the share of such draws."""
    return share[:, None] * np.take_along_axis(of, candidates, 1) / of.sum(1, keepdims=True)


class DatasetRows:
    """The training rows of a data set, text-only, with negatives drawn anew for every step.

    Args:
        tokenizer: encodes the prompts.
        dataset: its titles and its train rows; no other split is read.
        seed: of the negatives.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, dataset: Dataset, seed: int) -> None:
        self._rows = dataset.train
        self._encoder = PromptEncoder(tokenizer, dataset.titles, load_templates(dataset.domain))
        self._exclude = dataset.exclusions("train")
        self._num_items = dataset.num_items
        self._seed = seed
        self._draws = 0
        self.max_history = int(dataset.info.get("max_history", 10))
        self.max_candidates = int(dataset.info.get("num_candidates", 20))

    def draw(self, rng: np.random.Generator, lesson: Lesson) -> DrawnRows:
        """Draw train rows at random, their histories cut to the lesson's length (the newest items stay)."""
        picked = rng.integers(len(self._rows), size=lesson.rows)
        starts, ends = self._rows.offsets[picked], self._rows.offsets[picked + 1]
        starts = np.maximum(starts, ends - lesson.num_history)
        lengths = ends - starts
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
        exclude_offsets, exclude_items = self._exclude
        excluded = [exclude_items[exclude_offsets[row] : exclude_offsets[row + 1]] for row in picked]
        targets = self._rows.targets[picked]
        self._draws += 1
        candidates = draw_candidates(
            self._rows.keys[picked],
            targets,
            np.concatenate([[0], np.cumsum([len(items) for items in excluded])]),
            np.concatenate(excluded),
            self._num_items,
            lesson.num_candidates,
            self._seed,
            self._draws,
        )
        at = (candidates == targets[:, None]).argmax(1)
        chances = np.zeros(candidates.shape, dtype=np.float32)
        chances[np.arange(len(at)), at] = 1.0
        return DrawnRows(
            encoder=self._encoder,
            history_offsets=offsets,
            history=self._rows.items[np.repeat(starts, lengths) + within],
            candidates=candidates,
            targets=at,
            chances=chances,
            latents=None,
        )
