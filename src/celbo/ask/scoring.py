"""Where cells lie, how likely they are, and what their expression is expected to be."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from celbo.data.schema import Schema
from celbo.errors import UsageError, check_count, check_seed, warn
from celbo.fit.cells import Cells
from celbo.fit.fitted import Fitted
from celbo.kernels.threads import threads
from celbo.model.importance import BLOCK as REFINED_TOGETHER
from celbo.model.importance import LogProb, log_prob_of_block
from celbo.model.inference import cell_terms, decoded_blocks, encoded_blocks

__all__ = [
    "check_library",
    "doubts_of_values",
    "elbo",
    "expected_expression",
    "expression_blocks",
    "log_prob",
    "posterior",
    "refuse_autoencoder",
]

_FEW_SAMPLES = 10
"""Effective importance samples below which an estimate is not to be trusted."""
_REFINE_STEPS = 150


def posterior(fitted: Fitted, cells: Cells) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mean and standard deviation of q(z | x, c), each ``(cells, latent_dim)``; see `celbo.ExpressionVAE.posterior`."""
    encoded = cells.encoded  # the cells keep it
    return encoded.mu_z.copy(), np.exp(0.5 * encoded.logvar_z) * fitted.objective.samples_z


def elbo(fitted: Fitted, cells: Cells, *, seed: int = 0) -> pd.DataFrame:
    """Evidence lower bound of each cell and its terms, in nats; see `celbo.ExpressionVAE.elbo`."""
    seed = check_seed(seed)
    with threads(fitted.threads):
        terms = cell_terms(fitted.vae, cells.source, seed=seed, objective=fitted.objective)
    table = pd.DataFrame(terms.kl, index=cells.obs.index).add_prefix("kl_")
    table.insert(0, "elbo", terms.elbo)
    table.insert(1, "reconstruction", terms.reconstruction)
    table.insert(2, "kl", terms.kl.sum(1))
    return table


def log_prob(
    fitted: Fitted, cells: Cells, *, n_samples: int = 500, refine: bool = False, seed: int = 0
) -> pd.DataFrame:
    """Importance-weighted log p(x | library, conditions) of each cell; see `celbo.ExpressionVAE.log_prob`."""
    check_count("n_samples", n_samples, 2)
    seed = check_seed(seed)
    refuse_autoencoder(fitted)
    plain, refined = list[LogProb](), list[LogProb]()
    with threads(fitted.threads):
        for block in encoded_blocks(fitted.vae, cells.source, cells.rows, REFINED_TOGETHER):
            plain.append(log_prob_of_block(fitted.vae, block, n_samples=n_samples, refine_steps=0, seed=seed))
            if refine:
                refined.append(
                    log_prob_of_block(fitted.vae, block, n_samples=n_samples, refine_steps=_REFINE_STEPS, seed=seed)
                )
    estimates = _joined(refined if refine else plain)
    table = {**estimates._asdict(), "trusted": estimates.ess >= _FEW_SAMPLES}
    if refine:
        unrefined = _joined(plain).log_p
        table |= {"unrefined": unrefined, "gap": estimates.log_p - unrefined}
    frame = pd.DataFrame(table, index=cells.obs.index)
    frame.loc[cells.empty, frame.columns != "trusted"] = np.nan
    frame.loc[cells.empty, "trusted"] = False
    return frame


def _joined(parts: Sequence[LogProb]) -> LogProb:
    return LogProb(*map(np.concatenate, zip(*parts, strict=True)))


def expected_expression(
    fitted: Fitted,
    cells: Cells,
    *,
    given: Mapping[str, Any] | None = None,
    over: Sequence[str] = (),
    library: float | None = None,
) -> NDArray[np.float32]:
    """Mean of p(x | mu_z, c), ``(cells, genes)``; see `celbo.ExpressionVAE.expected_expression`."""
    means, start = np.empty((len(cells), cells.source.n_genes), np.float32), 0
    for block in expression_blocks(fitted, cells, given=given, over=over, library=library):
        means[start : start + len(block)] = block
        start += len(block)
    return means


def expression_blocks(
    fitted: Fitted,
    cells: Cells,
    *,
    given: Mapping[str, Any] | None = None,
    over: Sequence[str] = (),
    library: float | None = None,
) -> Iterator[NDArray[np.float32]]:
    """Compute what `expected_expression` returns, in blocks of consecutive cells of bounded size.

    Parameters
    ----------
    fitted, cells
        The model, and cells opened for it. They are read and encoded once, before the first block.
    given, over, library
        As `celbo.ExpressionVAE.expected_expression` takes them.

    Returns
    -------
    Iterator
        Blocks, ``(cells of the block, genes)`` float32.

    Raises
    ------
    UsageError, DataError
        If the model cannot decode under these conditions, or at this library size; at the call.
    """
    settings = fitted.schema.combinations({} if given is None else given, over)
    check_library(fitted, library)
    contexts = [cells.contexts(setting) if setting else cells.source.contexts for setting in settings]
    for doubt in doubts_of_values(fitted.schema, settings[0]):
        warn(doubt)

    def blocks() -> Iterator[NDArray[np.float32]]:
        decoded = decoded_blocks(fitted.vae, cells.encoded, contexts, library=library)
        while True:
            with threads(fitted.threads):
                block = next(decoded, None)
            if block is None:
                return
            yield block

    return blocks()


def refuse_autoencoder(fitted: Fitted) -> None:
    """Raise a `UsageError` if the model is a plain autoencoder, which has no p(x)."""
    if not fitted.objective.samples_z:
        raise UsageError("a plain autoencoder has no p(x); fit again with objective='vae'.")


def check_library(fitted: Fitted, library: float | None) -> None:
    """Raise a `UsageError` if this is no library size, or means nothing to the likelihood."""
    if library is None:
        return
    if not fitted.is_counts:
        raise UsageError(f"library={library!r} has no meaning for {fitted.likelihood.name!r}; leave it out.")
    is_number = isinstance(library, int | float | np.number) and not isinstance(library, bool)
    if not (is_number and 0 < float(library) < np.inf):
        raise UsageError(f"library={library!r}; a library size is a finite number above 0.")


def doubts_of_values(schema: Schema, given: Mapping[str, Any]) -> list[str]:
    """Say which continuous conditions are asked for beyond the values that fit saw."""
    doubts = [
        condition.doubt(pd.Series([given[condition.name]]))
        for condition in schema.conditions
        if condition.name in given
    ]
    return [doubt for doubt in doubts if doubt]
