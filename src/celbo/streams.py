"""Random streams: each use of a seed has a number. Uses with the same number never meet in one computation."""

from enum import IntEnum

import numpy as np

__all__ = ["Stream", "random_stream", "short_seed"]


class Stream(IntEnum):
    """Numbers of the streams. A changed number changes the results of a seed."""

    SPLIT = 0
    """Which cells are held out."""
    MINIBATCHES = 1
    """Order of the cells in an epoch."""
    STEP = 2
    """Noise and dropout masks of a training step."""
    REFERENCE = 3
    """Training cells that are kept as a reference."""
    WATCHED = 4
    """Held-out cells that are watched during training."""
    ABLATION = 5
    """Draws and permutations of z."""
    INFORMATION = 6
    """Draws of z for mutual information."""
    AGGREGATED_GAP = 7
    """Draws from the aggregated posterior and from the prior."""
    LEAKAGE = 8
    """Cells among which leakage of a condition is measured."""
    EVIDENCE = 9
    """Choices of cells in a diagnosis: to learn from, to measure sensitivity on, and to measure information among."""
    IMPORTANCE = 10
    """Importance samples of a cell."""
    PSEUDO_CELLS = 11
    """Cells at which pseudo-cells of the prior start."""
    MEASURED = 12
    """Cells that a model is measured on."""
    NORMS = 13
    """Cells over which batch norms are settled."""
    DOUBTS = 14
    """Cells on which a model is measured after each fit."""
    CURE = 15
    """Held-out cells that compare a remedy with the model before it."""
    CHANGED_GENES = 16
    """Errors of changes of genes."""
    GROUP_MEAN = 17
    """Resampled cells of a group mean."""
    SAMPLE = 18
    """New cells."""
    READ_CELLS = 18
    """Held-out cells that are read after a fit. It has the number of `SAMPLE`."""
    SUPPORT = 19
    """Known cells that are tested for support."""
    COMPARED_CELLS = 19
    """Cells that models are compared on. It has the number of `SUPPORT`."""
    REALISM = 19
    """Cells, halves and folds of the comparison with real cells. It has the number of `SUPPORT`."""
    BOOTSTRAP = 20
    """Resampled cells that give the certainty of a choice."""
    SHRINKAGE = 21
    """Draws of shrunken fold changes."""
    TYPES_KEPT = 22
    """Cells among which types are compared."""
    OVERLAP = 23
    """Cells, halves and normal draws by which levels are compared."""


def random_stream(seed: int, stream: Stream, *numbers: int) -> np.random.Generator:
    """Make the generator of a stream; ``numbers`` (an epoch, a cell) tell its parts apart.

    Examples
    --------
    >>> random_stream(0, Stream.SPLIT).permutation(5).tolist() == np.random.default_rng([0, 0]).permutation(5).tolist()
    True
    """
    return np.random.default_rng([seed, int(stream), *numbers])


def short_seed(seed: int) -> int:
    """Return a seed below 2**32, for libraries that take no larger one; a seed that is small enough stays the same.

    Examples
    --------
    >>> short_seed(3), short_seed(2**40) == short_seed(2**40), short_seed(2**40) == short_seed(2**41)
    (3, True, False)
    """
    return int(seed) if seed < 2**32 else int(np.random.SeedSequence(int(seed)).generate_state(1)[0])
