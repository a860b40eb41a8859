"""The built-in synthetic world: a seeded catalogue and its users, with signal in titles and signal in co-consumption.

Every item has a genre, which its title shows as a word, and a hidden cluster, which no text shows: only that the same
users take items of the same cluster tells it. Every user has a favourite genre and a favourite cluster; each event is
drawn from the one, from the other or from the whole catalogue. Some items are released late, so that hardly any
interaction tells of them and their title is all there is.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib import resources

import numpy as np
import yaml

from llara_dist.errors import InputError

DOMAIN = "game"
_SECONDS_PER_EVENT = 86_400
_EPOCH = 1_500_000_000


@dataclass(frozen=True)
class Words:
    """The word lists that titles are made of."""

    names: tuple[str, ...]
    genres: tuple[str, ...]

    @property
    def all(self) -> tuple[str, ...]:
        """Names, then genre words; no word is in both."""
        return self.names + self.genres


@dataclass(frozen=True)
class World:
    """A catalogue, its interactions in time order, and the hidden truth they were drawn from.

    Shapes: users int32 [E], items int32 [E], timestamps int64 [E] (seconds), titles by item id [I], genres and
    clusters int32 [I] (never shown to a model), favourite_genres and favourite_clusters int32 [U].
    """

    titles: list[str]
    users: np.ndarray
    items: np.ndarray
    timestamps: np.ndarray
    genres: np.ndarray
    clusters: np.ndarray
    favourite_genres: np.ndarray
    favourite_clusters: np.ndarray


@functools.cache
def words() -> Words:
    """Read the word lists shipped with the package (data/catalogue/words.yaml)."""
    text = resources.files("llara_dist.data").joinpath("catalogue/words.yaml").read_text(encoding="utf-8")
    lists = yaml.safe_load(text)
    return Words(names=tuple(lists["names"]), genres=tuple(lists["genres"]))


def make_titles(
    rng: np.random.Generator, genre_words: list[str], name_words: list[str], genres: np.ndarray
) -> list[str]:
    """Make one unique title per item: a name, then the word of the item's genre.

    Args:
        rng: the generator; the titles depend on its state alone.
        genre_words: the word of each genre.
        name_words: the words to name items with; each is used once before any is used again.
        genres: int [I], the genre of each item; no more of one genre than there are names.
    """
    names = rng.permutation(len(name_words))
    free = [list(range(len(names))) for _ in genre_words]
    titles: list[str] = []
    for item, genre in enumerate(genres):
        wanted = item % len(names)
        # The next name in turn, or the first after it that this genre has not used.
        place = next((place for place, name in enumerate(free[genre]) if name >= wanted), 0)
        titles.append(f"{name_words[names[free[genre].pop(place)]]} {genre_words[genre]}")
    return titles


def synthetic_world(
    seed: int = 0,
    num_users: int = 4000,
    num_items: int = 300,
    num_genres: int = 24,
    num_clusters: int = 30,
    genre_share: float = 0.40,
    cluster_share: float = 0.52,
    late_share: float = 0.15,
    min_events: int = 6,
    max_events: int = 13,
) -> World:
    """Draw a world. Equal arguments give equal worlds; no user takes an item twice.

    Args:
        seed: of everything drawn.
        num_users: users; they arrive one after another, so that the last users are the latest.
        num_items: items, at most the number of different titles.
        num_genres: genres, each with one word.
        num_clusters: hidden clusters, drawn without regard to the genres.
        genre_share: share of events drawn from the user's favourite genre.
        cluster_share: share of events drawn from the user's favourite cluster; the rest is drawn from all items.
        late_share: share of items that are released at a random time, not at the start.
        min_events: fewest events of a user.
        max_events: most events of a user.

    Raises:
        InputError: a count or share outside its range.
    """
    lists = words()
    if not 1 <= num_genres <= len(lists.genres):
        raise InputError(f"synthetic: num_genres is {num_genres}, the word list has 1 to {len(lists.genres)}")
    if not max(num_genres, num_clusters, 3 * max_events) <= num_items <= num_genres * len(lists.names):
        lowest, highest = max(num_genres, num_clusters, 3 * max_events), num_genres * len(lists.names)
        raise InputError(f"synthetic: num_items is {num_items}, these settings need {lowest} to {highest}")
    if num_clusters < 1 or num_users < 1 or not 1 <= min_events <= max_events:
        raise InputError(
            f"synthetic: num_clusters {num_clusters}, num_users {num_users} and min_events {min_events} must be at "
            f"least 1, and max_events {max_events} at least min_events"
        )
    if min(genre_share, cluster_share, late_share) < 0 or genre_share + cluster_share > 1 or late_share > 1:
        raise InputError(
            f"synthetic: genre_share {genre_share}, cluster_share {cluster_share} and late_share {late_share} must be "
            "at least 0, the first two together and the last at most 1"
        )
    rng = np.random.default_rng(np.random.SeedSequence([seed, 0x11A2A]))
    genres = rng.permutation(np.arange(num_items) % num_genres).astype(np.int32)
    clusters = rng.permutation(np.arange(num_items) % num_clusters).astype(np.int32)
    genre_words = [str(word) for word in rng.permutation(lists.genres)[:num_genres]]
    titles = make_titles(rng, genre_words, list(lists.names), genres)
    log_popularity = rng.normal(0.0, 0.4, num_items)
    released = np.where(rng.random(num_items) < late_share, rng.random(num_items), 0.0)

    favourite_genres = rng.integers(num_genres, size=num_users).astype(np.int32)
    favourite_clusters = rng.integers(num_clusters, size=num_users).astype(np.int32)
    counts = rng.integers(min_events, max_events + 1, size=num_users)
    available = (np.arange(num_users) / num_users)[:, None] >= released
    of_genre = genres == favourite_genres[:, None]
    of_cluster = clusters == favourite_clusters[:, None]
    taken = np.full((num_users, max_events), -1, dtype=np.int32)
    for event in range(max_events):
        source = rng.random(num_users)[:, None]
        wanted = np.where(source < genre_share, of_genre, (source >= genre_share + cluster_share) | of_cluster)
        # Favourites used up or not yet released: any item that is there will do.
        allowed = available & wanted
        allowed = np.where(allowed.any(axis=1, keepdims=True), allowed, available)
        score = np.where(allowed, log_popularity + rng.gumbel(size=(num_users, num_items)), -np.inf)
        taken[:, event] = score.argmax(axis=1)
        available[np.arange(num_users), taken[:, event]] = False

    kept = np.arange(max_events) < counts[:, None]
    users = np.repeat(np.arange(num_users, dtype=np.int32), counts)
    arrival = np.arange(num_users)[:, None] * 600 + _EPOCH
    timestamps = (arrival + np.arange(max_events) * _SECONDS_PER_EVENT)[kept]
    order = np.argsort(timestamps, kind="stable")
    return World(
        titles=titles,
        users=users[order],
        items=taken[kept][order],
        timestamps=timestamps[order].astype(np.int64),
        genres=genres,
        clusters=clusters,
        favourite_genres=favourite_genres,
        favourite_clusters=favourite_clusters,
    )
