"""How heavily the KL term weighs while a model trains. Nothing here changes what is reported."""

__all__ = ["linear_warmup"]


def linear_warmup(step: int, warmup_steps: int) -> float:
    """Weight of the KL term at a step: from near 0 to 1 in equal steps, then 1 (Sonderby 2016, arXiv 1602.02282).

    Parameters
    ----------
    step
        Optimiser steps taken so far.
    warmup_steps
        Steps until the weight is 1; 0 for no warm-up.

    Returns
    -------
    float
        Weight, above 0 and at most 1.

    Examples
    --------
    >>> [linear_warmup(step, 4) for step in range(6)]
    [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    """
    return min(1.0, (step + 1) / max(1, warmup_steps))
