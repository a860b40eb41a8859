"""The synthetic world holds both signals it promises, and nothing but its arguments decides it."""

import numpy as np
import pytest

from llara_dist.data.synthetic import World, make_titles, synthetic_world, words
from llara_dist.errors import InputError


@pytest.fixture(scope="module")
def world() -> World:
    return synthetic_world(seed=3)


def test_equal_arguments_give_equal_worlds_and_another_seed_another(world: World) -> None:
    again, other = synthetic_world(seed=3), synthetic_world(seed=4)
    assert again.titles == world.titles
    assert np.array_equal(again.items, world.items)
    assert np.array_equal(again.timestamps, world.timestamps)
    assert other.titles != world.titles
    assert len(other.items) != len(world.items) or not np.array_equal(other.items, world.items)


def test_titles_are_unique_and_show_the_genre_only(world: World) -> None:
    assert len(set(world.titles)) == len(world.titles) == 300
    genre_words = [title.split()[-1] for title in world.titles]
    assert set(genre_words) <= set(words().genres)
    shown = {genre: {w for w, g in zip(genre_words, world.genres, strict=True) if g == genre} for genre in range(24)}
    assert all(len(seen) == 1 for seen in shown.values())
    # Within a genre the clusters are spread: the word tells nothing of the cluster.
    assert all(len(set(world.clusters[world.genres == genre])) > 5 for genre in range(24))


def test_no_word_list_holds_a_word_twice() -> None:
    assert len(set(words().all)) == len(words().all)


def test_no_user_takes_an_item_twice_and_time_runs_forward(world: World) -> None:
    pairs = world.users.astype(np.int64) * len(world.titles) + world.items
    assert len(np.unique(pairs)) == len(pairs)
    assert np.all(np.diff(world.timestamps) >= 0)
    counts = np.bincount(world.users)
    assert len(counts) == 4000
    assert counts.min() >= 6
    assert counts.max() <= 13


def test_events_follow_genre_and_cluster_in_the_shares_asked_for() -> None:
    made = synthetic_world(seed=0, genre_share=0.40, cluster_share=0.52)
    by_genre = (made.genres[made.items] == made.favourite_genres[made.users]).mean()
    by_cluster = (made.clusters[made.items] == made.favourite_clusters[made.users]).mean()
    # A draw from elsewhere hits the favourite by chance as well; used-up favourites fall back to any item.
    assert 0.38 < by_genre < 0.46
    assert 0.45 < by_cluster < 0.56
    alone = synthetic_world(seed=0, genre_share=0.9, cluster_share=0.0)
    assert (alone.clusters[alone.items] == alone.favourite_clusters[alone.users]).mean() < 0.06


def test_late_items_have_few_early_events(world: World) -> None:
    early = world.items[world.users < 400]
    assert len(np.unique(early)) < len(world.titles)
    assert len(np.unique(synthetic_world(seed=3, late_share=0.0).items)) == len(world.titles)


def test_names_are_reused_only_when_all_are_used() -> None:
    names = ["A", "B", "C"]
    titles = make_titles(np.random.default_rng(0), ["X", "Y"], names, np.array([0, 1, 0, 0, 1, 1]))
    assert sorted(title.split()[0] for title in titles[:3]) == names
    assert len(set(titles)) == 6


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"num_genres": 1000}, "num_genres"),
        ({"num_items": 20}, "num_items"),
        ({"genre_share": 0.7, "cluster_share": 0.7}, "genre_share"),
        ({"min_events": 9, "max_events": 8}, "max_events"),
        ({"num_users": 0}, "num_users"),
    ],
)
def test_bad_settings_are_named(settings: dict, named: str) -> None:
    with pytest.raises(InputError, match=named):
        synthetic_world(**settings)
