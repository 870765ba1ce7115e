"""New cells: z, conditions and library sizes are drawn, decoded, and counts drawn with the likelihood's own noise.

``c ~ reference``, ``z ~ p(z | c)``, ``l ~ p(l | z, c)``, ``x ~ p(x | z, c, l)``. What differs is p(z | c): the prior;
"aggregated", the mean of the posteriors of the cells of fit, ``1/N sum_i q(z | x_i, c_i)``, under which the KL of the
bound is least (Hoffman & Johnson 2016); or a Gaussian mixture fitted to draws from that.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from numpy.typing import NDArray
from scipy import sparse
from scipy.spatial import cKDTree

from celbo.data.schema import Schema
from celbo.errors import UsageError, listed
from celbo.fit.reference import Reference, has_conditions
from celbo.minibatch import Source, in_chunks
from celbo.model.filling import Filled
from celbo.model.vae import VAE, context_of

__all__ = ["SOURCES", "Drawn", "as_reference", "draw_cells", "draw_values", "interpolate", "new_cells"]

SOURCES = ("aggregated", "mixture", "prior")
"""Where z comes from."""

Floats = NDArray[np.float32]

_DENSE = ("real", "log_normalised")
"""Values of which hardly any is 0."""
_CHUNK = 256
"""Cells whose genes are drawn at a time."""
_NEAR = 15
"""Reference cells near z, one of which lends its library size."""
_COMPONENTS = 50
"""Of the mixture, at most."""
_CELLS_OF_COMPONENT = 40
"""Reference cells for each component, at least."""
_CELLS_OF_MIXTURE = 10_000
"""Reference cells that the mixture is fitted to, at most."""


class Drawn(NamedTuple):
    """New cells before their values are drawn."""

    z: Floats
    """``(cells, latent_dim)``."""
    codes: Floats
    """Conditions, ``(cells, conditions)``: the number of a level, or a standardised value."""
    library: Floats
    """``(cells,)``."""
    rows: NDArray[np.intp] | None
    """Of the reference cell that each is drawn around; None where it is around none."""


def draw_cells(
    vae: VAE,
    schema: Schema,
    reference: Reference | None,
    n: int,
    *,
    given: Mapping[str, Any],
    source: str,
    library: float | None,
    sample: bool,
    seed: int,
) -> Drawn:
    """Draw z, conditions and library sizes of new cells.

    Conditions that are not given are those of a reference cell that has the others, so that they come together as they
    do there. The library size is that of the same cell where z is from its posterior, else of one of the 15 reference
    cells of those levels that are nearest to z.

    Parameters
    ----------
    vae, schema, reference
        Of the model. Without a reference only what needs none can be drawn.
    n
        How many cells.
    given
        Conditions and what they are to be.
    source
        One of `SOURCES`.
    library
        Library size of all cells, in place of drawn ones.
    sample
        Whether posteriors have a width; of a plain autoencoder z is mu_z.
    seed
        Of all draws.

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
    rng = np.random.default_rng([seed, 18])
    wanted = _codes_of(schema, given)
    is_given = np.array([condition.name in given for condition in schema.conditions], bool)
    if reference is None:
        if source != "prior" or library is None or not is_given.all():
            raise UsageError(
                "the model keeps no reference cells to draw from; fit it again, and save it with them "
                "(keep_reference=True; --keep-reference), or draw z from the "
                "prior and give every condition and the library size."
            )
        codes = np.tile(wanted, (n, 1))
        return Drawn(_from_prior(vae, schema, codes, rng), codes, np.full(n, library, np.float32), None)
    has_it = np.flatnonzero(has_conditions(reference.conditions, schema, given))
    if not len(has_it):
        asked = ", ".join(f"{name}={value}" for name, value in given.items())
        raise UsageError(
            f"no reference cell has {asked}{' together' if len(given) > 1 else ''}: there is nothing to draw from. Ask "
            "for conditions that were seen in fit (cells that were mapped are no reference), or decode other cells "
            "under them (counterfactual)."
        )
    rows = np.resize(rng.permutation(has_it), n)  # each as often as the others
    codes = reference.conditions[rows]
    codes[:, is_given] = wanted[is_given]
    if source == "prior":
        z = _from_prior(vae, schema, codes, rng)
    else:
        sd = np.exp(0.5 * reference.logvar_z) if sample else np.zeros_like(reference.mu_z)
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
        Of the noise.
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
    """Drawn values as an AnnData that the model itself can read, with ``obsm["z"]``.

    obs has ``library``, the conditions, and the names of the cells they are drawn ``around``, if these are given;
    ``uns["celbo_sample"]`` says how they were drawn.
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
    layers = {} if schema.layer is None else {schema.layer: values.copy()}
    return AnnData(
        X=values,
        obs=obs,
        var=pd.DataFrame(index=list(schema.genes)),
        obsm={"z": drawn.z},
        layers=layers,
        uns={"celbo_sample": dict(how)},
    )


def as_reference(vae: VAE, source: Source, codes: Floats) -> Reference:
    """Where these cells lie, to draw around them; ``codes`` are their conditions, as in `Reference`."""
    parts, filled = [], Filled(vae, source)
    with torch.inference_mode():
        for rows in in_chunks(np.arange(source.n_cells), _CHUNK):
            cells = filled.take(rows)
            mu_z, logvar_z = vae.encode(cells.x, context_of(vae, cells))
            parts.append([part.cpu().numpy() for part in (mu_z, logvar_z, cells.library[:, 0])])
    n, (means, logvars, library) = source.n_cells, (np.concatenate(part) for part in zip(*parts, strict=True))
    return Reference(
        mu_z=means,
        logvar_z=logvars,
        library=library,
        conditions=codes,
        held_out=np.zeros(n, bool),
        labels=np.full(n, -1, np.int32),
        was_read=np.zeros(n, bool),
        readings=np.zeros((n, 0)),
    )


def interpolate(
    vae: VAE, z: Floats, context: torch.Tensor, *, n_points: int, library: float | None
) -> tuple[Floats, Floats, Floats]:
    """Decode means along a line, ``z_t = (1 - t) z_0 + t z_1``, the context likewise in parts.

    Parameters
    ----------
    vae
        The model.
    z
        Its ends, ``(2, latent_dim)``.
    context
        Encoded conditions there, ``(2, context_dim)``.
    n_points
        Points on it, both ends included.
    library
        Library size of all; None for shares.

    Returns
    -------
    tuple
        ``t (points,)``, ``z (points, latent_dim)`` and the means ``(points, genes)``.
    """
    t, device = np.linspace(0, 1, n_points, dtype=np.float32), next(vae.parameters()).device
    share = torch.from_numpy(np.stack([1 - t, t], axis=1))
    along = share @ torch.from_numpy(z)
    with torch.inference_mode():
        means = vae.decode(
            along.to(device),
            (share @ context).to(device) if vae.context_dim else None,
            None if library is None else torch.full((n_points, 1), library, device=device),
        )
    return t, along.numpy(), means.cpu().numpy()


def _codes_of(schema: Schema, given: Mapping[str, Any]) -> Floats:
    """Codes of the conditions given, ``(conditions,)``; of the others anything."""
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
    """Draws from the components that these z, from posteriors of cells of the conditions asked for, belong to.

    The mixture is fitted to draws from the posteriors of all reference cells; the conditions change the components'
    weights.
    """
    from sklearn.mixture import GaussianMixture

    if len(mu_z) < 2:
        raise UsageError("a mixture needs two reference cells at least, and the model has one; draw z elsewhere.")
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
    """A reference cell of the same levels near each z."""
    near = np.empty(len(z), np.intp)
    of_cells, group = np.unique(levels, axis=0, return_inverse=True)
    for number, each in enumerate(of_cells):
        members, here = has_it[(known[has_it] == each).all(1)], np.flatnonzero(group.reshape(-1) == number)
        nearest = cKDTree(mu_z[members]).query(z[here], min(_NEAR, len(members)))[1].reshape(len(here), -1)
        near[here] = members[nearest[np.arange(len(here)), rng.integers(nearest.shape[1], size=len(here))]]
    return near
