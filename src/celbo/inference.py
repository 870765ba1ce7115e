"""A fitted model over a Source, in chunks of bounded memory; torch in, numpy out."""

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from celbo.kernels.threads import in_threads, n_threads
from celbo.minibatch import Contexts, Minibatch, Rows, Source, in_chunks
from celbo.objective import Objective, elbo_terms, log_prob_of_cells
from celbo.vae import VAE, Noise

__all__ = [
    "CellTerms",
    "Filled",
    "UseOfLatent",
    "cell_terms",
    "context_of",
    "expected_values",
    "false_share",
    "fill_in",
    "filled_library",
    "in_brief",
    "posterior",
    "sensitivity",
    "use_of_latent",
]

_CHUNK = 1024
"""Cells computed together: enough to keep the processor busy, few enough to stay in its cache."""
_CONTEXT_CHUNK = 1_000_000
"""Numbers of their contexts together, where there are very many levels."""


_MOST_COLUMNS = 64
"""Of a context that is compared as it is."""


_FILLING_ROUNDS = 5
"""Rounds of filling in genes that a query lacks: of a fifth missing, each takes the error down about fivefold."""


_MOST_FILLED_IN = 0.9
"""Share of a cell's counts that may be thought to lie in genes that were not measured."""


class CellTerms(NamedTuple):
    """Terms of the bound for each cell, as `celbo.objective.ElboTerms`, in numpy."""

    reconstruction: NDArray[np.float32]
    """``(cells,)``, nats."""
    kl: NDArray[np.float32]
    """``(cells, latent_dim)``, nats."""

    @property
    def elbo(self) -> NDArray[np.float32]:
        """Reconstruction less KL, ``(cells,)``, nats."""
        return self.reconstruction - self.kl.sum(1)


def posterior(vae: VAE, source: Source, rows: Rows | None = None) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mean and log-variance of q(z | x, c), each ``(cells, latent_dim)``, of these cells or of all."""
    rows = np.arange(source.n_cells) if rows is None else rows
    found = np.empty((2, len(rows), vae.latent_dim), np.float32)

    def encode(cells: Minibatch, here: slice) -> None:
        for part, values in zip(found, vae.encode(cells.x, context_of(vae, cells)), strict=True):
            part[here] = values.cpu().numpy()

    _for_chunks(vae, source, rows, encode)
    mu_z, logvar_z = found
    return mu_z, logvar_z


def cell_terms(
    vae: VAE, source: Source, rows: Rows | None = None, *, seed: int = 0, objective: Objective = elbo_terms
) -> CellTerms:
    """Terms of the bound for each cell, with one sample of z; the same seed draws the same noise.

    Parameters
    ----------
    vae
        The model; dropout is off meanwhile.
    source
        The cells.
    rows
        Which of them; all if None.
    seed
        Of the sampling noise.
    objective
        Whose terms.

    Returns
    -------
    CellTerms
    """
    rows = np.arange(source.n_cells) if rows is None else rows
    # Drawn for all cells, so that a cell's noise does not depend on which others are asked for.
    eps = torch.randn(source.n_cells, vae.latent_dim, generator=torch.Generator().manual_seed(seed))[rows]
    reconstruction, kl = np.empty(len(rows), np.float32), np.empty((len(rows), vae.latent_dim), np.float32)

    def bound(cells: Minibatch, here: slice) -> None:
        noise = Noise(eps[here].to(cells.x.device), None, None)
        terms = objective(vae, cells.x, context_of(vae, cells), cells.library, noise, cells.observed)
        reconstruction[here], kl[here] = terms.reconstruction.cpu().numpy(), terms.kl.cpu().numpy()

    _for_chunks(vae, source, rows, bound)
    return CellTerms(reconstruction, kl)


def expected_values(
    vae: VAE, source: Source, *, contexts: Contexts | None = None, library: Tensor | None = None
) -> NDArray[np.float32]:
    """Mean of p(x | mu_z, c, library), where mu_z comes from each cell under its own conditions.

    Parameters
    ----------
    vae
        The model.
    source
        The cells.
    contexts
        What to decode under; each cell's own if None.
    library
        Library sizes to decode at, ``(cells, 1)``; each cell's own if None.

    Returns
    -------
    numpy.ndarray
        ``(cells, genes)`` float32.
    """
    every, means = np.arange(source.n_cells), np.empty((source.n_cells, source.n_genes), np.float32)

    def decode(cells: Minibatch, here: slice) -> None:
        mu_z, _ = vae.encode(cells.x, context_of(vae, cells))
        target = Minibatch(
            cells.x,
            cells.context if contexts is None else contexts(every[here]).to(cells.x.device),
            cells.library if library is None else library[here].to(cells.x.device),
        )
        means[here] = vae.decode(mu_z, context_of(vae, target), target.library).cpu().numpy()

    _for_chunks(vae, source, every, decode)
    return means


class UseOfLatent(NamedTuple):
    """What the decoder makes of z and of the conditions, for each cell, in numpy."""

    mu_z: NDArray[np.float32]
    """``(cells, latent_dim)``, as ``logvar_z``."""
    logvar_z: NDArray[np.float32]
    reconstruction: NDArray[np.float32]
    """With each cell's own z, ``(cells,)``, nats."""
    lost: NDArray[np.float32]
    """Reconstruction lost, ``(parts, cells)``, nats: all of z permuted; each of its dimensions, if asked for; each set
    of context columns, NaN where the other cell has the same."""


def use_of_latent(
    vae: VAE,
    source: Source,
    rows: Rows | None = None,
    *,
    by_dimension: bool = False,
    of_context: Sequence[slice] = (),
    sample: bool = True,
    seed: int = 0,
) -> UseOfLatent:
    """Reconstruction of each cell, and what it loses when z, or the context, is another cell's.

    z is drawn from the posterior once, and permuted among cells of the same context; the context is permuted among all.

    Parameters
    ----------
    vae
        The model; dropout is off meanwhile.
    source
        The cells.
    rows
        Which of them; all if None.
    by_dimension
        Whether to permute each dimension of z by itself, too.
    of_context
        Columns of the context to permute together: those of one condition, for example.
    sample
        Whether to draw z; else it is mu_z.
    seed
        Of the draws and permutations.

    Returns
    -------
    UseOfLatent
    """
    rows = np.arange(source.n_cells) if rows is None else rows
    mu_z, logvar_z = (np.empty((len(rows), vae.latent_dim), np.float32) for _ in range(2))
    contexts = dict[int, sparse.csr_matrix]()  # of very many levels hardly any is not 0

    def encode(cells: Minibatch, here: slice) -> None:
        found = vae.encode(cells.x, context_of(vae, cells))
        mu_z[here], logvar_z[here] = found[0].cpu().numpy(), found[1].cpu().numpy()
        contexts[here.start] = sparse.csr_matrix(cells.context.cpu().numpy()[:, : vae.context_dim])

    _for_chunks(vae, source, rows, encode)
    context = sparse.vstack([contexts[start] for start in sorted(contexts)], format="csr")
    rng = np.random.default_rng([seed, 5])
    eps = rng.standard_normal(mu_z.shape, np.float32) if sample else np.float32(0)
    z = mu_z + np.exp(0.5 * logvar_z) * eps
    within, among = _permutation(in_brief(context), rng), _permutation(np.empty((len(rows), 0)), rng)
    of_z = [slice(None), *(slice(j, j + 1) for j in range(vae.latent_dim) if by_dimension)]
    reconstruction, lost = (
        np.empty(len(rows), np.float32),
        np.empty((len(of_z) + len(of_context), len(rows)), np.float32),
    )

    def decode(cells: Minibatch, here: slice) -> None:
        def log_prob(z: NDArray[np.float32], context: NDArray[np.float32]) -> NDArray[np.float32]:
            parts = (torch.from_numpy(part).to(cells.x.device) for part in (z, context))
            p = vae.likelihood(next(parts), context=next(parts) if vae.context_dim else None, library=cells.library)
            values: NDArray[np.float32] = log_prob_of_cells(p, cells.x, cells.observed).cpu().numpy()
            return values

        own, of_other = context[here].toarray(), context[among[here]].toarray()
        reconstruction[here] = log_prob(z[here], own)
        for number, columns in enumerate([*of_z, *of_context]):
            z_there, context_there = z[here].copy(), own.copy()
            if number < len(of_z):
                z_there[:, columns] = z[within[here]][:, columns]
            else:
                context_there[:, columns] = of_other[:, columns]
            lost[number, here] = reconstruction[here] - log_prob(z_there, context_there)
            if number >= len(of_z):
                lost[number, here][(context_there == own).all(1)] = np.nan

    _for_chunks(vae, source, rows, decode)
    return UseOfLatent(mu_z, logvar_z, reconstruction, lost)


def sensitivity(vae: VAE, source: Source, rows: Rows | None = None) -> NDArray[np.float64]:
    """How far each latent dimension moves the decoded mean, against the likelihood's own noise; ``(latent_dim,)``.

    ``E sum_g (d m_g / d z_j)**2 / var_g * Var(mu_z_j)``, at mu_z of each cell: the Fisher information about z_j that
    its genes carry, in units of what z_j varies. Forward-mode derivatives.
    """
    rows = np.arange(source.n_cells) if rows is None else rows
    mu_z, _ = posterior(vae, source, rows)
    total = torch.zeros(vae.latent_dim, dtype=torch.float64)
    device = next(vae.parameters()).device
    was_training = vae.training
    vae.eval()
    with torch.no_grad():
        for start in range(0, len(rows), _CHUNK):
            cells = source.take(rows[start : start + _CHUNK]).to(device)
            z = torch.from_numpy(mu_z[start : start + _CHUNK]).to(device)

            def mean(z: Tensor, cells: Minibatch = cells) -> Tensor:
                return vae.decode(z, context_of(vae, cells), cells.library)

            variance = vae.likelihood(z, context=context_of(vae, cells), library=cells.library).variance
            for j in range(vae.latent_dim):
                along = torch.zeros_like(z)
                along[:, j] = 1
                slope: Tensor = torch.func.jvp(mean, (z,), (along,))[1]
                total[j] += (slope.double().square() / variance.double().clamp(min=1e-30)).sum().cpu()
    vae.train(was_training)
    found: NDArray[np.float64] = total.numpy() / len(rows) * mu_z.var(0, dtype=np.float64)
    return found


def in_brief(context: sparse.csr_matrix) -> NDArray[np.floating[Any]]:
    """What tells contexts apart, in few columns: themselves, or a number that is the same for the same."""
    if context.shape[1] <= _MOST_COLUMNS:
        return np.asarray(context.toarray())
    found: NDArray[np.float64] = context @ np.random.default_rng(13).random((context.shape[1], 1))
    return found


def _permutation(context: NDArray[np.floating[Any]], rng: np.random.Generator) -> NDArray[np.intp]:
    """For each cell another one of the same context, each once; among all cells where contexts hardly recur."""
    groups = np.zeros(len(context), np.intp)
    if context.shape[1]:
        groups = np.unique(context, axis=0, return_inverse=True)[1].reshape(-1)
    sizes = np.bincount(groups, minlength=1)
    if 2 * len(sizes) > len(context):
        groups = np.zeros_like(groups)
    else:
        groups[sizes[groups] < 2] = -1
    other = np.empty(len(context), np.intp)
    for group in np.unique(groups):
        members = rng.permutation(np.flatnonzero(groups == group))
        other[members] = np.roll(members, 1)
    return other


def _for_chunks(vae: VAE, source: Source, rows: Rows, compute: Callable[[Minibatch, slice], None]) -> None:
    """Read these cells in chunks and call ``compute(cells, where they belong)``; threads take chunks by turns."""
    device = next(vae.parameters()).device
    size = min(_CHUNK, max(1, _CONTEXT_CHUNK // max(vae.context_dim, 1)))
    pieces = list(in_chunks(rows, size))
    reading = threading.Lock()
    was_training, n = vae.training, min(n_threads(), len(pieces)) if device.type == "cpu" else 1

    def work(turn: int) -> None:
        with torch.inference_mode():
            for number in range(turn, len(pieces), n):
                with reading:
                    cells = source.take(pieces[number]).to(device)
                cells = fill_in(vae, cells, source)
                compute(cells, slice(number * size, number * size + len(pieces[number])))

    vae.eval()  # no dropout
    try:
        in_threads(work, n)
    finally:
        vae.train(was_training)


def fill_in(vae: VAE, cells: Minibatch, source: Source) -> Minibatch:
    """Give genes that were not measured the values the model expects of them, so that they pull a cell nowhere.

    Zeros would be read as measurements. Encode, decode, fill in, and again: each round starts from a better guess. A
    library that is a sum over the model's genes grows by what was filled in; where counts were scaled to the same
    library and logged, those that were measured shrink instead.
    """
    if (observed := cells.observed) is None:
        return cells
    measured, library, context = cells.x.to_dense(), cells.library, context_of(vae, cells)
    x = measured
    for _ in range(_FILLING_ROUNDS):
        mu_z, _logvar_z = vae.encode(x, context)
        x = torch.where(observed, measured, vae.decode(mu_z, context, library))
        filled_in = x[:, ~observed]
        if source.scaled_to is None and source.library_is_sum:
            library = cells.library + filled_in.sum(-1, keepdim=True)
        elif source.scaled_to is not None:
            share = (filled_in.expm1().sum(-1, keepdim=True) / source.scaled_to).clamp(0, _MOST_FILLED_IN)
            measured = torch.where(observed, (cells.x.to_dense().expm1() * (1 - share)).log1p(), 0.0)
    return cells._replace(x=x, library=library)


def filled_library(vae: VAE, source: Source) -> NDArray[np.float32]:
    """Library sizes of all cells, ``(cells,)``, grown by what `fill_in` gives genes that were not measured."""
    found = np.empty(source.n_cells, np.float32)

    def look(cells: Minibatch, here: slice) -> None:
        found[here] = cells.library[:, 0].cpu().numpy()

    _for_chunks(vae, source, np.arange(source.n_cells), look)
    return found


class Filled:
    """A source whose minibatches come with what `fill_in` gives genes that were not measured; as `Source`."""

    def __init__(self, vae: VAE, source: Source):
        self.vae, self.source = vae, source
        self.n_cells, self.n_genes = source.n_cells, source.n_genes
        self.library_is_sum, self.scaled_to = source.library_is_sum, source.scaled_to

    def take(self, rows: Rows) -> Minibatch:
        """Read the cells at these positions, in this order."""
        was_training = self.vae.training
        self.vae.eval()
        with torch.no_grad():
            cells = fill_in(self.vae, self.source.take(rows).to(next(self.vae.parameters()).device), self.source)
        self.vae.train(was_training)
        return cells


def context_of(vae: VAE, minibatch: Minibatch) -> Tensor | None:
    """The minibatch's context as the model takes it: None where the model has no conditions."""
    return minibatch.context if vae.context_dim else None


def false_share(probability: NDArray[np.float64]) -> NDArray[np.float64]:
    """Share of false ones expected among each and those that are surer: the mean of ``1 - probability`` over them.

    Examples
    --------
    >>> false_share(np.array([0.5, 1.0, 0.9])).round(2).tolist()
    [0.2, 0.0, 0.05]
    """
    order, share = np.argsort(-probability, kind="stable"), np.empty(len(probability))
    share[order] = np.cumsum(1 - probability[order]) / np.arange(1, len(order) + 1)
    return share
