"""Types that occur in one level of a condition only."""

import numpy as np
import pytest

from celbo.data.confounding import types_of_one_level


@pytest.mark.parametrize("n_levels", [2, 3, 6])
def test_levels_with_types_of_their_own_are_doubted(n_levels):
    types = np.repeat([f"type {number}" for number in range(6)], 50)
    levels = np.repeat(np.arange(6) % n_levels, 50)
    found = types_of_one_level(types, levels)
    assert found.doubtful
    assert (found.n_types, len(found.of_one), found.share) == (6, 6, 1.0)
    assert found.of_one[0] == ("type 0", "0")


@pytest.mark.parametrize("sizes", [[500, 500], [9900, 100], [1000, 20]])
def test_the_sizes_of_levels_make_no_difference(sizes):
    """Of 20 cells of the small level, 20 are where independence would put fewer than one."""
    levels = np.repeat(["large", "small"], sizes)
    found = types_of_one_level(np.where(levels == "large", "T", "B"), levels)
    assert found.doubtful
    assert {level for _, level in found.of_one} == {"large", "small"}


@pytest.mark.parametrize("share", [0.5, 0.02, 0.003])
@pytest.mark.parametrize("n_types", [2, 9, 60])
def test_shuffled_levels_are_never_doubted(n_types, share):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        types = rng.choice(n_types, 3000, p=rng.dirichlet(np.ones(n_types)))
        assert not types_of_one_level(types, rng.random(3000) < share).of_one


def test_a_small_type_of_one_level_is_no_doubt():
    """Too small to say (12 cells, of which 6 are expected elsewhere), and large enough to be named but no doubt."""
    levels = np.tile(["a", "b"], 300)
    types = np.full(600, "T", dtype=object)
    types[np.flatnonzero(levels == "a")[:12]] = "rare"
    assert types_of_one_level(types, levels).of_one == ()
    types[np.flatnonzero(levels == "a")[:40]] = "rare"
    found = types_of_one_level(types, levels)
    assert found.of_one == (("rare", "a"),)
    assert not found.doubtful


def test_a_few_stray_cells_do_not_hide_what_goes_together():
    """1 in 20 of the expected cells: 5 of 100 are the same, 20 of 100 are not."""
    levels = np.repeat(["a", "b"], 200)
    types = np.where(levels == "a", "T", "B").astype(object)
    types[:5] = "B"
    assert types_of_one_level(types, levels).doubtful
    types[:20] = "B"
    types[-20:] = "T"
    assert not types_of_one_level(types, levels).of_one


def test_unequal_shares_are_no_doubt():
    rng = np.random.default_rng(0)
    types = rng.integers(4, size=2000)
    levels = rng.random(2000) < np.where(types < 2, 0.8, 0.2)
    assert not types_of_one_level(types, levels).of_one


def test_no_cells_have_no_types():
    assert not types_of_one_level(np.array([]), np.array([])).doubtful


def test_the_sentence_has_the_figures():
    levels = np.repeat(["a", "b"], 100)
    sentence = types_of_one_level(np.where(levels == "a", "T", "B"), levels).sentence("batch", "the types in 'type'")
    assert sentence.startswith("2 of 2 types (100% of the cells) occur in one level of 'batch' only, as 'B' in 'b'")
    assert "cannot be told from that of the types in 'type'" in sentence
