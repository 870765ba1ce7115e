"""ExpressionVAE, for people with an AnnData: it joins data, model, training and files, and does little itself."""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from numpy.typing import NDArray

from celbo import checkpoint
from celbo.ask.counterfactual import Counterfactual, carry, changed_genes, decode_under
from celbo.ask.differential import add_up, contrast, group_cells, of_genes
from celbo.ask.generate import as_reference, draw_cells, draw_values, interpolate, new_cells
from celbo.ask.labels import FEWEST_HELD_OUT_LABELLED, Labelled, predictions
from celbo.ask.mapping import at_nearest_levels, copy_weights, doubt_new_levels
from celbo.ask.outliers import FEWEST_HELD_OUT, n_readings, readings, surprising_genes, unusual
from celbo.ask.support import known_cells, n_like, other_levels, support, supported_positions
from celbo.data.checks import Check, check_adata
from celbo.data.conditions import UNLABELLED, as_text, column_of, known_labels
from celbo.data.genes import choose_genes
from celbo.data.read import read_adata
from celbo.data.schema import MOST_COMBINATIONS, Schema
from celbo.data.sources import CellSource, empty_cells, make_source, open_source
from celbo.errors import DataError, ModelFileError, NotFittedError, UsageError, check_count, check_seed, listed
from celbo.fit.reference import Reference, nested_conditions, reference_arrays, reference_from
from celbo.fit.remedies import Recipe, combine, refuse_unfit, remedy_table
from celbo.fit.train import Epoch, Split, Track, TrainConfig, epochs, settle_device, split_cells
from celbo.kernels.threads import threads
from celbo.minibatch import Contexts, Rows, gene_moments
from celbo.model.classifier import calibrate
from celbo.model.filling import Filled
from celbo.model.importance import log_prob
from celbo.model.inference import cell_terms, expected_values, filled_library, posterior
from celbo.model.likelihoods import LIKELIHOODS, Likelihood
from celbo.model.objective import OBJECTIVES, Objective
from celbo.model.vae import VAE, context_of
from celbo.trust.advice import Diagnosis, diagnose
from celbo.trust.evidence import doubts_of_fit, gather

__all__ = ["ExpressionVAE", "History", "load"]

_REFERENCE_CELLS = 50_000
"""Training cells whose posterior is kept with a model."""
_HARDLY_CHANGED = 1e-3
"""Share of all counts that another condition moves at least, where the decoder listens to it."""
_CELLS_TO_DIAGNOSE = 10_000
_CELLS_TO_CALIBRATE = 3000
"""Held-out cells that others are compared with to tell how unusual they are."""
_FEW_SAMPLES = 10
"""Effective importance samples below which an estimate is not to be trusted."""


_FEW_CELLS = 30
"""Cells below which a fit is doubted."""
_MADE_BY_FIT = ("schema_", "vae_", "history_", "split_", "reference_")


class History(list[Epoch]):
    """One `celbo.fit.train.Epoch` per pass over the training cells."""

    def to_frame(self) -> pd.DataFrame:
        """A row per epoch; ``kl_per_dim`` is spread over columns ``kl_0``, ``kl_1``, ..."""
        frame = pd.DataFrame([asdict(epoch) for epoch in self]).drop(columns="kl_per_dim")
        kl = pd.DataFrame([epoch.kl_per_dim for epoch in self]).add_prefix("kl_")
        return pd.concat([frame, kl], axis=1)


@dataclass(kw_only=True, eq=False)
class ExpressionVAE:
    """A variational autoencoder of the counts in an AnnData.

    Making one stores options; `fit` learns. What fitting makes ends in an underscore: ``schema_`` (genes and
    conditions), ``vae_`` (the `celbo.VAE`), ``history_`` (a record per epoch). Cells given later are aligned to the
    model's genes by name. No counts are kept, and no AnnData is changed.

    Examples
    --------
    >>> import celbo
    >>> adata = celbo.simulate_cells(n_cells=200, n_genes=50, seed=0)
    >>> model = celbo.ExpressionVAE(latent_dim=4, train=celbo.TrainConfig(max_epochs=5)).fit(adata)
    >>> adata.obsm["X_celbo"] = model.embed(adata)
    >>> adata.obsm["X_celbo"].shape
    (200, 4)
    """

    latent_dim: int = 10
    """Width of z."""
    hidden_dims: Sequence[int] = (128,)
    """Widths of the encoder's hidden layers; the decoder has them in reverse."""
    likelihood: str = "nb"
    """A name in `celbo.LIKELIHOODS`."""
    conditions: Sequence[str] = ()
    """Columns of obs given to the model: floating-point ones are continuous, others categorical."""
    nuisance: Sequence[str] = ()
    """More such columns, which are to be removed (batch, donor): what z tells of them is a fault, and where they turn
    out to do nothing, all the better. Of ``conditions`` one wants to ask."""
    n_top_genes: int | None = None
    """Genes to model: the most variable, chosen within levels of the first categorical nuisance or condition; None for
    all."""
    labels: str | None = None
    """Column of obs with labels (cell types) that `predict` is to tell, known of some cells: they pull z apart."""
    unlabelled: str = UNLABELLED
    """What that column reads where the label is not known; a missing value says the same."""
    layer: str | None = None
    """Layer that holds the values; None for X."""
    allow_noninteger: bool = False
    """Let estimated counts through, which need not be whole."""
    size_factor: str | None = None
    """Column of obs used in place of the sum of counts."""
    dispersion: str = "gene"
    """What theta of a negative binomial depends on: "gene", "gene-condition" or "gene-cell"."""
    objective: str = "vae"
    """A name in `celbo.model.objective.OBJECTIVES`: "vae", or "autoencoder" (no KL, z = mu_z)."""
    encode_context: bool = True
    """Whether the encoder sees the conditions too."""
    skip: bool = False
    """Give z and the conditions to every layer of the decoder."""
    norm: str = "layer"
    """Normalisation of hidden layers: "none", "layer" or "batch"."""
    dropout: float = 0.2
    """Share of hidden units zeroed in training."""
    decoder_dims: Sequence[int] | None = None
    """Widths of the decoder's hidden layers; None for the encoder's in reverse, empty for a linear decoder."""
    decoder_dropout: float | None = None
    """Dropout of the decoder; None for that of the encoder."""
    context_skip: bool = False
    """Give the conditions alone to every layer of the decoder."""
    norm_mu: bool = False
    """Normalise the posterior means over cells; see `celbo.model.vae.NormMu`."""
    interactions: Sequence[str] = ()
    """Pairs of conditions whose combinations do more than their parts: "batch:treatment". Two levels that were never
    seen together do no more."""
    embedding_dim: int = 10
    """Learned numbers in place of the levels of a condition that has more than 50, and of each combination of two."""
    prior: str = "normal"
    """A name in `celbo.model.priors.PRIORS`: "normal", "conditional", "mixture:20", "vamp:100"."""
    remedies: Sequence[str] = ()
    """Names in `celbo.REMEDIES`, with a number after a colon where they take one: "cyclical", "free_bits:0.1". What
    they say of the model goes before the options above."""
    train: TrainConfig = TrainConfig()
    """How to train."""

    schema_: Schema = field(init=False, repr=False)
    vae_: VAE = field(init=False, repr=False)
    history_: History = field(init=False, repr=False)
    split_: Split = field(init=False, repr=False)
    reference_: Reference | None = field(init=False, repr=False)

    def fit(self, adata: AnnData | str | Path, *, track: Track | None = None) -> "ExpressionVAE":
        """Learn from these cells.

        Parameters
        ----------
        adata
            Cells with raw counts, or the path of an ``.h5ad`` file or ``.zarr`` folder of them.
        track
            Watches the minibatches of each epoch go by; see `celbo.fit.train.epochs`.

        Returns
        -------
        ExpressionVAE
            The model itself.

        Raises
        ------
        DataError
            If genes, values or conditions cannot be used; nothing is trained then.
        DivergedError
            If training left the numbers and could not come back.
        """
        objective, recipe = self._objective(), self.recipe()
        if not isinstance(self.train, TrainConfig):
            raise UsageError(f"train is a {type(self.train).__name__}; give a celbo.TrainConfig.")
        device = settle_device(self.train.device)
        adata = read_adata(adata, layer=self.layer)
        check = self.check(adata)
        schema = check.accept()
        if self.n_top_genes is not None and check.stored is not None:
            schema = choose_genes(schema, check.stored, adata.obs, self.n_top_genes)
        source = make_source(check, adata, schema)
        if self.labels is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the check has said it
                labels, source.labels = known_labels(column_of(adata.obs, self.labels), self.unlabelled)
            schema = replace(schema, labels=labels)
        split = self._split(schema, adata)

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.train.seed)
            vae = self._make_vae(schema)
        vae.head.initialise(vae.fc_out, gene_moments(source, split.train))
        if vae.prior_size:
            start = source.take(np.random.default_rng([self.train.seed, 11]).permutation(split.train)[: vae.prior_size])
            vae.start_prior(start.x, context_of(vae, start))
        vae.to(device)
        config = self.train
        if self.objective == "autoencoder":  # no KL, so nothing to warm up, and every epoch counts
            config = replace(config, warmup_fraction=0.0)
        with threads(config.threads):
            self.history_ = History(epochs(vae, source, split, config, objective=objective, recipe=recipe, track=track))
        self.schema_, self.vae_, self.split_ = schema, vae.eval(), split
        self.reference_ = self._refer(adata, source)
        if vae.classifier is not None:
            held_out = self.reference_.held_out
            calibrate(vae.classifier, self.reference_.mu_z[held_out], self.reference_.labels[held_out])
        with threads(config.threads):
            doubts = doubts_of_fit(
                vae,
                source,
                split.validation if len(split.validation) >= 2 else split.train,
                split.train,
                self._likelihood(),
                objective=objective,
                conditions=schema.conditions,
                columns=schema.context_columns,
                settings=self._settings(),
                seed=config.seed,
            )
        for doubt in doubts:
            warnings.warn(doubt, stacklevel=2)
        return self

    def check(self, adata: AnnData | str | Path) -> Check:
        """Look at cells that this model is to be fitted to, as `fit` does first; nothing is trained.

        Returns
        -------
        celbo.data.Check
            What was found: ``problems``, each with a name, a severity and a message.

        Examples
        --------
        >>> import celbo, numpy, anndata
        >>> check = celbo.ExpressionVAE().check(anndata.AnnData(numpy.array([[0.5, 1.0]])))
        >>> check.errors[0].name
        'not-whole'
        """
        likelihood = self._likelihood()
        if self.labels is not None and self.labels in (*self.conditions, *self.nuisance):
            raise UsageError(
                f"{self.labels!r} is a condition and the column of labels; z cannot be told what it is to tell."
            )
        if self.n_top_genes is not None and (
            not isinstance(self.n_top_genes, int | np.integer) or self.n_top_genes < 1
        ):
            raise UsageError(f"n_top_genes={self.n_top_genes!r}; give a whole number of at least 1, or None for all.")
        adata = read_adata(adata, layer=self.layer)
        check = check_adata(
            adata,
            values=likelihood.values,
            conditions=self.conditions,
            nuisance=self.nuisance,
            layer=self.layer,
            size_factor=self.size_factor,
            allow_noninteger=self.allow_noninteger,
        )
        if self.n_top_genes is not None and check.schema is not None and check.schema.values == "real":
            raise UsageError(f"n_top_genes={self.n_top_genes} needs counts; choose genes of real numbers beforehand.")
        if check.schema is not None:
            check.schema.pairs(self.interactions)
            categorical = [condition for condition in check.schema.conditions if condition.levels is not None]
            if any(text.startswith("match_levels") for text in self.remedies) and not categorical:
                raise UsageError("remedy 'match_levels' needs a condition or a nuisance of two levels or more.")
            if check.n_cells < _FEW_CELLS:
                check.add(
                    "few-cells", "warning", f"only {check.n_cells} cells: hardly anything can be learned from so few."
                )
            codes = check.schema.codes(adata.obs)
            asked = [each.name for each in check.schema.conditions if not each.nuisance]
            for name in nested_conditions(codes, check.schema, asked):
                rest = listed(each.name for each in check.schema.conditions if each.name != name)
                check.add(
                    "nested",
                    "warning",
                    f"condition {name!r} is nested in the others ({rest}): what it does cannot be "
                    "told from what they do.",
                )
        if self.labels is not None:
            self._check_labels(check, adata.obs)
        return check

    def embed(
        self, adata: AnnData | str | Path, *, unseen: str = "refuse", genes_present: float = 0.8
    ) -> NDArray[np.float32]:
        """Posterior means of z, ``(cells, latent_dim)``: the latent space. Options are those of `posterior`."""
        return self.posterior(adata, unseen=unseen, genes_present=genes_present)[0]

    def posterior(
        self, adata: AnnData | str | Path, *, unseen: str = "refuse", genes_present: float = 0.8
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Where each cell lies in the latent space, and how surely: mean and standard deviation of q(z | x, c).

        Parameters
        ----------
        adata
            The cells.
        unseen
            What to do with levels of conditions that fit did not see: "refuse" them, read them as the "nearest" known
            level (under which their cells have the highest ELBO), as all levels of fit in equal parts ("marginal"), or
            "adapt": learn weights for them from these cells (`map_query`).
        genes_present
            Share of the model's genes that must be there; the model fills in the rest by what it expects of them.

        Returns
        -------
        tuple
            ``mu_z`` and ``sd_z``, each ``(cells, latent_dim)``; of a plain autoencoder sd_z is 0.
        """
        schema = self.schema_
        adata = read_adata(adata, layer=schema.layer)
        model, source = self._open(adata, unseen, genes_present)
        with threads(self.train.threads):
            mu_z, logvar_z = posterior(model.vae_, source)
        return mu_z, np.exp(0.5 * logvar_z) * self._has_width

    def elbo(self, adata: AnnData | str | Path, *, seed: int = 0) -> pd.DataFrame:
        """Evidence lower bound of each cell and its terms, in nats, with one sample of z, by its place among the cells.

        Another seed, or another order of the cells, draws another z; the bound is the mean over draws.

        Returns
        -------
        pandas.DataFrame
            By cell: ``elbo = reconstruction - kl``, and ``kl_0``, ``kl_1``, ... which sum to ``kl``.
        """
        check_seed(seed)
        adata = read_adata(adata, layer=self.schema_.layer)
        source = self._source(adata)
        with threads(self.train.threads):
            terms = cell_terms(self.vae_, source, seed=seed, objective=self._objective())
        kl = pd.DataFrame(terms.kl, index=adata.obs_names).add_prefix("kl_")
        kl.insert(0, "elbo", terms.elbo)
        kl.insert(1, "reconstruction", terms.reconstruction)
        kl.insert(2, "kl", terms.kl.sum(1))
        return kl

    def log_prob(
        self,
        adata: AnnData | str | Path,
        *,
        n_samples: int = 500,
        refine: bool = False,
        unseen: str = "refuse",
        genes_present: float = 0.8,
        seed: int = 0,
    ) -> pd.DataFrame:
        """How likely each cell is: log p(x | library, conditions), by importance weighting, in nats.

        ``log mean_k p(x | z_k, c, l) p(z_k | c) / r(z_k)`` over ``n_samples`` draws (Burda 2016) from r, a mixture of
        the widened posterior and the prior (`celbo.model.importance.log_prob`). The library size is given, so this is
        a density given the total. A cell has the same figure whichever other cells are asked about, unless ``unseen``
        is "nearest" or "adapt".

        Parameters
        ----------
        adata
            The cells.
        n_samples
            Draws of z for each cell.
        refine
            Whether to fit each cell's posterior by itself first, which takes longer: models are only compared so.
        unseen, genes_present
            As `posterior` takes them.
        seed
            Of the draws.

        Returns
        -------
        pandas.DataFrame
            By cell: ``log_p``; ``se``, its standard error ``sqrt(1 / ess - 1 / n_samples)``; ``ess``, the effective
            number of draws; ``trusted``: whether that is 10 at least. With ``refine`` also ``unrefined``, the figure of
            the encoder's own posterior, and ``gap``, what the encoder costs: the first less this one. NaN of a cell
            without a count. Without ``refine`` estimates lean low where few draws are effective, by more than ``se``.

        Raises
        ------
        UsageError
            If the model is a plain autoencoder, which has no p(x).

        Examples
        --------
        >>> import celbo
        >>> adata = celbo.simulate_cells(n_cells=200, n_genes=50, seed=0)
        >>> model = celbo.ExpressionVAE(latent_dim=2, train=celbo.TrainConfig(max_epochs=5)).fit(adata)
        >>> model.log_prob(adata[:3]).columns.tolist()
        ['log_p', 'se', 'ess', 'trusted']
        """
        check_count("n_samples", n_samples, 2)
        check_seed(seed)
        adata = read_adata(adata, layer=self.schema_.layer)
        self._refuse_autoencoder()
        model, source = self._open(adata, unseen, genes_present)
        with threads(self.train.threads):
            found = plain = log_prob(model.vae_, source, n_samples=n_samples, refine_steps=0, seed=seed)
            if refine:
                found = log_prob(model.vae_, source, n_samples=n_samples, seed=seed)
        table = {**found._asdict(), "trusted": found.ess >= _FEW_SAMPLES}
        if refine:
            table |= {"unrefined": plain.log_p, "gap": found.log_p - plain.log_p}
        frame = pd.DataFrame(table, index=adata.obs_names)
        empty = empty_cells(adata, model.schema_)
        frame.loc[empty, frame.columns != "trusted"] = np.nan
        frame.loc[empty, "trusted"] = False
        return frame

    def outliers(
        self, adata: AnnData | str | Path, *, unseen: str = "refuse", genes_present: float = 0.8, seed: int = 0
    ) -> pd.DataFrame:
        """How unusual each cell is, beside cells of its depth and batch that were held out of fitting.

        Four readings are taken of a cell: ``-log p(x)``, its distance in the latent space to cells learned from, and
        how much better two known profiles together, or the mean of all, explain its counts than its own does. They are
        standardised given log library size and batch, joined (Fisher 1925), and compared with those of held-out cells.

        Parameters
        ----------
        adata
            The cells.
        unseen, genes_present
            As `posterior` takes them.
        seed
            Of the draws.

        Returns
        -------
        pandas.DataFrame
            By cell: ``log_p``, as `log_prob` estimates it from few draws; ``score``, high where a cell is unusual;
            ``p_value`` and ``q_value``; ``kind``: "usual" (q above .1), "doublet-like", "ambient-like", "unseen type",
            "unexplained", after the reading that stands out most, or "low-depth"; the standardised readings
            ``unlikely, distance, mixture, ambient``; and ``top_genes``, + where more of them than expected was seen.
            Where cells lack genes of the model, log p(x) is of the others, and ``unlikely`` does not count (NaN). A
            cell without a count is "empty", and has NaN.

        Raises
        ------
        UsageError
            If the model keeps no reference cells, fewer than 30 were held out, or it is a plain autoencoder.

        Examples
        --------
        >>> import celbo
        >>> adata = celbo.simulate_cells(n_cells=500, n_genes=80, seed=0)
        >>> model = celbo.ExpressionVAE(latent_dim=3, train=celbo.TrainConfig(max_epochs=20)).fit(adata)
        >>> found = model.outliers(adata[:50])
        >>> found["p_value"].between(0, 1).all()
        np.True_
        """
        schema = self.schema_
        check_seed(seed)
        adata = read_adata(adata, layer=schema.layer)
        self._refuse_autoencoder()
        if self.reference_ is None:
            raise UsageError(
                "the model keeps no reference cells, with which others could be compared; fit it again, and save it "
                "with them (keep_reference=True; --keep-reference)."
            )
        known = self.reference_.was_read
        if known.sum() < FEWEST_HELD_OUT:
            raise UsageError(
                f"{known.sum()} cells were held out of fitting and read; at least {FEWEST_HELD_OUT} are needed to tell "
                "what is usual. Fit again with more cells or a larger validation_fraction."
            )
        model, source = self._open(adata, unseen, genes_present)
        rows = np.arange(source.n_cells)
        is_level = [condition.levels is not None for condition in schema.conditions]
        codes = np.vstack([self.reference_.conditions[known], source.codes])[:, is_level]
        batch = np.unique(codes, axis=0, return_inverse=True)[1].reshape(-1) if any(is_level) else np.zeros(len(codes))
        with threads(self.train.threads):
            found = model._read_cells(source, rows, self.reference_, seed)
            mu_z, _ = posterior(model.vae_, source)
            library = filled_library(model.vae_, source)
            genes = surprising_genes(model.vae_, source, mu_z, np.array(schema.genes), rows)
        empty = empty_cells(adata, model.schema_)
        table = unusual(
            self.reference_.readings[known],
            found,
            library=(self.reference_.library[known], library),
            batch=(batch[: known.sum()].astype(int), batch[known.sum() :].astype(int)),
            index=adata.obs_names,
            empty=empty,
            without=() if (schema.columns(adata.var_names) >= 0).all() else ("unlikely",),
        )
        return table.assign(top_genes=np.where(empty, "", genes))

    def expected_expression(
        self,
        adata: AnnData | str | Path,
        *,
        given: Mapping[str, Any] | None = None,
        over: Sequence[str] = (),
        library: float | None = None,
    ) -> NDArray[np.float32]:
        """Denoised expression: the mean of p(x | mu_z, c), for each cell and gene of the model.

        Parameters
        ----------
        adata
            The cells.
        given
            Conditions to decode under, the same for all cells: ``{"batch": "A"}`` corrects for batch. The latent of a
            cell always comes from its own conditions.
        over
            Conditions over whose levels to take the mean, each weighing the same: ``["batch"]`` removes its effect
            without making one of the batches the measure. Levels that `map_query` took in are not among them, so that
            what is said of a cell stays the same.
        library
            Library size to decode at, the same for all cells; each cell's own if None. 1 gives expression shares
            (of zinb less than that, by the zeros its gate adds).
            For count likelihoods only.

        Returns
        -------
        numpy.ndarray
            ``(cells, genes)``, columns in the order of ``schema_.genes``: counts, detection probabilities or
            log-normalised values, as the likelihood has it.
        """
        schema = self.schema_
        adata = read_adata(adata, layer=schema.layer)
        settings = schema.combinations({} if given is None else given, over)
        libraries = None
        self._check_library(library)
        if library is not None:
            libraries = torch.full((adata.n_obs, 1), float(library))
        source = self._source(adata)
        with threads(self.train.threads):
            total, n = np.zeros((), np.float32), np.float32(len(settings))
            for each in settings:
                contexts = self._contexts(adata, each) if each else None
                of_setting = expected_values(self.vae_, source, contexts=contexts, library=libraries)
                total = np.add(total, of_setting / n)
        self._doubt_given(settings[0])
        return total

    def differential_expression(
        self,
        adata: AnnData | str | Path,
        *,
        groupby: str,
        group: str | None = None,
        reference: str | None = None,
        least_change: float = 0.25,
        pair_by: str | None = None,
        over: Sequence[str] | None = None,
        n_samples: int = 10,
        seed: int = 0,
    ) -> pd.DataFrame:
        """Which genes differ between groups of cells, by how much, and how sure that is.

        The fold change is that of the groups' mean shares of expression: as the model decodes them, corrected by what
        was counted, and shrunk by what the fold changes of all genes are like. It is about these cells: whether other
        donors would show it, cells cannot tell (`celbo.pseudobulk`).

        Parameters
        ----------
        adata
            The cells.
        groupby
            Column of obs that groups them.
        group
            The group to compare; each of them in turn if None.
        reference
            The group to compare it with; all others if None.
        least_change
            Log2 fold change that matters.
        pair_by
            Column of obs, as donor: groups are compared within each of its levels that has both, and the mean of these
            contrasts is told.
        over
            Conditions over whose levels (of fit) to take the mean; the categorical nuisance if None. Of others each
            cell has its own.
        n_samples
            Draws of z for each cell.
        seed
            Of the draws.

        Returns
        -------
        pandas.DataFrame
            By gene, surest first: ``group``, ``reference``, mean shares of both, ``log2_fold_change`` and its 90 %
            interval, ``probability`` that it is beyond ``least_change``, ``fdr``: the share of false ones among this
            gene and those that are surer; and the fold change before it was shrunk. Genes that the cells lack, and
            groups of one cell or without a partner in any level of ``pair_by``, are left out.

        Raises
        ------
        UsageError
            If the column or a group is not there, a group has fewer than 2 cells, or the model is not of counts.

        Examples
        --------
        >>> import celbo
        >>> adata = celbo.simulate_cells(n_cells=400, n_genes=60, seed=0)
        >>> model = celbo.ExpressionVAE(latent_dim=3, train=celbo.TrainConfig(max_epochs=20)).fit(adata)
        >>> found = model.differential_expression(adata, groupby="cell_type", group="type_0", reference="type_1")
        >>> found.columns[4:].tolist()  # doctest: +NORMALIZE_WHITESPACE
        ['log2_fold_change', 'lower', 'upper', 'probability', 'fdr', 'raw_log2_fold_change']
        """
        schema = self.schema_
        if self._likelihood().values != "counts":
            raise UsageError(f"fold changes are of counts; this model is of other values ({self.likelihood}).")
        if not 0 < least_change < math.inf:
            raise UsageError(
                f"least_change={least_change!r}; give a number above 0, of log2: every gene changes by something."
            )
        check_count("n_samples", n_samples, 1)
        check_seed(seed)
        adata = read_adata(adata, layer=schema.layer)
        group, reference = (None if each is None else str(each) for each in (group, reference))
        sets, names, comparisons = group_cells(adata.obs, groupby, group, reference, pair_by)
        if over is None:
            over = [each.name for each in schema.conditions if each.name in self.nuisance and each.levels is not None]
            over = [name for name in over if name != groupby]
            if (
                math.prod(len(each.levels_of_fit) for each in schema.conditions if each.name in over)
                > MOST_COMBINATIONS
            ):
                warnings.warn(
                    f"{listed(over)} has more than {MOST_COMBINATIONS} levels, too many to average: each cell is "
                    "decoded under its own. Name others with over=[...].",
                    stacklevel=2,
                )
                over = []
        settings = schema.combinations({}, over)
        contexts = [self._contexts(adata, each) if each else None for each in settings]
        source = self._source(adata)
        with threads(self.train.threads):
            sums = add_up(self.vae_, source, sets, contexts, n_samples=n_samples, seed=seed, has_width=self._has_width)
        measured = schema.columns(adata.var_names) >= 0
        sums = of_genes(sums, measured)
        genes = np.array(schema.genes)[measured].tolist()
        against = "rest" if reference is None else reference
        tables = [
            contrast(sums, pairs, genes, names=(name, against), least=least_change, seed=seed)
            for name, pairs in zip(names, comparisons, strict=True)
        ]
        return pd.concat(tables)

    def counterfactual(
        self,
        adata: AnnData | str | Path,
        given: Mapping[str, Any],
        *,
        others: "Sequence[ExpressionVAE]" = (),
        n_samples: int = 50,
        seed: int = 0,
    ) -> Counterfactual:
        """What these cells would look like if conditions were different.

        Each cell is encoded under its own conditions and decoded under those of ``given`` (the others stay its own), at
        its own library size, with the same draws of z: differences are the condition's. Whether such cells were seen
        near each of them is said per cell, in ``support``.

        Parameters
        ----------
        adata
            The cells.
        given
            Conditions and what they are to be: ``{"stim": "stim"}``, or ``{"dose": 2.5}``.
        others
            Models of the same genes and conditions, as from other seeds, whose answers count alike: intervals then hold
            what models do not agree on.
        n_samples
            Draws of z for each cell and model.
        seed
            Of the draws.

        Returns
        -------
        celbo.ask.counterfactual.Counterfactual

        Raises
        ------
        UsageError
            If a condition is none of the model, had a single level in fit, or the model keeps no reference cells.
        DataError
            If a level was not seen in fit.

        Examples
        --------
        >>> import celbo
        >>> adata = celbo.simulate_cells(n_cells=300, n_genes=60, seed=0)
        >>> train = celbo.TrainConfig(max_epochs=20)
        >>> model = celbo.ExpressionVAE(latent_dim=3, conditions=["treatment"], train=train).fit(adata)
        >>> treated = model.counterfactual(adata[:50], {"treatment": "treated"})
        >>> treated.mean.shape, treated.sample(seed=1).X.shape
        ((50, 60), (50, 60))
        """
        schema = self.schema_
        if not isinstance(others, Iterable):
            raise UsageError(f"others is a {type(others).__name__}; give a list of models: others=[model].")
        others = list(others)
        self._check_asked(given, others, n_samples)
        check_seed(seed)
        models = [self, *others]
        references = [model.reference_ for model in models if model.reference_ is not None]
        if len(references) < len(models):
            raise UsageError(
                "the model, or one of others, keeps no reference cells, without which support cannot be told; fit it "
                "again, and save it with them (keep_reference=True; --keep-reference)."
            )
        adata = read_adata(adata, layer=schema.layer)
        contexts = self._contexts(adata, given)
        self._doubt_given(given)
        for name in nested_conditions(references[0].conditions, schema, given):
            rest = listed(each.name for each in schema.conditions if each.name != name)
            warnings.warn(
                f"condition {name!r} is nested in the others ({rest}): its effect cannot be told from theirs, and "
                "what is decoded under another level may be either's.",
                stacklevel=2,
            )
        source = self._source(adata)
        with threads(self.train.threads):
            mu_z, _ = posterior(self.vae_, source)
            learned_from = [
                known_cells(reference, model.schema_, model.vae_.classifier, given)
                for model, reference in zip(models, references, strict=True)
            ]
            codes, labels = schema.codes(adata.obs), self._labels_of(adata.obs)
            levels = other_levels(schema, self.vae_.classifier, given, codes, mu_z, labels)
            standing = support(mu_z, levels, learned_from[0], adata.obs_names)
            standing.loc[empty_cells(adata, schema)] = (np.nan, np.nan, "empty")
            unsupported = (standing["verdict"] != "supported").to_numpy()
            vaes = [model.vae_ for model in models]
            carried = [
                carry(vae, source, contexts, unsupported, supported_positions(each, seed=seed))
                for vae, each in zip(vaes, learned_from, strict=True)
            ]
            found = decode_under(
                vaes, source, contexts, carried, n_samples=n_samples, seed=seed, has_width=self._has_width
            )
        if np.abs(found.after - found.before).sum() < _HARDLY_CHANGED * np.abs(found.before).sum():
            warnings.warn(
                f"decoding under {dict(given)} hardly changes these cells: either they have these conditions already, "
                "or the decoder ignores them; model.diagnose(adata) says which.",
                stacklevel=2,
            )
        obs = adata.obs.copy()
        for name, value in given.items():
            obs[name] = value
        return Counterfactual(
            mean=found.mean,
            lower=found.lower,
            upper=found.upper,
            support=standing,
            genes=changed_genes(
                found.before,
                found.after,
                found.noise,
                n_like(mu_z, learned_from[0]),
                pd.Index(schema.genes),
                schema.columns(adata.var_names) >= 0,
                is_ratio=self._likelihood().values != "real",
                seed=seed,
            ),
            draws=found.draws,
            obs=obs,
            layer=schema.layer,
        )

    def predict(
        self, adata: AnnData | str | Path, *, unseen: str = "refuse", genes_present: float = 0.8
    ) -> pd.DataFrame:
        """Tell the labels of cells, how sure that is, and which cells are none of these.

        Parameters
        ----------
        adata
            The cells.
        unseen, genes_present
            As `posterior` takes them.

        Returns
        -------
        pandas.DataFrame
            By cell: ``label`` ("none of these" where ``p_known`` is below .01), ``probability`` of the likeliest label
            (calibrated on held-out labelled cells), ``p_known``: probability that a cell of a known label lies as far
            from the labelled ones (`celbo.ask.labels.predictions`); then a column of probabilities for each label. NaN
            throughout of a cell without a count.

        Raises
        ------
        UsageError
            If the model was fitted without labels.

        Examples
        --------
        >>> import celbo
        >>> adata = celbo.simulate_cells(n_cells=500, n_genes=80, type_strength=2.0, seed=0)
        >>> adata.obs["known"] = adata.obs["cell_type"].astype(str).where(adata.obs_names.str[-1] < "3", "unknown")
        >>> model = celbo.ExpressionVAE(latent_dim=4, labels="known", train=celbo.TrainConfig(max_epochs=30)).fit(adata)
        >>> model.predict(adata).columns[:4].tolist()
        ['label', 'probability', 'p_known', 'type_0']
        """
        labels, classifier = self.schema_.labels, self.vae_.classifier
        if labels is None or labels.levels is None or classifier is None:
            raise UsageError("this model was fitted without labels; give labels='...' (celbo fit --labels COLUMN).")
        if self.reference_ is None:
            raise UsageError(
                "the model keeps no reference cells, without which no cell can be called none of these; fit it again, "
                "and save it with them (keep_reference=True; --keep-reference)."
            )
        adata = read_adata(adata, layer=self.schema_.layer)
        mu_z, _ = self.posterior(adata, unseen=unseen, genes_present=genes_present)
        with torch.inference_mode():
            found = classifier(torch.from_numpy(mu_z).to(classifier.temperature.device)).exp().cpu().numpy()
        is_known = self.reference_.labels >= 0
        reference = self.reference_
        known = Labelled(reference.mu_z[is_known], reference.labels[is_known], reference.held_out[is_known])
        if known.held_out.sum() < FEWEST_HELD_OUT_LABELLED:
            warnings.warn(
                f"{known.held_out.sum()} cells with a label were held out of fitting; of fewer than "
                f"{FEWEST_HELD_OUT_LABELLED} it cannot be told what is usual, so that no cell is called none of these. "
                "Label more cells, or fit with a larger validation_fraction.",
                stacklevel=2,
            )
        return predictions(found, mu_z, known, labels.levels, adata.obs_names, empty_cells(adata, self.schema_))

    def map_query(
        self, adata: AnnData | str | Path, *, genes_present: float = 0.8, track: Track | None = None
    ) -> "ExpressionVAE":
        """Take cells of new batches into this model, without moving what it knows by a bit (surgery, as scArches).

        New levels of categorical conditions get weights of their own, which start as the mean of the known levels' and
        are trained on these cells; all other weights stay. Cells of known levels need no training. The reference cells
        stay those of fit: cells of a new level are not among what `sample` draws from, nor what support is told by.
        Warns of a new level that has few cells, or reads nearly as a known one.

        Parameters
        ----------
        adata
            The cells.
        genes_present
            Share of the model's genes that must be there; the model fills in the rest by what it expects of them.
        track
            Watches the minibatches go by; see `celbo.fit.train.epochs`.

        Returns
        -------
        ExpressionVAE
            A model that knows the new levels, too; this one, if there are none.

        Raises
        ------
        UsageError
            If the model normalises over minibatches, which would move what it knows.
        DataError
            If genes, values or conditions do not fit the model.

        Examples
        --------
        >>> import celbo
        >>> adata = celbo.simulate_cells(n_cells=400, n_genes=60, n_batches=3, seed=0)
        >>> is_new = (adata.obs["batch"] == "batch_2").to_numpy()
        >>> model = celbo.ExpressionVAE(latent_dim=3, conditions=["batch"], train=celbo.TrainConfig(max_epochs=10))
        >>> mapped = model.fit(adata[~is_new]).map_query(adata[is_new])
        >>> mapped.embed(adata).shape
        (400, 3)
        """
        adata = read_adata(adata, layer=self.schema_.layer)
        schema = self.schema_.with_levels_of(adata.obs)
        for doubt in doubt_new_levels(self.schema_, schema, adata):
            warnings.warn(doubt, stacklevel=2)
        if schema == self.schema_:
            open_source(adata, self.schema_, genes_present=genes_present)  # which says what does not fit
            return self
        options = self._options_of_vae()
        if options["norm"] == "batch" or options["norm_mu"]:
            raise UsageError(
                "this model normalises over minibatches, so that new cells would move the known ones; fit it again "
                "with norm='layer' and without norm_mu."
            )
        mapped = copy(self)
        mapped.__dict__.pop("split_", None)
        vae = self._make_vae(schema)
        learned = copy_weights(self.vae_, vae, self.schema_, schema)
        source = Filled(vae, open_source(adata, schema, genes_present=genes_present))
        split = self._split(schema, adata)
        config = replace(self.train, warmup_fraction=0.0)
        vae.to(next(self.vae_.parameters()).device)
        with threads(config.threads):
            steps = epochs(vae, source, split, config, objective=self._objective(), learned=learned, track=track)
            mapped.history_ = History(steps)
        mapped.schema_, mapped.vae_ = schema, vae.eval()
        return mapped

    def sample(
        self,
        n: int,
        *,
        conditions: Mapping[str, Any] | None = None,
        source: str = "aggregated",
        around: AnnData | str | Path | None = None,
        library: float | None = None,
        seed: int = 0,
    ) -> AnnData:
        """Draw new cells, ``x ~ p(x | z, c, l)``, with the likelihood's own noise.

        Parameters
        ----------
        n
            How many.
        conditions
            What conditions are to be: ``{"stim": "ctrl"}``. Others come as they do in the cells of fit that have these.
        source
            Where z comes from: "aggregated", the posterior of a cell of fit that has the conditions; "mixture", a
            Gaussian mixture fitted to these; or "prior", which cells of fit seldom fill evenly.
        around
            Cells to draw around, from their posteriors and at their library sizes, each as often as the others: a
            posterior predictive check. They take the place of the cells of fit.
        library
            Library size of all cells. Else that of the cell whose posterior z is from, or of one near z.
        seed
            Of all draws.

        Returns
        -------
        anndata.AnnData
            Sparse counts over the model's genes (a Gaussian's are dense reals); obs has the conditions and ``library``,
            obsm["z"] the latent.

        Raises
        ------
        UsageError
            If n is below 1, a condition is none of the model, no cell of fit has the conditions, or the model keeps no
            reference cells.
        DataError
            If a level was not seen in fit.

        Examples
        --------
        >>> import celbo
        >>> adata = celbo.simulate_cells(n_cells=300, n_genes=60, seed=0)
        >>> train = celbo.TrainConfig(max_epochs=20)
        >>> model = celbo.ExpressionVAE(latent_dim=3, conditions=["treatment"], train=train).fit(adata)
        >>> treated = model.sample(100, conditions={"treatment": "treated"}, seed=1)
        >>> treated.shape, treated.obs["treatment"].unique().tolist()
        ((100, 60), ['treated'])
        """
        schema, reference, names = self.schema_, self.reference_, None
        check_count("n", n, 1)
        check_seed(seed)
        self._check_library(library)
        if around is not None:
            if source != "aggregated":
                raise UsageError(f"source={source!r} and around exclude each other: cells around others have their z.")
            adata = read_adata(around, layer=schema.layer)
            names, codes = adata.obs_names, schema.codes(adata.obs)
            with threads(self.train.threads):
                reference = as_reference(self.vae_, self._source(adata), codes)
        with threads(self.train.threads):
            drawn = draw_cells(
                self.vae_,
                schema,
                reference,
                int(n),
                given=conditions or {},
                source=source,
                library=library,
                sample=self.objective != "autoencoder",
                seed=seed,
            )
            values = draw_values(self.vae_, schema, drawn, seed=seed)
        return new_cells(schema, drawn, values, names, {"source": source, "seed": seed})

    def interpolate(
        self,
        start: AnnData | str | Path,
        end: AnnData | str | Path,
        *,
        n_points: int = 11,
        given: Mapping[str, Any] | None = None,
        library: float | None = None,
    ) -> AnnData:
        """Decoded means along the line from one cell, or the mean of a group, to another in the latent space.

        Parameters
        ----------
        start, end
            Cells; of several, the mean of their mu_z.
        n_points
            Points on the line, both ends included.
        given
            Conditions to decode under; others go over from those of the start to those of the end, in parts.
        library
            Library size to decode at; expression shares if None. For count likelihoods only.

        Returns
        -------
        anndata.AnnData
            The means; obs["position"] runs from 0 to 1, obsm["z"] is the line.

        Examples
        --------
        >>> import celbo
        >>> adata = celbo.simulate_cells(n_cells=300, n_genes=60, seed=0)
        >>> model = celbo.ExpressionVAE(latent_dim=3, train=celbo.TrainConfig(max_epochs=5)).fit(adata)
        >>> model.interpolate(adata[:1], adata[1:2], n_points=5).obs["position"].tolist()
        [0.0, 0.25, 0.5, 0.75, 1.0]
        """
        schema = self.schema_
        if not isinstance(n_points, int | np.integer) or n_points < 2:
            raise UsageError(f"n_points={n_points!r}; a line has at least its 2 ends.")
        self._check_library(library)
        groups = [read_adata(cells, layer=schema.layer) for cells in (start, end)]
        z = np.stack([self.embed(cells).mean(0) for cells in groups])
        context = torch.stack([schema.encode(cells.obs, given).mean(0) for cells in groups])
        self._doubt_given(given or {})
        with threads(self.train.threads):
            t, along, means = interpolate(self.vae_, z, context, n_points=int(n_points), library=library)
        obs = pd.DataFrame({"position": t.astype(float)}, index=[f"point_{number}" for number in range(len(t))])
        return AnnData(X=means, obs=obs, var=pd.DataFrame(index=list(schema.genes)), obsm={"z": along})

    def diagnose(self, adata: AnnData | str | Path, *, groupby: str | None = None, seed: int = 0) -> Diagnosis:
        """Look for posterior collapse and its relatives: a latent that says nothing, a condition that is ignored.

        Everything is measured on the cells held out in fit, where these are the cells of fit; else on all of them (at
        most 10,000), beside simpler models learned from the others.

        Parameters
        ----------
        adata
            The cells of fit, or others.
        groupby
            Column of obs with known types, within which a condition is looked for in z.
        seed
            Of all draws.

        Returns
        -------
        celbo.trust.diagnostics.Diagnosis
            Prints its verdict in one line, then the findings, worst first, then remedies in the order to try them.

        Examples
        --------
        >>> import celbo
        >>> adata = celbo.simulate_cells(n_cells=500, n_genes=100, median_library=1000, seed=0)
        >>> model = celbo.ExpressionVAE(latent_dim=4, train=celbo.TrainConfig(max_epochs=30)).fit(adata)
        >>> model.diagnose(adata).collapsed
        False
        """
        check_seed(seed)
        schema = self.schema_
        adata = read_adata(adata, layer=schema.layer)
        if groupby is not None and groupby not in adata.obs.columns:
            raise UsageError(f"groupby={groupby!r} is no column of obs; it has {listed(adata.obs.columns)}.")
        types = None if groupby is None else column_of(adata.obs, groupby).astype(str).to_numpy()
        source, rows, training = self.cells_to_measure(adata)
        if len(rows) < 2:
            raise DataError(f"{len(rows)} cells are too few to diagnose a model on; give at least 2.")
        codes = schema.codes(adata.obs)
        conditions = {
            condition.name: (
                columns,
                codes[rows, number] if condition.levels is None else codes[rows, number].astype(int),
            )
            for number, (condition, columns) in enumerate(zip(schema.conditions, schema.context_columns, strict=True))
        }
        with threads(self.train.threads):
            evidence = gather(
                self.vae_,
                source,
                rows,
                training,
                self._likelihood(),
                objective=self._objective(),
                conditions=conditions,
                settings=self._settings(),
                types=None if types is None else types[rows],
                seed=seed,
            )
        return diagnose(evidence)

    def recipe(self) -> Recipe:
        """What the remedies come to; a `UsageError` with the table of them if they cannot be used."""
        recipe = combine(self.remedies)
        refuse_unfit(
            self.remedies,
            objective=self.objective,
            likelihood=self.likelihood,
            prior=recipe.options.get("prior", self.prior),
            has_conditions=bool((*self.conditions, *self.nuisance)),
        )
        return recipe

    def cells_to_measure(self, adata: AnnData | str | Path) -> tuple[CellSource, Rows, Rows]:
        """A source of these cells; which of them to measure a model on, and which simpler ones may learn from.

        Those held out in fit and those learned from, if these are the cells of fit; else all, and all.
        """
        source, split = self.split_again(adata)
        every: Rows = np.arange(source.n_cells)
        held_out = every if split is None or len(split.validation) < 2 else split.validation
        rows = np.random.default_rng([self.train.seed, 12]).permutation(held_out)[:_CELLS_TO_DIAGNOSE]
        return source, np.sort(rows), every if split is None else split.train

    def split_again(self, adata: AnnData | str | Path) -> tuple[CellSource, Split | None]:
        """A source of these cells, and how fit split them; None if they are not those of fit, as far as one can tell.

        The split is drawn again from the seed, and the library sizes compared with those of the reference cells.
        """
        adata = read_adata(adata, layer=self.schema_.layer)
        source = self._source(adata)
        if self.reference_ is None:
            return source, None
        split = self._split(self.schema_, adata)
        rows = self._reference_rows(split)
        same = len(rows) == len(self.reference_.library) and (rows < source.n_cells).all()
        is_same = same and np.array_equal(source.library[rows], self.reference_.library)
        return source, split if is_same else None

    def save(self, path: str | Path, *, keep_reference: bool = True) -> None:
        """Write the model folder: JSON and safetensors with checksums, in one step or not at all.

        Parameters
        ----------
        path
            The folder; one that already holds a model is replaced.
        keep_reference
            Whether to keep the latent positions of the cells of fit (no counts, no names).

        Raises
        ------
        StorageError
            If it cannot be written; an older model there stays whole.
        """
        document = {
            "options": self.options(),
            "schema": self.schema_.to_json(),
            "history": [_without_nan(asdict(epoch)) for epoch in self.history_],
        }
        weights = {name: value.cpu().numpy() for name, value in self.vae_.state_dict().items()}
        reference = self.reference_ if keep_reference else None
        checkpoint.write_folder(path, document, weights, None if reference is None else reference_arrays(reference))

    def options(self) -> dict[str, Any]:
        """What was given to make this model, as plain values."""
        chosen = {option.name: getattr(self, option.name) for option in fields(self) if option.init}
        return {
            **chosen,
            "hidden_dims": [int(width) for width in self.hidden_dims],
            "unlabelled": str(self.unlabelled),
            "n_top_genes": self.n_top_genes and int(self.n_top_genes),
            "conditions": list(self.conditions),
            "nuisance": list(self.nuisance),
            "interactions": list(self.interactions),
            "decoder_dims": None if self.decoder_dims is None else [int(width) for width in self.decoder_dims],
            "remedies": list(self.remedies),
            "train": asdict(self.train),
        }

    def __getattr__(self, name: str) -> Any:
        """Say what to do where something is asked for that only `fit` makes."""
        if name == "split_" and "vae_" in self.__dict__:
            raise NotFittedError("this model has no split_: fit makes it, and save does not keep it.")
        if name in _MADE_BY_FIT:
            raise NotFittedError(f"this model is not fitted (it has no {name}): call fit first, or celbo.load one.")
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def _check_asked(self, given: Mapping[str, Any], others: "Sequence[ExpressionVAE]", n_samples: int) -> None:
        """Refuse a counterfactual that cannot be answered."""
        if not given:
            raise UsageError("given names no condition; give what is to be different, as {'treatment': 'treated'}.")
        schema = self.schema_
        known = [condition.name for condition in schema.conditions]
        if single := [name for name in given if name in (*self.conditions, *self.nuisance) and name not in known]:
            raise UsageError(
                f"{listed(single)} had a single level in fit and was left out: nothing can be asked of it."
            )
        if not all(isinstance(other, ExpressionVAE) for other in others):
            raise UsageError("others are fitted models, as celbo.load reads them.")
        for part in ("genes", "conditions", "values", "layer", "size_factor"):
            if any(getattr(other.schema_, part) != getattr(schema, part) for other in others):
                raise UsageError(f"others have other {part} than this model; fit them to the same cells, the same way.")
        if any(other._has_width != self._has_width for other in others):
            raise UsageError("others have another objective than this model; fit them the same way.")
        if len({id(model) for model in (self, *others)}) <= len(others):
            raise UsageError("others name a model twice, or this one; give models of other seeds, each once.")
        check_count("n_samples", n_samples, 2)

    def _doubt_given(self, given: Mapping[str, Any]) -> None:
        """Warn of what is asked for beyond the values of fit."""
        for condition in self.schema_.conditions:
            if condition.name in given and (doubt := condition.doubt(pd.Series([given[condition.name]]))):
                warnings.warn(doubt, stacklevel=3)

    def _check_labels(self, check: Check, obs: pd.DataFrame) -> None:
        """Add what is wrong with the column of labels to what was found."""
        if not isinstance(self.labels, str):
            raise UsageError(f"labels={self.labels!r}; give the name of one column of obs.")
        if self.labels not in obs.columns:
            check.add("labels", "error", f"obs has no column {self.labels!r} for labels; it has {listed(obs.columns)}.")
            return
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                known_labels(column_of(obs, self.labels), self.unlabelled)
            except DataError as error:
                check.add("labels", "error", str(error))
            except UsageError:
                if not check.errors:  # which are to be told first
                    raise
        for warning in said:
            check.add("labels", "warning", str(warning.message))

    def _labels_of(self, obs: pd.DataFrame) -> NDArray[np.int32]:
        """Numbers of the labels that these cells come with, -1 where the model does not know them."""
        labels = self.schema_.labels
        if labels is None or labels.levels is None or labels.name not in obs.columns:
            return np.full(len(obs), -1, np.int32)
        column = column_of(obs, labels.name)
        codes = pd.Index(labels.levels).get_indexer(as_text(column))
        return np.where(column.notna(), codes, -1).astype(np.int32)

    def _likelihood(self) -> Likelihood:
        if self.likelihood not in LIKELIHOODS:
            raise UsageError(f"likelihood is {self.likelihood!r}; choose one of {', '.join(LIKELIHOODS)}.")
        return LIKELIHOODS[self.likelihood]

    def _objective(self) -> Objective:
        if self.objective not in OBJECTIVES:
            raise UsageError(f"objective is {self.objective!r}; choose one of {', '.join(OBJECTIVES)}.")
        return OBJECTIVES[self.objective]

    def _options_of_vae(self) -> dict[str, Any]:
        """The options above, and what the remedies make of them."""
        names = ["hidden_dims", "dispersion", "encode_context", "skip", "norm", "dropout"]
        names += ["decoder_dims", "decoder_dropout", "context_skip", "norm_mu", "prior", "embedding_dim"]
        return {name: getattr(self, name) for name in names} | dict(self.recipe().options)

    def _make_vae(self, schema: Schema) -> VAE:
        interactions = schema.pairs(self.interactions)
        check_count("embedding_dim", self.embedding_dim, 1)
        try:
            return VAE(
                input_dim=len(schema.genes),
                latent_dim=self.latent_dim,
                likelihood=self._likelihood(),
                context_dim=schema.context_dim,
                embedded=[
                    columns
                    for condition, columns in zip(schema.conditions, schema.context_columns, strict=True)
                    if condition.embedded
                ],
                interactions=interactions,
                n_labels=0 if schema.labels is None else schema.labels.dim,
                **self._options_of_vae(),
            )
        except UsageError as error:
            if not self.recipe().options:
                raise
            raise UsageError(
                f"remedies {listed(self.remedies)} do not fit this model: {error}\n{remedy_table()}"
            ) from error

    def _settings(self) -> dict[str, Any]:
        """What advice depends on."""
        options = self._options_of_vae()
        hidden, decoder = options["hidden_dims"], options["decoder_dims"]
        return {
            "likelihood": self.likelihood,
            "objective": self.objective,
            "warmup_fraction": self.train.warmup_fraction,
            "remedies": list(self.remedies),
            "nuisance": [condition.name for condition in self.schema_.conditions if condition.nuisance],
            "beta": self.recipe().beta,
            "kl_weight": self.history_[-1].kl_weight,
            "n_hidden": (len(hidden), len(hidden if decoder is None else decoder)),
            **{name: options[name] for name in ("dispersion", "norm", "norm_mu", "prior")},
        }

    @property
    def _has_width(self) -> bool:
        """Whether posteriors have one; a plain autoencoder places each cell at a point."""
        return self.objective != "autoencoder"

    def _check_library(self, library: float | None) -> None:
        if library is not None:
            if self._likelihood().values != "counts":
                raise UsageError(f"library={library!r} has no meaning for {self.likelihood!r}; leave it out.")
            is_number = isinstance(library, int | float | np.number) and not isinstance(library, bool)
            if not (is_number and 0 < float(library) < math.inf):
                raise UsageError(f"library={library!r}; a library size is a finite number above 0.")

    def _contexts(self, adata: AnnData, given: Mapping[str, Any]) -> Contexts:
        """Contexts of these cells by their positions, under these conditions."""
        schema = self.schema_
        codes = schema.codes(adata.obs, given)
        return lambda rows: schema.expand(codes[rows])

    def _split(self, schema: Schema, adata: AnnData) -> Split:
        """Which of these cells are held out, and which learned from: of every level one at least."""
        levels = schema.codes(adata.obs)[:, [condition.levels is not None for condition in schema.conditions]]
        return split_cells(adata.n_obs, self.train.validation_fraction, self.train.seed, levels)

    def _source(self, adata: AnnData | str | Path) -> CellSource:
        schema = self.schema_  # first, so that an unfitted model says so before anything is read
        return open_source(read_adata(adata, layer=schema.layer), schema)

    def _open(self, adata: AnnData, unseen: str, genes_present: float) -> "tuple[ExpressionVAE, CellSource]":
        """A source of these cells, and the model that knows their levels; options are those of `posterior`."""
        if unseen == "adapt":
            mapped = self.map_query(adata, genes_present=genes_present)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # mapping has said it
                return mapped, open_source(adata, mapped.schema_, genes_present=genes_present)
        if unseen == "nearest":
            with threads(self.train.threads):
                adata = at_nearest_levels(
                    self.vae_, self.schema_, adata, self._objective(), genes_present=genes_present
                )
            unseen = "refuse"
        return self, open_source(adata, self.schema_, unseen=unseen, genes_present=genes_present)

    def _reference_rows(self, split: Split) -> Rows:
        """Which cells of fit are kept as a reference, in their order."""
        chosen = np.random.default_rng([self.train.seed, 3]).permutation(split.train)[:_REFERENCE_CELLS]
        return np.sort(np.concatenate([chosen, split.validation]))

    def _refer(self, adata: AnnData, source: CellSource) -> Reference:
        """Positions of all held-out cells and of as many training cells as are kept."""
        rows = self._reference_rows(self.split_)
        with threads(self.train.threads):
            mu_z, logvar_z = posterior(self.vae_, source, rows)
        found = Reference(
            mu_z=mu_z,
            logvar_z=logvar_z,
            library=source.library[rows],
            conditions=self.schema_.codes(adata.obs.iloc[rows]),
            held_out=np.isin(rows, self.split_.validation),
            labels=np.full(len(rows), -1, np.int32) if source.labels is None else source.labels[rows],
            was_read=np.zeros(len(rows), bool),
            readings=np.zeros((len(rows), n_readings(self._likelihood().values == "counts"))),
        )
        if self.objective != "autoencoder" and 0 < found.held_out.sum() < len(rows):
            held_out = np.flatnonzero(found.held_out)
            some = np.sort(np.random.default_rng([self.train.seed, 18]).permutation(held_out)[:_CELLS_TO_CALIBRATE])
            with threads(self.train.threads):
                found.readings[some] = self._read_cells(source, rows[some], found, self.train.seed)
            found.was_read[some] = True
        return found

    def _read_cells(self, source: CellSource, rows: Rows, reference: Reference, seed: int) -> NDArray[np.float64]:
        """What `celbo.ask.outliers` compares cells by."""
        return readings(
            self.vae_,
            source,
            rows,
            reference.mu_z[~reference.held_out],
            codes=source.codes[rows],
            expand=self.schema_.expand,
            is_counts=self._likelihood().values == "counts",
            seed=seed,
        )

    def _refuse_autoencoder(self) -> None:
        if self.objective == "autoencoder":
            raise UsageError("a plain autoencoder has no p(x); fit again with objective='vae'.")


def load(path: str | Path) -> ExpressionVAE:
    """Read a fitted model from its folder, or from a run's folder; nothing in it is executed.

    Parameters
    ----------
    path
        What `ExpressionVAE.save` or ``celbo fit`` wrote.

    Returns
    -------
    ExpressionVAE
        On the CPU.

    Raises
    ------
    ModelFileError
        If the folder is damaged, forged, or written by a newer celbo.
    """
    folder = checkpoint.read_folder(path)
    try:
        options = dict(folder.document["options"])
        schema = Schema.from_json(folder.document["schema"])
        model = ExpressionVAE(**{**options, "train": TrainConfig(**options["train"])})
        if len(model.hidden_dims) > len(folder.weights):
            raise ValueError(f"{len(model.hidden_dims)} hidden layers, but {len(folder.weights)} tensors")
        with torch.device("meta"):  # shapes only: nothing is allocated before they are known to fit
            vae = model._make_vae(schema)
        history = History(
            Epoch(**{**epoch, "kl_per_dim": tuple(epoch["kl_per_dim"])}) for epoch in folder.document["history"]
        )
        reference = None
        if folder.reference is not None:
            n_read = n_readings(model._likelihood().values == "counts")
            reference = reference_from(folder.reference, model.latent_dim, len(schema.conditions), n_read)
    except (KeyError, TypeError, ValueError, OverflowError, RuntimeError, UsageError) as error:
        raise ModelFileError(
            f"{path}: model.json does not describe a model ({error}); save the model again."
        ) from error
    expected = {name: (tuple(value.shape), value.dtype) for name, value in vae.state_dict().items()}
    found = {name: torch.from_numpy(value) for name, value in folder.weights.items()}
    if expected != {name: (tuple(value.shape), value.dtype) for name, value in found.items()}:
        names = sorted(set(expected) ^ set(found)) or [n for n in expected if tuple(found[n].shape) != expected[n][0]]
        raise ModelFileError(
            f"{path}: the weights do not fit the model that model.json describes ({', '.join(names[:5])}); "
            "save the model again."
        )
    vae.load_state_dict(found, assign=True)
    model.schema_, model.vae_, model.history_, model.reference_ = schema, vae.eval(), history, reference
    return model


def _without_nan(record: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN; an epoch without a single good step has."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()
    }
