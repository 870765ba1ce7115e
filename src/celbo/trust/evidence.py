"""Evidence about a fitted model: measured on cells, each encoded once, and compared with simpler models."""

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from celbo.fit.cells import Cells
from celbo.fit.fitted import Fitted
from celbo.fit.reference import MOST_KEPT
from celbo.fit.train import usual_epochs
from celbo.minibatch import Rows, in_chunks, scipy_csr
from celbo.model.ablation import sensitivity, use_of_latent
from celbo.model.inference import CHUNK, Encoded, cell_terms
from celbo.model.information import ANCHORS
from celbo.streams import Stream, random_stream
from celbo.trust.advice import Evidence, Settings
from celbo.trust.overlap import COMPONENTS, Overlap, choose_levels, overlap_of
from celbo.trust.simpler import (
    expected_dim,
    gene_mean_log_prob,
    principal_component_log_prob,
    principal_components,
    read_sample,
)

__all__ = ["dispersion_of_simpler", "gather", "overlaps", "settings_of"]

_CELLS_TO_LEARN_FROM = 3000
"""Training cells from which simpler models learn."""
_CELLS_FOR_SENSITIVITY = 500
_COMPONENTS_FOR_TYPES = 30
"""Principal components in which the neighbours of a cell are looked for."""


def gather(
    fitted: Fitted,
    cells: Cells,
    rows: Rows,
    training: Rows,
    *,
    types: NDArray[np.str_] | None = None,
    seed: int = 0,
) -> Evidence:
    """Measure a model on some cells.

    Parameters
    ----------
    fitted, cells
        The model, and cells opened for it.
    rows
        Positions of the cells to measure on; best held-out cells.
    training
        Positions of the cells from which simpler models learn.
    types
        Known types, ``(rows,)``.
    seed
        Seed of all draws.
    """
    vae, source, likelihood = fitted.vae, cells.source, fitted.likelihood
    settings, schema = settings_of(fitted), fitted.schema
    learned, few = _choose(training, _CELLS_TO_LEARN_FROM, seed), _choose(rows, _CELLS_FOR_SENSITIVITY, seed)
    anchors = _choose(np.union1d(rows, training), ANCHORS, seed)
    encoded_rows = np.union1d(rows, anchors)
    encoded = cells.encoded_at(encoded_rows)

    def encoded_at(wanted: Rows) -> Encoded:
        return encoded.at(np.searchsorted(encoded_rows, wanted))

    terms = cell_terms(vae, source, rows, seed=seed, objective=fitted.objective)
    contexts = (source.contexts(piece)[:, : vae.context_dim].numpy() for piece in in_chunks(rows, CHUNK))
    use = use_of_latent(
        vae,
        source,
        rows,
        known=(encoded_at(rows), sparse.vstack([sparse.csr_matrix(part) for part in contexts], format="csr")),
        by_dimension=True,
        of_context=schema.context_columns,
        sample=fitted.objective.samples_z,
        seed=seed,
    )
    n_parts = 1 + vae.latent_dim
    names = [condition.name for condition in schema.conditions]
    evidence = Evidence(
        mu_z=use.mu_z,
        logvar_z=use.logvar_z,
        anchors=encoded_at(anchors)[:2],
        kl=terms.kl,
        lost=use.lost[:n_parts],
        elbo=terms.elbo,
        reconstruction=terms.reconstruction,
        gene_means=gene_mean_log_prob(source, rows, training, likelihood, dispersion_of_simpler(settings)),
        components=None,
        expected_dim=None,
        sensitivity=sensitivity(vae, source, few, encoded=encoded_at(few)),
        lost_by_condition={name: lost[~np.isnan(lost)] for name, lost in zip(names, use.lost[n_parts:], strict=True)},
        conditions={
            condition.name: codes if condition.levels is None else codes.astype(int)
            for condition, codes in zip(schema.conditions, cells.codes[rows].T, strict=True)
        },
        types=types,
        level_names={each.name: each.levels for each in schema.conditions if each.levels is not None},
        overlaps=overlaps(fitted, cells, seed=seed),
        settings=settings,
    )
    if not len(learned) > 2 * vae.latent_dim < source.n_genes or not cells.measured.all():
        return evidence  # too little to learn from, or genes are missing
    sample = read_sample(source, learned, is_counts=fitted.is_counts)
    dispersion = dispersion_of_simpler(settings)
    return evidence._replace(
        components=principal_component_log_prob(source, rows, sample, likelihood, vae.latent_dim, dispersion),
        expected_dim=expected_dim(sample),
        principal=None if types is None else principal_components(source, rows, sample, _COMPONENTS_FOR_TYPES),
    )


def overlaps(fitted: Fitted, cells: Cells, *, seed: int = 0) -> list[Overlap]:
    """Compare the levels of each categorical nuisance on at most 4,000 cells; see `celbo.trust.overlap`.

    Genes without a value in a whole level are left out: they may not be measured there. The cells keep the result,
    because a fit asks for it and the diagnosis of its run again.
    """
    name = f"overlaps, seed {seed}"
    if name not in cells.kept:
        cells.kept[name] = _overlaps(fitted, cells, seed)
    kept: list[Overlap] = cells.kept[name]
    return kept


def _overlaps(fitted: Fitted, cells: Cells, seed: int) -> list[Overlap]:
    found, schema = [], fitted.schema
    everywhere = cells.measured if schema.absent is None else cells.measured & ~schema.absent.masks(schema.genes).any(0)
    for condition, column in zip(schema.conditions, cells.codes.T, strict=True):
        if condition.levels is None or not condition.nuisance or everywhere.sum() <= COMPONENTS:
            continue
        codes = np.where(cells.empty, -1, column).astype(np.intp)
        rows = choose_levels(codes, seed=seed)
        if len(rows):
            x = sparse.vstack([scipy_csr(cells.source.take(piece).x) for piece in in_chunks(rows, CHUNK)], format="csr")
            x = x[:, everywhere & _in_all_levels(x, codes[rows])]
            if x.shape[1] <= COMPONENTS:
                continue
            name, levels, is_counts = condition.name, condition.levels, fitted.is_counts
            found.append(overlap_of(name, x, codes[rows], levels, is_counts=is_counts, seed=seed))
    return found


def _in_all_levels(x: "sparse.csr_matrix", codes: NDArray[np.intp]) -> NDArray[np.bool_]:
    """Return which genes have a value other than 0 in each level, ``(genes,)``: the others may not be measured."""
    levels = np.unique(codes, return_inverse=True)[1]
    of_level = sparse.csr_matrix((np.ones(len(levels)), (levels, np.arange(len(levels)))))
    has_value: NDArray[np.bool_] = np.all((of_level @ (x != 0)).toarray() > 0, axis=0)
    return has_value


def settings_of(fitted: Fitted) -> Settings:
    """Collect the options of a model on which advice depends."""
    options = fitted.architecture
    decoder_dims = options.hidden_dims if options.decoder_dims is None else options.decoder_dims
    return Settings(
        likelihood=fitted.likelihood.name,
        objective=fitted.objective.name,
        warmup_fraction=fitted.config.warmup_fraction,
        remedies=fitted.remedies,
        nuisance=tuple(condition.name for condition in fitted.schema.conditions if condition.nuisance),
        beta=fitted.recipe.beta,
        kl_weight=fitted.history[-1].kl_weight,
        n_hidden=(len(options.hidden_dims), len(decoder_dims)),
        dispersion=options.dispersion,
        norm=options.norm,
        norm_mu=options.norm_mu,
        prior=options.prior,
        epochs=len(fitted.history),
        planned_epochs=_planned_epochs(fitted),
    )


def _planned_epochs(fitted: Fitted) -> int:
    """Epochs of a default plan; 0 if training came to its own end, or how many cells it had is not known."""
    most = fitted.config.max_epochs
    came_to_its_end = not fitted.stopped and (most is None or len(fitted.history) < most)
    n_training = 0 if fitted.reference is None else int((~fitted.reference.held_out).sum())
    if came_to_its_end or not 0 < n_training < MOST_KEPT:  # a full reference does not have all training cells
        return 0
    return usual_epochs(n_training, fitted.config)


def dispersion_of_simpler(settings: Settings) -> str:
    """Return the dispersion of the simpler models: by gene, unless the model's is fixed."""
    return "fixed" if settings.dispersion == "fixed" else "gene"


def _choose(rows: Rows, most: int, seed: int) -> Rows:
    """Choose at most ``most`` of these cells at random; the result is sorted."""
    return np.sort(random_stream(seed, Stream.EVIDENCE).permutation(rows)[:most])
