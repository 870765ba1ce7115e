"""Draw new cells: conditions, z and library sizes first, then counts with the likelihood's own noise.

``c ~ reference``, ``z ~ p(z | c)``, ``l ~ p(l | z, c)``, ``x ~ p(x | z, c, l)``. There are three sources of z: the
"prior"; "aggregated", the mean of the posteriors of the cells of fit, ``1/N sum_i q(z | x_i, c_i)``, the prior under
which the KL of the bound is smallest (Hoffman & Johnson 2016); and "mixture", a Gaussian mixture fitted to draws from
"aggregated".
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from numpy.typing import NDArray
from scipy import sparse
from scipy.spatial import cKDTree

from celbo.ask.scoring import check_library, doubts_of_values
from celbo.data.schema import Schema
from celbo.errors import UsageError, check_count, check_seed, listed, warn
from celbo.fit.cells import Cells
from celbo.fit.fitted import Fitted
from celbo.fit.reference import Reference, has_conditions
from celbo.kernels.threads import threads
from celbo.minibatch import in_chunks
from celbo.model.vae import VAE
from celbo.streams import Stream, random_stream

__all__ = ["SOURCES", "Drawn", "draw_cells", "draw_values", "interpolate", "new_cells", "sample"]

SOURCES = ("aggregated", "mixture", "prior")
"""Sources of z."""

Floats = NDArray[np.float32]

_DENSE = ("real", "log_normalised")
"""Kinds of values that are hardly ever 0."""
_CHUNK = 256
"""Cells whose genes are drawn together."""
_NEAR = 15
"""Reference cells near z; the library size is that of one of them."""
_COMPONENTS = 50
"""Largest number of components of the mixture."""
_CELLS_OF_COMPONENT = 40
"""Smallest number of reference cells for each component."""
_CELLS_OF_MIXTURE = 10_000
"""Largest number of reference cells that the mixture is fitted to."""


class Drawn(NamedTuple):
    """New cells before their values are drawn."""

    z: Floats
    """``(cells, latent_dim)``."""
    codes: Floats
    """Conditions, ``(cells, conditions)``: the number of a level, or a standardised value."""
    library: Floats
    """``(cells,)``."""
    rows: NDArray[np.intp] | None
    """Row of the reference cell that each new cell is drawn around; None where z is from elsewhere."""


def sample(
    fitted: Fitted,
    n: int,
    *,
    conditions: Mapping[str, Any] | None = None,
    source: str = "aggregated",
    around: Cells | None = None,
    library: float | None = None,
    seed: int = 0,
) -> AnnData:
    """Draw new cells; see `celbo.ExpressionVAE.sample`."""
    check_count("n", n, 1)
    seed = check_seed(seed)
    check_library(fitted, library)
    names = None
    if around is not None:
        if source != "aggregated":
            raise UsageError(f"source={source!r} and around exclude each other: around gives the cells that z is from.")
        names = around.obs.index
        fitted = replace(fitted, reference=_as_reference(around))
    with threads(fitted.threads):
        drawn = draw_cells(fitted, int(n), given=conditions or {}, source=source, library=library, seed=seed)
        values = draw_values(fitted.vae, fitted.schema, drawn, seed=seed)
    return new_cells(fitted.schema, drawn, values, names, {"source": source, "seed": seed})


def draw_cells(
    fitted: Fitted,
    n: int,
    *,
    given: Mapping[str, Any],
    source: str,
    library: float | None,
    seed: int,
) -> Drawn:
    """Draw z, conditions and library sizes of new cells.

    Conditions that are not given come from a reference cell that has the given ones, so that conditions occur together
    as they do in the reference. The library size comes from the same cell if z is from its posterior; else it comes
    from one of the 15 reference cells of these levels that are nearest to z.

    Parameters
    ----------
    fitted
        The model. Without reference cells, only z from the prior can be drawn, with everything else given.
    n
        How many cells.
    given
        Conditions and their values.
    source
        One of `SOURCES`.
    library
        Library size of all cells, in place of drawn ones.
    seed
        Seed of all random draws.

    Returns
    -------
    Drawn

    Raises
    ------
    UsageError
        If no reference cell has these conditions, or there is no reference where one is needed.
    """
    if source not in SOURCES:
        raise UsageError(f"source={source!r}: z is drawn from one of {listed(SOURCES)}.")
    vae, schema, reference = fitted.vae, fitted.schema, fitted.reference
    rng = random_stream(seed, Stream.SAMPLE)
    wanted = _codes_of(schema, given)
    is_given = np.array([condition.name in given for condition in schema.conditions], bool)
    if reference is None:
        if source != "prior" or library is None or not is_given.all():
            raise UsageError(
                "the model keeps no reference cells to draw from. Fit the model again, and save it with them "
                "(keep_reference=True; --keep-reference); or draw z from the prior, and give every condition and the "
                "library size."
            )
        codes = np.tile(wanted, (n, 1))
        return Drawn(_from_prior(vae, schema, codes, rng), codes, np.full(n, library, np.float32), None)
    has_it = np.flatnonzero(has_conditions(reference.conditions, schema, given))
    if not len(has_it):
        asked = ", ".join(f"{name}={value}" for name, value in given.items())
        raise UsageError(
            f"no reference cell has {asked}{' together' if len(given) > 1 else ''}: there is nothing to draw from. Ask "
            "for conditions that fit saw (mapped cells are not among the reference cells), or decode other cells under "
            "them (counterfactual)."
        )
    rows = np.resize(rng.permutation(has_it), n)  # each equally often
    codes = reference.conditions[rows]
    codes[:, is_given] = wanted[is_given]
    if source == "prior":
        z = _from_prior(vae, schema, codes, rng)
    else:
        has_width = fitted.objective.samples_z
        sd = np.exp(0.5 * reference.logvar_z) if has_width else np.zeros_like(reference.mu_z)
        z = reference.mu_z[rows] + sd[rows] * rng.standard_normal((n, vae.latent_dim), np.float32)
        if source == "mixture":
            z = _from_mixture(z, reference.mu_z, sd, rng)
    if library is not None:
        libraries = np.full(n, library, np.float32)
    elif source == "aggregated":
        libraries = reference.library[rows]
    else:
        is_level = [condition.levels is not None for condition in schema.conditions]
        levels, known = codes[:, is_level], reference.conditions[:, is_level]
        libraries = reference.library[_near_cells(z, levels, has_it, reference.mu_z, known, rng)]
    return Drawn(z, codes, libraries, rows if source == "aggregated" else None)


def draw_values(vae: VAE, schema: Schema, drawn: Drawn, *, seed: int) -> sparse.csr_matrix | Floats:
    """Draw ``x ~ p(x | z, c, l)``, ``(cells, genes)``: sparse counts, or dense real numbers.

    Parameters
    ----------
    vae, schema
        Of the model.
    drawn
        The cells.
    seed
        Seed of the noise.
    """
    blocks, device = [], next(vae.parameters()).device
    with torch.inference_mode(), torch.random.fork_rng():
        torch.manual_seed(seed)  # not every distribution of torch takes a generator
        for rows in in_chunks(np.arange(len(drawn.z)), _CHUNK):
            context = schema.expand(drawn.codes[rows]).to(device) if vae.context_dim else None
            library = torch.from_numpy(drawn.library[rows, None]).to(device)
            p = vae.likelihood(torch.from_numpy(drawn.z[rows]).to(device), context=context, library=library)
            values = p.sample().cpu().numpy()
            blocks.append(values if schema.values in _DENSE else sparse.csr_matrix(values))
    return np.concatenate(blocks) if schema.values in _DENSE else sparse.vstack(blocks, format="csr")


def new_cells(
    schema: Schema, drawn: Drawn, values: sparse.csr_matrix | Floats, around: pd.Index | None, how: Mapping[str, Any]
) -> AnnData:
    """Make an AnnData of drawn values that the model itself can read, with ``obsm["z"]``.

    Files cannot hold a layer with a slash in its name, so the values of such a layer are in X alone.
    obs has ``library``, the conditions, and the names of the cells that the new cells are drawn ``around``, if given.
    ``uns["celbo_sample"]`` says how the cells were drawn.
    """
    index = pd.Index([f"sample_{number}" for number in range(len(drawn.z))])
    obs = pd.DataFrame({"library": drawn.library} if schema.values not in _DENSE else {}, index=index)
    for condition, codes in zip(schema.conditions, drawn.codes.T, strict=True):
        if condition.levels is None:
            obs[condition.name] = codes.astype(np.float64) * condition.sd + condition.mean
        else:
            obs[condition.name] = pd.Categorical.from_codes(codes.astype(int), list(condition.levels))
    if schema.size_factor is not None:
        obs[schema.size_factor] = drawn.library / schema.library_scale
    if around is not None:
        obs["around"] = around[drawn.rows].astype(str)
    layers = {} if schema.layer is None or "/" in schema.layer else {schema.layer: values.copy()}
    if schema.layer is not None and not layers:
        warn(
            f"the drawn values are in X alone: anndata cannot read a layer with a slash in its name, {schema.layer!r}. "
            f"To ask this model about drawn cells in Python, set drawn.layers[{schema.layer!r}] = drawn.X."
        )
    return AnnData(
        X=values,
        obs=obs,
        var=pd.DataFrame(index=list(schema.genes)),
        obsm={"z": drawn.z},
        layers=layers,
        uns={"celbo_sample": dict(how)},
    )


def _as_reference(cells: Cells) -> Reference:
    """Use these cells as the reference, to draw around them."""
    n, encoded = len(cells), cells.encoded
    return Reference(
        mu_z=encoded.mu_z,
        logvar_z=encoded.logvar_z,
        library=encoded.library,
        conditions=cells.codes,
        held_out=np.zeros(n, bool),
        labels=np.full(n, -1, np.int32),
        was_read=np.zeros(n, bool),
        readings=np.zeros((n, 0)),
        surprise=np.zeros(n, np.float32),
        absent_level=np.full(n, -1, np.int32),
    )


def interpolate(
    fitted: Fitted,
    ends: Sequence[Cells],
    *,
    n_points: int = 11,
    given: Mapping[str, Any] | None = None,
    library: float | None = None,
) -> AnnData:
    """Decode means along the line ``z_t = (1 - t) z_0 + t z_1``; see `celbo.ExpressionVAE.interpolate`.

    The context goes from that of the first end to that of the second in the same proportions.
    """
    if not isinstance(n_points, int | np.integer) or n_points < 2:
        raise UsageError(f"n_points={n_points!r}; a line has at least its 2 ends.")
    check_library(fitted, library)
    vae = fitted.vae
    z = np.stack([cells.encoded.mu_z.mean(0) for cells in ends])
    context = torch.stack([cells.schema.encode(cells.obs, given).mean(0) for cells in ends])
    for doubt in doubts_of_values(fitted.schema, given or {}):
        warn(doubt)
    t, device = np.linspace(0, 1, n_points, dtype=np.float32), next(vae.parameters()).device
    share = torch.from_numpy(np.stack([1 - t, t], axis=1))
    along = share @ torch.from_numpy(z)
    with threads(fitted.threads), torch.inference_mode():
        means = vae.decode(
            along.to(device),
            (share @ context).to(device) if vae.context_dim else None,
            None if library is None else torch.full((int(n_points), 1), library, device=device),
        )
    obs = pd.DataFrame({"position": t.astype(float)}, index=[f"point_{number}" for number in range(len(t))])
    genes = pd.DataFrame(index=list(fitted.schema.genes))
    return AnnData(X=means.cpu().numpy(), obs=obs, var=genes, obsm={"z": along.numpy()})


def _codes_of(schema: Schema, given: Mapping[str, Any]) -> Floats:
    """Codes of the given conditions, ``(conditions,)``; the codes of the other conditions have no meaning."""
    any_cell = {c.name: [c.mean if c.levels is None else c.levels[0]] for c in schema.conditions}
    return schema.codes(pd.DataFrame(any_cell, index=["0"]), given)[0]


def _from_prior(vae: VAE, schema: Schema, codes: Floats, rng: np.random.Generator) -> Floats:
    device = next(vae.parameters()).device
    with torch.inference_mode(), torch.random.fork_rng():
        torch.manual_seed(int(rng.integers(2**31)))
        like = torch.empty(len(codes), vae.latent_dim, device=device)
        components = vae.prior_components(like, schema.expand(codes).to(device) if vae.context_dim else None)
        p = components.distribution()
        drawn = p.sample() if p.batch_shape[0] == len(codes) else p.sample(torch.Size([len(codes)]))[:, 0]
    z: Floats = drawn.cpu().numpy()
    return z


def _from_mixture(z: Floats, mu_z: Floats, sd: Floats, rng: np.random.Generator) -> Floats:
    """Draw from the mixture components to which these z belong; z is from posteriors of cells with the conditions.

    The mixture is fitted to draws from the posteriors of all reference cells. The conditions change only the weights of
    its components.
    """
    from sklearn.mixture import GaussianMixture

    if len(mu_z) < 2:
        raise UsageError(
            "a mixture needs at least two reference cells, and the model has one; use another source of z."
        )
    rows = rng.permutation(len(mu_z))[:_CELLS_OF_MIXTURE]
    learned = mu_z[rows] + sd[rows] * rng.standard_normal((len(rows), mu_z.shape[1]))
    size = int(np.clip(len(rows) // _CELLS_OF_COMPONENT, 1, _COMPONENTS))
    mixture = GaussianMixture(size, reg_covar=1e-4, init_params="k-means++", random_state=int(rng.integers(2**31)))
    mixture.fit(learned.astype(np.float64))
    share = mixture.predict_proba(z.astype(np.float64)).cumsum(1)
    component = (rng.random((len(z), 1)) > share[:, :-1]).sum(1)
    noise = np.einsum("nij,nj->ni", np.linalg.cholesky(mixture.covariances_)[component], rng.standard_normal(z.shape))
    return (mixture.means_[component] + noise).astype(np.float32)


def _near_cells(
    z: Floats, levels: Floats, has_it: NDArray[np.intp], mu_z: Floats, known: Floats, rng: np.random.Generator
) -> NDArray[np.intp]:
    """Choose a reference cell of the same levels near each z."""
    near = np.empty(len(z), np.intp)
    of_cells, group = np.unique(levels, axis=0, return_inverse=True)
    for number, levels_of_group in enumerate(of_cells):
        members = has_it[(known[has_it] == levels_of_group).all(1)]
        rows = np.flatnonzero(group.reshape(-1) == number)
        nearest = cKDTree(mu_z[members]).query(z[rows], min(_NEAR, len(members)))[1].reshape(len(rows), -1)
        near[rows] = members[nearest[np.arange(len(rows)), rng.integers(nearest.shape[1], size=len(rows))]]
    return near
