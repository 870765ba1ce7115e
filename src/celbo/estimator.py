"""ExpressionVAE, for people with an AnnData: its options, `fit`, `save`, and a method for each question."""

from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray

from celbo.ask import counterfactual, differential, generate, labels, mapping, outliers, readings, scoring
from celbo.ask.counterfactual import Counterfactual
from celbo.ask.unlike import warn_of_unlike
from celbo.checkpoint import read_folder
from celbo.data.checks import Check
from celbo.data.conditions import UNLABELLED
from celbo.data.groups import Groups
from celbo.data.read import read_adata
from celbo.errors import ModelFileError, UsageError, warn
from celbo.fit import options as fit_options
from celbo.fit.cells import Cells
from celbo.fit.fitted import Fitted, fit_model, in_spite_of_an_interrupt
from celbo.fit.older import modern_options
from celbo.fit.remedies import Recipe
from celbo.fit.saved import read_fitted, take_weights, write_fitted
from celbo.fit.shown import shown_model, shown_table
from celbo.fit.start import cells_to_fit, check_prepared, check_to_fit
from celbo.fit.train import Track, TrainConfig, settle_device
from celbo.fit.words import Hinted, explained, no_attribute
from celbo.trust import diagnosing
from celbo.trust.advice import Diagnosis

__all__ = ["ExpressionVAE", "load"]

CellsLike: TypeAlias = AnnData | str | Path
"""Cells in memory, or the path of an ``.h5ad`` file or ``.zarr`` folder."""
Array = NDArray[np.float32]


@explained
@dataclass(kw_only=True, eq=False, repr=False)
class ExpressionVAE(metaclass=Hinted):
    """A variational autoencoder of the counts in an AnnData.

    Making a model stores options; `fit` learns. Attributes that `fit` makes end in an underscore: ``schema_`` (genes
    and conditions), ``vae_`` (the `celbo.VAE`), ``history_`` (a record per epoch). Cells given later are aligned to
    the model's genes by name. The model keeps no counts, and changes no AnnData.

    Every question takes cells as an AnnData, or as the path of an ``.h5ad`` file or ``.zarr`` folder.

    Examples
    --------
    >>> import celbo
    >>> adata = celbo.simulate_cells(n_cells=200, n_genes=50, seed=0)
    >>> model = celbo.ExpressionVAE(latent_dim=4, train=celbo.TrainConfig(max_epochs=5)).fit(adata)
    >>> adata.obsm["X_celbo"] = model.embed(adata)
    >>> adata.obsm["X_celbo"].shape
    (200, 4)
    >>> model
    ExpressionVAE(latent_dim=4, train=TrainConfig(max_epochs=5); fitted: 200 cells x 50 genes, 5 epochs)
    """

    latent_dim: int = 10
    """Number of latent dimensions."""
    hidden_dims: Sequence[int] = (128,)
    """Widths of the encoder's hidden layers; the decoder has them in reverse."""
    likelihood: str = "nb"
    """A name in `celbo.LIKELIHOODS`."""
    conditions: Sequence[str] = ()
    """Columns of obs with effects to study (treatment, time). Floating-point columns are continuous, other columns are
    categorical."""
    nuisance: Sequence[str] = ()
    """Columns of obs with effects to remove (batch, donor)."""
    n_top_genes: int | None = None
    """Number of most variable genes to model, chosen within levels of the first categorical nuisance or condition; None
    for all genes."""
    labels: str | None = None
    """Column of obs with cell types, known for some cells, that `predict` learns to predict. They pull z apart."""
    unlabelled: str = UNLABELLED
    """Value of that column where the label is not known. A missing value means the same."""
    layer: str | None = None
    """Layer that holds the values; None for X."""
    features: str | None = None
    """Type of features to model, in var["feature_types"], var["feature_type"] or var["modality"]; "all" for every type.
    None for the genes, where such a column names genes beside other types, and for all features elsewhere."""
    allow_noninteger: bool = False
    """Accept estimated counts, which need not be whole numbers."""
    mask_absent: str | None = None
    """Column of obs, such as the sample: genes without a count in a whole level count as not measured there. They are
    left out of the likelihood of its cells, and the model fills them in by what it expects."""
    size_factor: str | None = None
    """Column of obs used in place of the sum of counts."""
    dispersion: str = "gene"
    """What theta of a negative binomial depends on: "gene", "gene-condition" or "gene-cell"."""
    objective: str = "vae"
    """A name in `celbo.model.objective.OBJECTIVES`: "vae", or "autoencoder" (no KL, z = mu_z)."""
    encode_context: bool = True
    """Whether the encoder sees the conditions too."""
    norm: str = "layer"
    """Normalisation of hidden layers: "none", "layer" or "batch"."""
    dropout: float = 0.2
    """Share of hidden units that are zeroed in training."""
    decoder_dims: Sequence[int] | None = None
    """Widths of the decoder's hidden layers; None for the encoder's in reverse, empty for a linear decoder."""
    interactions: Sequence[str] = ()
    """Pairs of conditions whose combinations have effects beyond their parts: "batch:treatment". Two levels that fit
    never saw together have no such effect."""
    embedding_dim: int = 10
    """Number of learned values for each level of a condition with more than 50 levels, and for each combination."""
    prior: str = "normal"
    """A name in `celbo.model.priors.PRIORS`: "normal", "conditional", "mixture:20", "vamp:100"."""
    remedies: Sequence[str] = ()
    """Remedies for posterior collapse: names in `celbo.REMEDIES`, with a number after a colon where they take one, as
    "cyclical" or "free_bits:0.1"."""
    train: TrainConfig = TrainConfig()
    """How to train."""

    fitted_: Fitted = field(init=False)

    def fit(self, adata: CellsLike | Cells, *, progress: bool = True, track: Track | None = None) -> "ExpressionVAE":
        """Learn from cells with raw counts.

        An interrupt (Ctrl-C, or the stop button of a notebook) ends training: the model gets its best weights so far,
        with a warning, and ``fitted_.stopped`` is "interrupted". Before the end of the first epoch an interrupt ends
        `fit` with a `KeyboardInterrupt`, and the model stays as it was. So does a second interrupt after training. A
        first one after training is passed over, and `fit` comes to its end.

        Parameters
        ----------
        adata
            The cells; or what `prepare` made of them for a model with the same options of data.
        progress
            Whether to show on stderr how far training is: a bar in a terminal or a notebook, elsewhere a line every
            half minute.
        track
            Watches the minibatches of each epoch instead; see `celbo.fit.train.epochs`.

        Returns
        -------
        ExpressionVAE
            The model itself. If an error is raised, it stays as it was.

        Raises
        ------
        DataError
            If genes, values or conditions cannot be used; then nothing is trained.
        DivergedError
            If training produced numbers that are not finite, and could not recover.
        """
        parts = self._parts()
        settle_device(self.train.device)  # before anything is read
        cells = adata if isinstance(adata, Cells) else self.prepare(adata)
        check_prepared(cells, fit_options.data_options(self.get_params()))
        trained = fit_model(cells, progress=progress, track=track, **parts)
        cells = cells.seen_by(trained)
        fitted = in_spite_of_an_interrupt(lambda: readings.with_readings(trained, cells), trained.stopped)
        doubts = in_spite_of_an_interrupt(lambda: diagnosing.doubts_of_fit(fitted, cells), trained.stopped)
        self.fitted_ = replace(fitted, options=self.options())
        for doubt in doubts:
            warn(doubt)
        return self

    def check(self, adata: AnnData | str | Path, *, groupby: str | None = None, fingerprint: bool = False) -> Check:
        """Check cells that this model is to be fitted to, as `fit` does first; nothing is trained.

        Parameters
        ----------
        adata
            The cells.
        groupby
            Column of obs with cell types; a nuisance whose levels have types of their own gets a warning.
        fingerprint
            Whether to hash all values in the same pass.

        Returns
        -------
        celbo.data.checks.Check
            The ``problems``, each with a name, a severity and a message.

        Examples
        --------
        >>> import celbo, numpy, anndata
        >>> check = celbo.ExpressionVAE().check(anndata.AnnData(numpy.array([[0.5, 1.0]])))
        >>> check.errors[0].name
        'not-whole'
        """
        adata = read_adata(adata, layer=self.layer)
        options = fit_options.data_options(self.get_params())
        return check_to_fit(adata, groupby=groupby, fingerprint=fingerprint, **options)

    def prepare(self, adata: AnnData | str | Path, *, fingerprint: bool = False) -> Cells:
        """Check cells, choose genes and align the cells, so that `fit` of one model or of several can use them.

        They share memory with the AnnData: do not change its values before the last fit.

        Parameters
        ----------
        adata, fingerprint
            As `check` takes them.

        Returns
        -------
        celbo.fit.cells.Cells

        Raises
        ------
        DataError
            If genes, values or conditions cannot be used.
        """
        adata = read_adata(adata, layer=self.layer)
        check = self.check(adata, fingerprint=fingerprint)
        return cells_to_fit(adata, check, fit_options.data_options(self.get_params()))

    def embed(self, adata: CellsLike, *, unseen: str = "refuse", genes_present: float = 0.8) -> Array:
        """Return the posterior means of z, ``(cells, latent_dim)``: the latent space. Options as in `posterior`."""
        return self.posterior(adata, unseen=unseen, genes_present=genes_present)[0]

    def posterior(self, adata: CellsLike, *, unseen: str = "refuse", genes_present: float = 0.8) -> tuple[Array, Array]:
        """Return the position of each cell in the latent space, with its uncertainty: mean and sd of q(z | x, c).

        Parameters
        ----------
        adata
            The cells.
        unseen
            What to do with levels of conditions that fit did not see: "refuse" them; read them as the "nearest" known
            level (under which their cells have the highest ELBO); read them as all levels of fit in equal parts
            ("marginal"); or "adapt": learn weights for them from these cells (`map_query`).
        genes_present
            Share of the model's genes that must be present. The model fills in the others by what it expects of them.

        Returns
        -------
        tuple
            ``mu_z`` and ``sd_z``, each ``(cells, latent_dim)``. For a plain autoencoder sd_z is 0. A warning says how
            many cells are unlike those of fit, if chance does not explain it (`celbo.ask.unlike.unlike`).
        """
        fitted, cells = self._open(adata, unseen, genes_present)
        warn_of_unlike(fitted, cells)
        return scoring.posterior(fitted, cells)

    def elbo(self, adata: CellsLike, *, seed: int = 0) -> pd.DataFrame:
        """Return the evidence lower bound of each cell and its terms, in nats, with one sample of z.

        The sample of a cell depends on its place among the cells. Another seed, or another order of the cells, gives
        another sample; the bound is the mean over samples.

        Returns
        -------
        pandas.DataFrame
            By cell: ``elbo = reconstruction - kl``, and ``kl_0``, ``kl_1``, ... which sum to ``kl``.
        """
        return scoring.elbo(*self._open(adata), seed=seed)

    def log_prob(
        self,
        adata: CellsLike,
        *,
        n_samples: int = 500,
        refine: bool = False,
        unseen: str = "refuse",
        genes_present: float = 0.8,
        seed: int = 0,
    ) -> pd.DataFrame:
        """Estimate how likely each cell is: log p(x | library, conditions), by importance weighting, in nats.

        ``log mean_k p(x | z_k, c, l) p(z_k | c) / r(z_k)`` over ``n_samples`` samples (Burda 2016) from r, a mixture of
        the widened posterior and the prior (`celbo.model.importance.log_prob`). The library size is given: this is a
        density given the total. A cell has the same estimate whichever other cells are asked about, unless ``unseen``
        is "nearest" or "adapt".

        Parameters
        ----------
        adata
            The cells.
        n_samples
            Samples of z for each cell.
        refine
            Whether to fit each cell's posterior first. It takes longer, and is needed to compare models.
        unseen, genes_present
            As in `posterior`.
        seed
            Seed of the samples.

        Returns
        -------
        pandas.DataFrame
            By cell: ``log_p``; its standard error ``se = sqrt(1 / ess - 1 / n_samples)``; ``ess``, the effective number
            of samples; ``trusted``: whether that is at least 10. With ``refine`` also ``unrefined``, the estimate from
            the encoder's own posterior, and ``gap``, the first minus this one: the cost of the encoder. NaN for a cell
            without a count. Without ``refine`` estimates are too low where few samples are effective, by more than
            ``se``.

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
        fitted, cells = self._open(adata, unseen, genes_present)
        return scoring.log_prob(fitted, cells, n_samples=n_samples, refine=refine, seed=seed)

    def outliers(
        self, adata: CellsLike, *, unseen: str = "refuse", genes_present: float = 0.8, seed: int = 0
    ) -> pd.DataFrame:
        """Say how unusual each cell is, compared with held-out cells of the same depth and batch.

        Each cell has four readings: ``-log p(x)``; its distance in the latent space to training cells; and how much
        better two typical profiles together, or the mean of all, explain its counts than its own profile does. They are
        standardised given log library size and batch. The score joins all but that of two profiles (Fisher 1925), and
        is compared with those of held-out cells.

        Parameters
        ----------
        adata
            The cells.
        unseen, genes_present
            As in `posterior`.
        seed
            Seed of all random draws.

        Returns
        -------
        pandas.DataFrame
            By cell: ``log_p``, as `log_prob` estimates it from few samples; ``score``, high for an unusual cell;
            ``p_value`` and ``q_value``; ``kind``: "usual" (q above .1), or "doublet-like", "ambient-like", "unseen
            type", "unexplained" after the most extreme reading, or "low-depth"; the standardised readings ``unlikely,
            distance, mixture, ambient``; and ``top_genes``, the genes that surprise most, with + where there is more of
            a gene than expected. If the cells lack genes of the model, log p(x) is of the other genes, and ``unlikely``
            does not count (NaN). A cell without a count is "empty", and has NaN.

        Raises
        ------
        UsageError
            If the model keeps no reference cells, fewer than 30 cells were held out, or it is a plain autoencoder.

        Examples
        --------
        >>> import celbo
        >>> adata = celbo.simulate_cells(n_cells=500, n_genes=80, seed=0)
        >>> model = celbo.ExpressionVAE(latent_dim=3, train=celbo.TrainConfig(max_epochs=20)).fit(adata)
        >>> table = model.outliers(adata[:50])
        >>> table["p_value"].between(0, 1).all()
        np.True_
        """
        return outliers.outliers(*self._open(adata, unseen, genes_present), seed=seed)

    def expected_expression(
        self,
        adata: CellsLike,
        *,
        given: Mapping[str, Any] | None = None,
        over: Sequence[str] = (),
        library: float | None = None,
    ) -> Array:
        """Return denoised expression: the mean of p(x | mu_z, c), for each cell and gene of the model.

        Parameters
        ----------
        adata
            The cells.
        given
            Conditions to decode under, the same for all cells: ``{"batch": "A"}`` corrects for batch. The position of
            a cell always comes from its own conditions.
        over
            Conditions over whose levels to take the mean with equal weights: ``["batch"]`` removes the effect of the
            batch without choosing one batch. Levels that `map_query` added do not count, so that the result for a cell
            stays the same.
        library
            Library size to decode at, the same for all cells; each cell's own if None. 1 gives expression shares (for
            zinb less than that, because of the zeros that its gate adds). For count likelihoods only.

        Returns
        -------
        numpy.ndarray
            ``(cells, genes)``, columns in the order of ``schema_.genes``: counts, detection probabilities or
            log-normalised values, depending on the likelihood.
        """
        return scoring.expected_expression(*self._open(adata), given=given, over=over, library=library)

    def differential_expression(
        self,
        adata: CellsLike,
        *,
        groupby: Groups,
        group: str | None = None,
        reference: str | None = None,
        least_change: float = 0.25,
        pair_by: Groups | None = None,
        over: Sequence[str] | None = None,
        n_samples: int = 10,
        seed: int = 0,
    ) -> pd.DataFrame:
        """Find genes that differ between groups of cells, with the size of the change and its uncertainty.

        The fold change compares the groups' mean shares of expression: as the model decodes them, corrected by the
        counts, and shrunk towards the distribution of the fold changes of all genes. It describes these cells. Cells
        cannot say whether other donors would show the change (`celbo.pseudobulk`).

        Parameters
        ----------
        adata
            The cells.
        groupby
            What groups the cells: a column of obs, or a value for each cell (a Series, a list, an array, or a mask,
            whose groups are "True" and "False"). A Series with the names of the cells as index is aligned by name.
        group
            Group to compare; each group in turn if None.
        reference
            Group to compare it with; all other cells if None.
        least_change
            Smallest log2 fold change that matters.
        pair_by
            Column of obs, such as donor, or a value for each cell. Groups are compared within each of its levels that
            has both, and the mean of these contrasts is returned.
        over
            Conditions over whose levels (of fit) to take the mean; the categorical nuisances if None. Each cell keeps
            its own level of the other conditions.
        n_samples
            Draws of z for each cell.
        seed
            Seed of the draws.

        Returns
        -------
        pandas.DataFrame
            By gene, surest first: ``group``, ``reference``, mean shares of both, ``log2_fold_change`` and its 90 %
            interval, ``probability`` that it is beyond ``least_change``, ``fdr``: the expected share of false positives
            among this gene and surer ones; and the fold change before shrinkage. Genes that the cells lack, and groups
            of one cell or without a partner in any level of ``pair_by``, are left out. A warning names groups that
            share no level of a categorical nuisance with what they are compared with: nothing can be told about them.

        Raises
        ------
        UsageError
            If the column or a group does not exist, a group has fewer than 2 cells, or the model is not of counts.

        Examples
        --------
        >>> import celbo
        >>> adata = celbo.simulate_cells(n_cells=400, n_genes=60, seed=0)
        >>> model = celbo.ExpressionVAE(latent_dim=3, train=celbo.TrainConfig(max_epochs=20)).fit(adata)
        >>> table = model.differential_expression(adata, groupby="cell_type", group="type_0", reference="type_1")
        >>> table.columns[4:].tolist()  # doctest: +NORMALIZE_WHITESPACE
        ['log2_fold_change', 'lower', 'upper', 'probability', 'fdr', 'raw_log2_fold_change']
        """
        fitted, cells = self._open(adata)
        groups: dict[str, Any] = {"groupby": groupby, "group": group, "reference": reference, "pair_by": pair_by}
        draws: dict[str, Any] = {"over": over, "n_samples": n_samples, "seed": seed}
        return differential.differential_expression(fitted, cells, least_change=least_change, **groups, **draws)

    def counterfactual(
        self,
        adata: CellsLike,
        given: Mapping[str, Any],
        *,
        others: "Sequence[ExpressionVAE]" = (),
        n_samples: int = 50,
        seed: int = 0,
    ) -> Counterfactual:
        """Predict what these cells would look like if conditions were different.

        Each cell is encoded under its own conditions and decoded under those of ``given`` (its other conditions stay),
        at its own library size, with the same draws of z, so that differences come from the conditions. ``support``
        says for each cell whether fit saw such cells near it.

        Parameters
        ----------
        adata
            The cells.
        given
            Conditions and their new values: ``{"stim": "stim"}``, or ``{"dose": 2.5}``.
        others
            Models of the same genes and conditions, such as from other seeds, whose answers have the same weight.
            Intervals then include the disagreement between models.
        n_samples
            Draws of z for each cell and model.
        seed
            Seed of the draws.

        Returns
        -------
        celbo.ask.counterfactual.Counterfactual

        Raises
        ------
        UsageError
            If the model does not have a condition, a condition had a single level in fit, or the model keeps no
            reference cells.
        DataError
            If fit did not see a level.

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
        others = list(others) if isinstance(others, Iterable) else [others]
        if not all(isinstance(other, ExpressionVAE) for other in others):
            raise UsageError("others is a list of fitted models, as celbo.load reads them: others=[model].")
        fitted, cells = self._open(adata)
        options: dict[str, Any] = {"others": [other.fitted_ for other in others], "n_samples": n_samples, "seed": seed}
        counterfactual.refuse_single_levels(fitted.schema, (*self.conditions, *self.nuisance), given)
        return counterfactual.counterfactual(fitted, cells, given, **options)

    def predict(self, adata: CellsLike, *, unseen: str = "refuse", genes_present: float = 0.8) -> pd.DataFrame:
        """Predict cell labels, and which cells match none of the known labels.

        Parameters
        ----------
        adata
            The cells.
        unseen, genes_present
            As in `posterior`.

        Returns
        -------
        pandas.DataFrame
            By cell: ``label`` ("none of these" where ``p_known`` is below .01); ``probability`` of the most probable
            label (calibrated on held-out labelled cells); ``p_known``, the probability that a cell of a known label
            lies as far from the labelled cells (`celbo.ask.labels.predictions`); ``unlike``, whether the cell is unlike
            the cells of fit (`celbo.ask.unlike.unlike`; left out if the model cannot tell); then a column of
            probabilities for each label. A cell without a count has NaN for all numbers.

        Raises
        ------
        UsageError
            If the model was fitted without labels, or keeps no reference cells.

        Examples
        --------
        >>> import celbo
        >>> adata = celbo.simulate_cells(n_cells=500, n_genes=80, type_strength=2.0, seed=0)
        >>> adata.obs["known"] = adata.obs["cell_type"].astype(str).where(adata.obs_names.str[-1] < "3", "unknown")
        >>> model = celbo.ExpressionVAE(latent_dim=4, labels="known", train=celbo.TrainConfig(max_epochs=30)).fit(adata)
        >>> model.predict(adata).columns[:4].tolist()
        ['label', 'probability', 'p_known', 'unlike']
        """
        return labels.predict(*self._open(adata, unseen, genes_present))

    def map_query(
        self, adata: CellsLike, *, genes_present: float = 0.8, progress: bool = True, track: Track | None = None
    ) -> "ExpressionVAE":
        """Add new batches to this model, without changing a bit of what it knows (surgery, as in scArches).

        New levels of categorical conditions get their own weights. These start as the mean of the known levels' weights
        and are trained on the given cells; all other weights stay. Remedies that change what training maximises (beta,
        free bits, ...) apply again, schedules do not. Cells of known levels need no training. The
        reference cells stay those of fit: `sample` does not draw from cells of a new level, and support does not count
        them. A new level that has few cells, or is spelt nearly like a known one, gets a warning.

        Parameters
        ----------
        adata
            The cells.
        genes_present
            Share of the model's genes that must be present. The model fills in the others by what it expects of them.
        progress, track
            As in `fit`. An interrupt ends the mapping with a `KeyboardInterrupt`, and nothing is kept.

        Returns
        -------
        ExpressionVAE
            A model that knows the new levels too; this model, if there are none.

        Raises
        ------
        UsageError
            If the model normalises over minibatches, so that new cells would change what it knows.
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
        fitted, cells = mapping.map_query(
            self.fitted_, adata, genes_present=genes_present, progress=progress, track=track
        )
        warn_of_unlike(fitted, cells)
        model = self if fitted is self.fitted_ else copy(self)
        model.fitted_ = fitted
        return model

    def sample(
        self,
        n: int,
        *,
        conditions: Mapping[str, Any] | None = None,
        source: str = "aggregated",
        around: CellsLike | None = None,
        library: float | None = None,
        seed: int = 0,
    ) -> AnnData:
        """Draw new cells, ``x ~ p(x | z, c, l)``, with the likelihood's own noise.

        Parameters
        ----------
        n
            How many cells.
        conditions
            Conditions and their values: ``{"stim": "ctrl"}``. Other conditions occur as they do among cells of fit that
            have these.
        source
            Source of z: "aggregated", the posterior of a cell of fit that has the conditions; "mixture", a Gaussian
            mixture fitted to such posteriors; or "prior", which cells of fit seldom fill evenly.
        around
            Cells to draw around, from their posteriors and at their library sizes, each equally often: a posterior
            predictive check. They replace the cells of fit.
        library
            Library size of all cells. If None, it is that of the cell whose posterior z is from, or of one near z.
        seed
            Seed of all random draws.

        Returns
        -------
        anndata.AnnData
            Sparse counts over the model's genes (dense real numbers from a Gaussian). obs has the conditions and
            ``library``, obsm["z"] the latent.

        Raises
        ------
        UsageError
            If n is below 1, the model does not have a condition, no cell of fit has the conditions, or the model keeps
            no reference cells.
        DataError
            If fit did not see a level.

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
        cells = None if around is None else self._open(around)[1]
        chosen: dict[str, Any] = {"conditions": conditions, "source": source, "library": library, "seed": seed}
        return generate.sample(self.fitted_, n, around=cells, **chosen)

    def interpolate(
        self,
        start: CellsLike,
        end: CellsLike,
        *,
        n_points: int = 11,
        given: Mapping[str, Any] | None = None,
        library: float | None = None,
    ) -> AnnData:
        """Decode means along the line from one cell, or the mean of a group, to another in the latent space.

        Parameters
        ----------
        start, end
            Cells; of several cells the mean of mu_z is taken.
        n_points
            Points on the line, both ends included.
        given
            Conditions to decode under. Other conditions go gradually from those of the start to those of the end.
        library
            Library size to decode at; expression shares if None. For count likelihoods only.

        Returns
        -------
        anndata.AnnData
            The means. obs["position"] goes from 0 to 1, and obsm["z"] is the line.

        Examples
        --------
        >>> import celbo
        >>> adata = celbo.simulate_cells(n_cells=300, n_genes=60, seed=0)
        >>> model = celbo.ExpressionVAE(latent_dim=3, train=celbo.TrainConfig(max_epochs=5)).fit(adata)
        >>> model.interpolate(adata[:1], adata[1:2], n_points=5).obs["position"].tolist()
        [0.0, 0.25, 0.5, 0.75, 1.0]
        """
        ends = [self._open(cells)[1] for cells in (start, end)]
        return generate.interpolate(self.fitted_, ends, n_points=n_points, given=given, library=library)

    def diagnose(self, adata: CellsLike, *, groupby: Groups | None = None, seed: int = 0) -> Diagnosis:
        """Look for posterior collapse and related faults: a latent without information, a condition that is ignored.

        If these are the cells of fit, everything is measured on the cells that were held out; else on all cells (at
        most 10,000). Simpler models, learned from the other cells, are the comparison.

        Parameters
        ----------
        adata
            The cells of fit, or others.
        groupby
            Column of obs with known types, or the type of each cell, as `differential_expression` takes groups. Leakage
            of conditions into z is then measured within types.
        seed
            Seed of all random draws.

        Returns
        -------
        celbo.trust.advice.Diagnosis
            It prints a verdict in one line, then the findings, worst first, then remedies in the order to try them.

        Examples
        --------
        >>> import celbo
        >>> adata = celbo.simulate_cells(n_cells=500, n_genes=100, median_library=1000, seed=0)
        >>> model = celbo.ExpressionVAE(latent_dim=4, train=celbo.TrainConfig(max_epochs=30)).fit(adata)
        >>> model.diagnose(adata).collapsed
        False
        """
        return diagnosing.diagnose(*self._open(adata), groupby=groupby, seed=seed)

    def recipe(self) -> Recipe:
        """Combine `remedies` into one training recipe; raise a `UsageError` with their table if they cannot be used."""
        return fit_options.recipe_of(self.get_params(), fit_options.defaults_of(self))

    def save(self, path: str | Path, *, keep_reference: bool = True) -> None:
        """Write the model folder: JSON and safetensors with checksums, in one step or not at all.

        Parameters
        ----------
        path
            The folder. A model that is already there is replaced.
        keep_reference
            Whether to keep the latent positions of the cells of fit (no counts, no names).

        Raises
        ------
        StorageError
            If the folder cannot be written. An older model there stays whole.
        """
        write_fitted(path, self.fitted_, keep_reference=keep_reference)

    def options(self) -> dict[str, Any]:
        """Return the options of this model as plain values."""
        return fit_options.plain_options(self.get_params())

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the options by name, as scikit-learn's estimators do; ``deep`` changes nothing."""
        return {name: getattr(self, name) for name in fit_options.defaults_of(self)}

    def set_params(self, **params: Any) -> "ExpressionVAE":
        """Set options by name, as scikit-learn's estimators do; return the model itself."""
        fit_options.check_options(params, self.get_params())
        for name, value in params.items():
            setattr(self, name, value)
        return self

    def __repr__(self) -> str:
        """Show the options that differ from the defaults, and what the model was fitted to."""
        return shown_model(self.get_params(), fit_options.defaults_of(self), self.__dict__.get("fitted_"))

    def _repr_html_(self) -> str:
        """Show the same as a small table in a notebook."""
        return shown_table(self.get_params(), fit_options.defaults_of(self), self.__dict__.get("fitted_"))

    def __getattr__(self, name: str) -> Any:
        """Give access to what `fit` made; say what to do if the model is not fitted."""
        if name not in fit_options.MADE_BY_FIT:
            raise AttributeError(no_attribute(type(self), name))
        return fit_options.made_by_fit(self.__dict__.get("fitted_"), name)

    def _open(self, adata: CellsLike, unseen: str = "refuse", genes_present: float = 0.8) -> tuple[Fitted, Cells]:
        """Open cells for this model; options as in `posterior`."""
        return mapping.open_any(self.fitted_, adata, unseen=unseen, genes_present=genes_present)

    def _parts(self) -> dict[str, Any]:
        """Turn options into the objects that a fit takes, and refuse options that cannot be used."""
        return fit_options.parts_of(self.get_params(), fit_options.defaults_of(self))


def load(path: str | Path) -> ExpressionVAE:
    """Read a fitted model from its folder, or from the folder of a run; nothing in it is executed.

    Parameters
    ----------
    path
        A folder that `ExpressionVAE.save` or ``celbo fit`` wrote.

    Returns
    -------
    ExpressionVAE
        On the CPU.

    Raises
    ------
    ModelFileError
        If the folder is damaged, forged, or written by a newer celbo.
    """
    folder = read_folder(path)
    try:
        options = modern_options(folder.document["options"], fit_options.defaults_of(ExpressionVAE))
        model = ExpressionVAE(**{**options, "train": TrainConfig(**options["train"])})
        fitted = read_fitted(folder, **model._parts())
        model.fitted_ = replace(fitted, options=model.options())
    except (KeyError, TypeError, ValueError, OverflowError, RuntimeError, UsageError) as error:
        raise ModelFileError(
            f"{path}: model.json does not describe a model ({error}); save the model again."
        ) from error
    take_weights(model.fitted_, folder, path)
    return model
