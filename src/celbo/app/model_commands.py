"""Commands that ask a fitted model about cells, and write the answer to a file.

Commands import what they need when they run, so that ``celbo --help`` does not load torch.
"""

from typing import Any

import celbo
from celbo import checkpoint
from celbo.app import options
from celbo.app.commands import (
    Reading,
    cells_for,
    conditions_of,
    new_levels,
    refuse_overwriting_data,
    refuse_overwriting_run,
)
from celbo.app.terminal import say, stop_on_signal, until_signal
from celbo.errors import UsageError

__all__ = ["counterfactual", "de", "embed", "express", "map_cells", "predict", "sample", "score"]

_FDR = 0.05
"""False discovery rate at which changed genes are counted."""


def embed(
    run: options.Run,
    data: options.Data,
    output: options.OutCells,
    unseen: options.Unseen = "refuse",
    genes_present: options.GenesPresent = 0.8,
    gene_column: options.GeneColumn = None,
    make_unique: options.MakeUnique = False,
    na_as_level: options.NaAsLevel = False,
    on_disk: options.OnDisk = False,
) -> None:
    """Place cells in the latent space of a fitted model. Genes are matched by name.

    `celbo embed run new.h5ad -o new_embedding.h5ad`

    The file has the cells' names and obs, **obsm["X_celbo"]** (posterior means) and **obsm["X_celbo_sd"]** (their
    standard deviations), but no counts. **obs["celbo_unlike"]** says which cells are unlike those of fit.
    """
    from celbo.ask.mapping import open_any
    from celbo.ask.unlike import warn_of_unlike
    from celbo.runs.answers import check_embedding_path, write_embedding
    from celbo.runs.run_folder import embedding

    refuse_overwriting_data(output, data)
    check_embedding_path(output)
    if output.exists() and output.name == "embedding.h5ad" and checkpoint.is_model_folder(output.parent / "model"):
        raise UsageError(f"{output} is the embedding of a run, which would be lost; name another file with -o.")
    model = celbo.load(run)
    adata = cells_for(model, data, Reading(gene_column, make_unique, na_as_level, on_disk))
    fitted, opened = open_any(model.fitted_, adata, unseen=unseen, genes_present=genes_present)
    cells = embedding(fitted, opened, adata.obs, warn_of_unlike(fitted, opened))
    write_embedding(cells, output)
    say(f"{cells.n_obs:,} cells, {model.latent_dim} latent dimensions: {output}")


def express(
    run: options.Run,
    data: options.Data,
    output: options.OutExpression,
    given: options.GivenConditions = None,
    over: options.Over = None,
    library: options.SameLibrary = None,
    gene: options.Genes = None,
    genes: options.GenesFile = None,
    unseen: options.Unseen = "refuse",
    genes_present: options.GenesPresent = 0.8,
    gene_column: options.GeneColumn = None,
    make_unique: options.MakeUnique = False,
    na_as_level: options.NaAsLevel = False,
    on_disk: options.OnDisk = False,
) -> None:
    """Write the denoised expression of cells, corrected for the conditions that you name.

    `celbo express run counts.h5ad --over batch -o corrected.h5ad`

    **X** has the mean of each gene without the noise of counting: under the cell's own conditions, under those of
    `--given`, or the mean over the levels of `--over`. **obs** and **var** are those of the cells. X is written in
    blocks of cells, so it may be larger than the memory.
    """
    from celbo.ask.mapping import open_any
    from celbo.ask.scoring import expression_blocks
    from celbo.runs.answers import check_expression_path, write_expression
    from celbo.runs.expression import chosen_genes, expression_frame

    refuse_overwriting_data(output, data)
    check_expression_path(output)
    model = celbo.load(run)
    columns = chosen_genes(model.schema_, gene or (), genes)
    conditions = conditions_of(model, given or (), "--given")
    adata = cells_for(model, data, Reading(gene_column, make_unique, na_as_level, on_disk))
    fitted, opened = open_any(model.fitted_, adata, unseen=unseen, genes_present=genes_present)
    how: dict[str, Any] = {"given": conditions, "over": list(over or ()), "library": library}
    blocks = expression_blocks(fitted, opened, **how)
    cells = expression_frame(fitted, opened, adata, columns, how)
    if gene or genes is not None:
        blocks = (block[:, columns] for block in blocks)
    write_expression(cells, until_signal(blocks), output)
    say(f"{cells.n_obs:,} cells x {cells.n_vars:,} genes: {output}")


def map_cells(
    run: options.Run,
    data: options.Data,
    output: options.OutFolder,
    genes_present: options.GenesPresent = 0.8,
    gene_column: options.GeneColumn = None,
    make_unique: options.MakeUnique = False,
    na_as_level: options.NaAsLevel = False,
    on_disk: options.OnDisk = False,
) -> None:
    """Add the batches of new cells to a fitted model. Results for the known batches stay the same to the bit.

    `celbo map run new.h5ad -o mapped`

    New levels of conditions get weights of their own; all other weights stay. The folder gets **model/** and
    **embedding.h5ad** (of the new cells).
    """
    from celbo.ask.mapping import map_query
    from celbo.ask.unlike import warn_of_unlike
    from celbo.fit.progress import shown_progress
    from celbo.runs.answers import write_embedding
    from celbo.runs.claims import claimed_folder
    from celbo.runs.run_folder import embedding

    refuse_overwriting_run(run, output)
    if (output / "run.json").exists():
        raise UsageError(f"{output} has a run that celbo fit wrote, and would lose its model; name another folder.")
    model = celbo.load(run)
    adata = cells_for(model, data, Reading(gene_column, make_unique, na_as_level, on_disk))
    with claimed_folder(output, data):
        with shown_progress() as track:
            before = model.fitted_
            model.fitted_, opened = map_query(before, adata, genes_present=genes_present, track=stop_on_signal(track))
            cells = embedding(model.fitted_, opened, is_unlike=warn_of_unlike(model.fitted_, opened))
        model.save(output / "model")
        (output / "embedding.h5ad").resolve().unlink(missing_ok=True)  # of the model that was there
        write_embedding(cells, output / "embedding.h5ad")
    if model.fitted_ is before:
        say("the model knows every level of the conditions: nothing was trained")
    else:
        learned = ", ".join(new_levels(before.schema, model.schema_, adata))
        say(f"learned levels, with their numbers of cells: {learned}")
    say(f"cells mapped: {adata.n_obs:,}: {output}")


def predict(
    run: options.Run,
    data: options.Data,
    output: options.OutTable,
    unseen: options.Unseen = "refuse",
    genes_present: options.GenesPresent = 0.8,
    gene_column: options.GeneColumn = None,
    make_unique: options.MakeUnique = False,
    na_as_level: options.NaAsLevel = False,
    on_disk: options.OnDisk = False,
) -> None:
    """Predict the labels of cells with a model that was fitted with --labels.

    `celbo predict run new.h5ad -o labels.csv`

    The table has a line per cell: **label** (or "none of these"), **probability**, **p_known**, and the probability
    of each label.
    """
    from celbo.runs.answers import check_table_path, write_table

    check_table_path(output, "predict")
    model = celbo.load(run)
    adata = cells_for(model, data, Reading(gene_column, make_unique, na_as_level, on_disk))
    labels = model.predict(adata, unseen=unseen, genes_present=genes_present)
    write_table(labels, output, "predict")
    n_none, n_empty = int((labels["label"] == "none of these").sum()), int(labels["label"].isna().sum())
    empty = f", {n_empty:,} without a count" if n_empty else ""
    undecided = "" if labels["p_known"].notna().any() else " (p_known could not be computed)"
    say(f"{len(labels):,} cells, {n_none:,} of them none of these{undecided}{empty}: {output}")


def score(
    run: options.Run,
    data: options.Data,
    output: options.OutTable,
    outliers: options.Outliers = False,
    refine: options.Refine = False,
    unseen: options.Unseen = "refuse",
    genes_present: options.GenesPresent = 0.8,
    gene_column: options.GeneColumn = None,
    make_unique: options.MakeUnique = False,
    na_as_level: options.NaAsLevel = False,
    on_disk: options.OnDisk = False,
    n_samples: options.DrawsPerCell = None,
    seed: options.Seed = 0,
) -> None:
    """Compute how likely each cell is, log p(x) in nats, or how unusual.

    `celbo score run new.h5ad -o scores.csv`

    The table has a line per cell: **log_p**, its standard error **se**, the effective number of draws **ess**,
    **trusted**. With `--outliers`: **score**, **p_value**, **q_value**, **kind** (doublet-like, ...), **top_genes**.
    """
    from celbo.runs.answers import check_table_path, write_table

    check_table_path(output, "score")
    if outliers and (refine or n_samples is not None):
        raise UsageError("--refine and --n-samples are about log p(x), not about --outliers; leave one of them out.")
    model = celbo.load(run)
    adata = cells_for(model, data, Reading(gene_column, make_unique, na_as_level, on_disk))
    if outliers:
        table = model.outliers(adata, unseen=unseen, genes_present=genes_present, seed=seed)
        counts = table["kind"].value_counts()
        summary = ", ".join(f"{n:,} {kind}" for kind, n in counts.items())
    else:
        table = model.log_prob(
            adata,
            n_samples=500 if n_samples is None else n_samples,
            refine=refine,
            unseen=unseen,
            genes_present=genes_present,
            seed=seed,
        )
        n_empty = int(table["log_p"].isna().sum())
        n_doubtful = int((~table["trusted"]).sum()) - n_empty
        advice = "more draws (--n-samples)" if refine else "--refine, or more draws (--n-samples)"
        summary = f"{len(table):,} cells, mean log p(x) {table['log_p'].mean():,.2f} nats"
        summary += f"; {n_doubtful:,} cells with too few effective draws to trust: try {advice}" if n_doubtful else ""
        summary += f"; {n_empty:,} without a count" if n_empty else ""
    write_table(table, output, "score")
    say(f"{summary}: {output}")


def counterfactual(
    run: options.Run,
    data: options.Data,
    output: options.OutCells,
    conditions: options.NewConditions,
    sample: options.DrawCounts = False,
    other: options.Others = None,
    gene_column: options.GeneColumn = None,
    make_unique: options.MakeUnique = False,
    na_as_level: options.NaAsLevel = False,
    on_disk: options.OnDisk = False,
    n_samples: options.DrawsPerModel = 50,
    seed: options.Seed = 0,
) -> None:
    """Compute the expression of cells as if a condition were different.

    `celbo counterfactual run cells.h5ad --set treatment=treated -o treated.h5ad`

    **X** is the mean of each gene, **layers** "lower" and "upper" its 90 % interval over the posterior of z. **obs**
    says per cell whether fit saw similar cells under the new condition (`celbo_verdict`: supported, edge,
    extrapolation; empty without a count), **var** how each gene changes.
    """
    from celbo.runs.answers import check_counterfactual_path, write_counterfactual

    refuse_overwriting_data(output, data)
    check_counterfactual_path(output)
    model = celbo.load(run)
    given = conditions_of(model, conditions, "--set")
    runs = [run, *(other or ())]
    if len({path.resolve() for path in runs}) < len(runs):
        raise UsageError("--other names a run twice, or the run itself; name runs of other seeds, each once.")
    adata = cells_for(model, data, Reading(gene_column, make_unique, na_as_level, on_disk))
    others = [celbo.load(path) for path in other or ()]
    answer = model.counterfactual(adata, given, others=others, n_samples=n_samples, seed=seed)
    write_counterfactual(answer, adata, output, sample=sample, seed=seed)
    counts = answer.support["verdict"].value_counts()
    verdicts = ["supported", "edge", "extrapolation", *(["empty"] if "empty" in counts else [])]
    summary = ", ".join(f"{counts.get(verdict, 0):,} {verdict}" for verdict in verdicts)
    say(f"{adata.n_obs:,} cells under {', '.join(conditions)}: {summary}: {output}")


def de(
    run: options.Run,
    data: options.Data,
    output: options.OutTable,
    groupby: options.GroupBy,
    group: options.Group = None,
    reference: options.Reference = None,
    least_change: options.LeastChange = 0.25,
    pair_by: options.PairBy = None,
    gene_column: options.GeneColumn = None,
    make_unique: options.MakeUnique = False,
    na_as_level: options.NaAsLevel = False,
    on_disk: options.OnDisk = False,
    seed: options.Seed = 0,
) -> None:
    """Find the genes that differ between groups of cells, by how much, and how sure that is.

    `celbo de run counts.h5ad --groupby cell_type -o genes.csv`

    The table has a line per gene, surest first: **log2_fold_change** with its 90 % interval, **probability** that it
    is beyond `--least-change`, **fdr**. Cells are not independent donors: for other donors, add up the counts of each
    donor (`celbo.pseudobulk`).
    """
    from celbo.runs.answers import check_table_path, write_table

    check_table_path(output, "de")
    model = celbo.load(run)
    adata = cells_for(model, data, Reading(gene_column, make_unique, na_as_level, on_disk))
    genes = model.differential_expression(
        adata,
        groupby=groupby,
        group=group,
        reference=reference,
        least_change=least_change,
        pair_by=pair_by,
        seed=seed,
    )
    write_table(genes, output, "de")
    n_changed = int((genes["fdr"] <= _FDR).sum())
    n_groups, n_genes = genes["group"].nunique(), genes.index.nunique()
    changes = (
        f"{n_changed:,} of {n_genes:,} genes change" if n_groups == 1 else f"{n_changed:,} changes in {n_groups} groups"
    )
    say(f"{changes} by log2 {least_change:g} or more at a false discovery rate of {_FDR:.0%}: {output}")


def sample(
    run: options.Run,
    output: options.OutCells,
    n: options.NCells = 1000,
    given: options.GivenConditions = None,
    source: options.Source = "aggregated",
    library: options.Library = None,
    seed: options.Seed = 0,
) -> None:
    """Draw new cells from a fitted model, with the noise of its likelihood.

    `celbo sample run -n 1000 --given stim=ctrl -o new.h5ad`

    **X** has counts over the model's genes, **obs** the conditions and library sizes, **obsm["z"]** the latent
    positions.
    """
    from celbo.runs.answers import check_sample_path, write_sample

    check_sample_path(output)
    model = celbo.load(run)
    conditions = conditions_of(model, given or (), "--given")
    cells = model.sample(n, conditions=conditions, source=source, library=library, seed=seed)
    write_sample(cells, output)
    say(f"{cells.n_obs:,} cells x {cells.n_vars:,} genes, drawn: {output}")
