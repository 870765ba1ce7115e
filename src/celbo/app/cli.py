"""The command line: parse, one call, write. Data and JSON go to stdout, talk to stderr.

Commands import what they need when they run, so that ``celbo --help`` costs no torch.
"""

import json
import time
import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import celbo
from celbo import checkpoint
from celbo.app.commands import (
    Reading,
    cells_for,
    chosen_options,
    compare_with_record,
    conditions_of,
    describe,
    fit_and_write,
    make_model,
    new_levels,
    open_run,
    read_cells,
    refuse_options_of_fit,
    refuse_same_run,
    refuse_the_data,
    show_trail,
)
from celbo.app.options import (
    AllowNoninteger,
    AsJson,
    Conditions,
    Config,
    DataPath,
    GeneColumn,
    GenesPresent,
    Interactions,
    Labels,
    Layer,
    LikelihoodToFit,
    MakeUnique,
    NaAsLevel,
    Nuisance,
    OnDisk,
    OutFolder,
    RunPath,
    Seed,
    SizeFactor,
    Unlabelled,
    Unseen,
)
from celbo.app.terminal import ending_when_told, guarded, plain, say, shown_warnings
from celbo.errors import DataError, UsageError

__all__ = ["app", "main"]

app = typer.Typer(
    name="celbo",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

_FDR = 0.05
"""At which changed genes are counted."""
N_TOP_GENES = 4000
"""Genes that `celbo fit` models at most unless told otherwise."""


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"celbo {celbo.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Say it.")] = False,
) -> None:
    """Variational autoencoders for transcriptomics: counts in, latent space out.

    Try it: `celbo demo` simulates cells, fits them, and says what to open.

    Then: `celbo fit counts.h5ad -o run` and open `run/report.html`.
    """


@app.command()
def check(
    ctx: typer.Context,
    data: DataPath,
    model: Annotated[Path | None, typer.Option(help="A run, or its model folder, that is to read these cells.")] = None,
    condition: Conditions = None,
    nuisance: Nuisance = None,
    interaction: Interactions = None,
    likelihood: LikelihoodToFit = "nb",
    labels: Labels = None,
    unlabelled: Unlabelled = "unknown",
    layer: Layer = None,
    size_factor: SizeFactor = None,
    allow_noninteger: AllowNoninteger = False,
    gene_column: GeneColumn = None,
    make_unique: MakeUnique = False,
    na_as_level: NaAsLevel = False,
    on_disk: OnDisk = False,
    unseen: Unseen = "refuse",
    genes_present: GenesPresent = 0.8,
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """Look at every value, name and condition, and say what is wrong, where, and what to do; nothing is trained.

    `celbo check counts.h5ad --condition batch` before `celbo fit` with the same options

    `celbo check new.h5ad --model run` before `celbo embed`

    The exit code is 3 if something must be mended. `celbo fit` and `celbo embed` look at the same things first.
    """
    from celbo.data.checks import Check, check_query

    try:
        if model is not None:
            refuse_options_of_fit(ctx)
            fitted = celbo.load(model)
            adata = cells_for(fitted, data, Reading(gene_column, make_unique, na_as_level, on_disk))
            found = check_query(adata, fitted.schema_, unseen=unseen, genes_present=genes_present)
        else:
            chosen, reading = chosen_options(ctx, config)
            if chosen["model"].get("likelihood") == "auto":  # among those of counts
                del chosen["model"]["likelihood"]
            unfitted = make_model(chosen)
            found = unfitted.check(
                read_cells(data, reading, unfitted.layer, [*unfitted.conditions, *unfitted.nuisance])
            )
    except DataError as error:  # nothing could be looked at
        found = Check(0, 0)
        found.add("unreadable", "error", str(error))
    document = {"path": str(data), "celbo_version": celbo.__version__, **found.to_json()}
    if as_json:
        typer.echo(json.dumps(document, indent=1, ensure_ascii=False))
    else:
        size = f"{found.n_cells:,} cells x {found.n_genes:,} genes, {found.n_values:,} stored values"
        typer.echo(plain(f"{data}: {size}"))
        for problem in found.problems:
            typer.echo(plain(f"{problem.severity} ({problem.name}): {problem.message}"))
        if not found.errors:
            typer.echo("ready to embed" if model else "ready to fit")
    if found.errors:
        raise typer.Exit(DataError.exit_code)


@app.command()
def fit(
    ctx: typer.Context,
    data: DataPath,
    output: OutFolder,
    condition: Conditions = None,
    nuisance: Nuisance = None,
    interaction: Interactions = None,
    likelihood: LikelihoodToFit = "nb",
    labels: Labels = None,
    unlabelled: Unlabelled = "unknown",
    n_top_genes: Annotated[
        int | None,
        typer.Option(
            help="Most variable genes to model, chosen within levels of the first nuisance or condition; 0 for all.  "
            f"[default: {N_TOP_GENES} if there are more]"
        ),
    ] = None,
    layer: Layer = None,
    size_factor: SizeFactor = None,
    allow_noninteger: AllowNoninteger = False,
    dispersion: Annotated[
        str, typer.Option(help="Theta by gene, gene-condition or gene-cell (nb, zinb); fixed: sigma = 1 (gaussian).")
    ] = "gene",
    objective: Annotated[str, typer.Option(help="vae, or autoencoder: no KL, no sampling.")] = "vae",
    latent_dim: Annotated[
        str, typer.Option(help="Width of the latent space; auto for the least that explains held-out counts as well.")
    ] = "10",
    hidden_dim: Annotated[
        list[int] | None, typer.Option(help="Width of a hidden layer; repeat for more layers.  [default: 128]")
    ] = None,
    encode_context: Annotated[bool, typer.Option(help="Whether the encoder sees the conditions too.")] = True,
    skip: Annotated[
        bool, typer.Option("--skip", help="Give z to every hidden layer of the decoder; needs two.")
    ] = False,
    norm: Annotated[str, typer.Option(help="Normalisation of hidden layers: none, layer or batch.")] = "layer",
    dropout: Annotated[float, typer.Option(help="Share of hidden units zeroed in training.")] = 0.2,
    prior: Annotated[str, typer.Option(help="normal, conditional, mixture:20 or vamp:100.")] = "normal",
    epochs: Annotated[
        int | None,
        typer.Option(help="Passes over the cells at most.  [default: 100; 10 to 200 by the number of cells]"),
    ] = None,
    patience: Annotated[int, typer.Option(help="Epochs without a better held-out ELBO before stopping.")] = 10,
    batch_size: Annotated[int, typer.Option(help="Cells of a minibatch.")] = 128,
    warmup_fraction: Annotated[
        float, typer.Option(help="Share of the planned run over which the KL weight rises; half at most.")
    ] = 0.25,
    learning_rate: Annotated[float, typer.Option(help="Of Adam, after a rise over 100 steps.")] = 1e-2,
    validation_fraction: Annotated[float, typer.Option(help="Share of the cells held out.")] = 0.1,
    gene_column: GeneColumn = None,
    make_unique: MakeUnique = False,
    na_as_level: NaAsLevel = False,
    on_disk: OnDisk = False,
    keep_reference: Annotated[
        bool, typer.Option(help="Keep the cells' latent positions in the model folder (no counts, no names).")
    ] = True,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    threads: Annotated[int | None, typer.Option(help="Processor threads.")] = None,
    remedy: Annotated[
        list[str] | None,
        typer.Option(help="Remedy for posterior collapse, e.g. free_bits:0.1; repeat for more. 'list' shows them all."),
    ] = None,
    auto_remedy: Annotated[
        bool, typer.Option("--auto-remedy", help="If the latent space collapsed, do what `celbo cure` does.")
    ] = False,
    seed: Seed = 0,
    config: Config = None,
) -> None:
    """Check the counts, train a model, and write everything under one folder.

    `celbo fit counts.h5ad -o run --condition batch`

    The folder gets **report.html** (open it), **latent.png** and **embedding.h5ad** (the latent space),
    **metrics.json**, **history.jsonl**, **run.json** and **model/** (for `celbo embed` and `celbo.load`).
    `--config run/run.json` does the same run again.
    """
    if remedy == ["list"]:
        from celbo.fit.remedies import remedy_table

        typer.echo(remedy_table())
        return
    chosen, reading = chosen_options(ctx, config)
    auto = {name for name in ("likelihood", "latent_dim") if chosen["model"].get(name) == "auto"}
    chosen["model"] = {name: value for name, value in chosen["model"].items() if name not in auto}
    model = make_model(chosen)
    model.recipe()  # a remedy that is none is told before the data are read
    adata = read_cells(data, reading, model.layer, [*model.conditions, *model.nuisance])
    compare_with_record(adata, model.layer, chosen, config)
    if "n_top_genes" not in chosen["model"] and adata.n_vars > N_TOP_GENES and model.likelihood != "gaussian":
        model.n_top_genes = N_TOP_GENES
        say(f"modelling the {N_TOP_GENES:,} most variable of {adata.n_vars:,} genes; --n-top-genes 0 for all of them")
    fit_and_write(
        model,
        adata,
        output,
        source=data.name,
        path=data,
        reading={"path": str(data.absolute()), **reading._asdict()},
        keep_reference=keep_reference,
        auto_remedy=auto_remedy,
        auto=auto,
    )
    say(f"open {output / 'report.html'}")


@app.command()
def embed(
    run: RunPath,
    data: DataPath,
    output: Annotated[Path, typer.Option("-o", "--output", help="The .h5ad file to write.")],
    unseen: Unseen = "refuse",
    genes_present: GenesPresent = 0.8,
    gene_column: GeneColumn = None,
    make_unique: MakeUnique = False,
    na_as_level: NaAsLevel = False,
    on_disk: OnDisk = False,
) -> None:
    """Place cells in the latent space of a fitted model; genes are matched by name.

    `celbo embed run new.h5ad -o new_embedding.h5ad`

    The file has the cells' names and obs, **obsm["X_celbo"]** (posterior means) and **obsm["X_celbo_sd"]** (their
    standard deviations); no counts.
    """
    from celbo.runs.outputs import check_embedding_path, write_embedding
    from celbo.runs.writing import embedding

    refuse_the_data(output, data)
    check_embedding_path(output)
    if output.exists() and output.name == "embedding.h5ad" and checkpoint.is_model_folder(output.parent / "model"):
        raise UsageError(f"{output} is the embedding of a run, which would be lost; name another file with -o.")
    model = celbo.load(run)
    adata = cells_for(model, data, Reading(gene_column, make_unique, na_as_level, on_disk))
    with shown_warnings():
        cells = embedding(model, adata, unseen=unseen, genes_present=genes_present)
    write_embedding(cells, output)
    say(f"{cells.n_obs:,} cells, {model.latent_dim} latent dimensions: {output}")


DataOfRun = Annotated[
    Path | None, typer.Argument(help="Cells: an .h5ad file or a .zarr folder; those of the run if not given.")
]


@app.command()
def diagnose(
    run: RunPath,
    data: DataOfRun = None,
    groupby: Annotated[
        str | None, typer.Option(help="Column of obs with known types, within which conditions are looked for in z.")
    ] = None,
    on_disk: OnDisk = False,
    as_json: AsJson = False,
) -> None:
    """Look for posterior collapse and its relatives, and say what to try.

    `celbo diagnose run`

    One line of verdict, then what was measured on held-out cells, worst first, then remedies in the order to try them.
    """
    model, adata, _, _ = open_run(run, data, on_disk=on_disk)
    with shown_warnings():
        found = model.diagnose(adata, groupby=groupby)
    typer.echo(json.dumps(found.to_json(), indent=1, ensure_ascii=False) if as_json else plain(str(found)))


@app.command()
def cure(
    run: RunPath,
    output: OutFolder,
    data: DataOfRun = None,
    tolerance: Annotated[float, typer.Option(help="Nats per cell of held-out log p(x) that a remedy may cost.")] = 1.0,
    tries: Annotated[int, typer.Option(help="Models to fit at most.")] = 3,
    on_disk: OnDisk = False,
    as_json: AsJson = False,
) -> None:
    """Diagnose a run, apply the first remedy that fits, fit again and compare, until the model is healthy.

    `celbo cure run -o cured`

    The folder gets what `celbo fit` writes, of the best model, and **cure.json**: the trail.
    """
    from celbo.app.progress import shown_progress
    from celbo.runs.claims import claimed_folder
    from celbo.runs.writing import write_run

    refuse_same_run(run, output)
    model, adata, path, reading = open_run(run, data, on_disk=on_disk)
    with claimed_folder(output, path):
        started = time.perf_counter()
        with shown_warnings() as notes, shown_progress(Console(stderr=True, highlight=False)) as track:
            cured, trail = celbo.cure(model, adata, tolerance=tolerance, tries=tries, track=ending_when_told(track))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            write_run(
                output,
                cured,
                adata,
                seconds=time.perf_counter() - started,
                source=path.name,
                notes=notes,
                reading={"path": str(path.absolute()), **reading._asdict()},
                trail=trail,
            )
    if as_json:
        typer.echo((output / "cure.json").read_text())
    else:
        show_trail(trail)
    say(f"open {output / 'report.html'}")


@app.command()
def counterfactual(
    run: RunPath,
    data: DataPath,
    output: Annotated[Path, typer.Option("-o", "--output", help="The .h5ad file to write.")],
    conditions: Annotated[
        list[str], typer.Option("--set", help="Condition and what it is to be, as stim=treated; repeat for more.")
    ],
    sample: Annotated[
        bool, typer.Option("--sample", help="Write counts drawn from the model in place of means.")
    ] = False,
    other: Annotated[
        list[Path] | None,
        typer.Option(help="Run of the same cells from another seed, whose answer counts alike; repeat for more."),
    ] = None,
    n_samples: Annotated[int, typer.Option(help="Draws of z for each cell and model.")] = 50,
    seed: Seed = 0,
    gene_column: GeneColumn = None,
    make_unique: MakeUnique = False,
    na_as_level: NaAsLevel = False,
    on_disk: OnDisk = False,
) -> None:
    """What cells would look like if a condition were different.

    `celbo counterfactual run cells.h5ad --set treatment=treated -o treated.h5ad`

    **X** is the mean of each gene, **layers** "lower" and "upper" its 90 % interval over the posterior of z. **obs**
    says per cell whether such cells were seen near it (`celbo_verdict`: supported, edge, extrapolation; empty without a
    count), **var** how each gene changes.
    """
    from celbo.runs.outputs import check_counterfactual_path, write_counterfactual

    refuse_the_data(output, data)
    check_counterfactual_path(output)
    model = celbo.load(run)
    given = conditions_of(model, conditions, "--set")
    if len({path.resolve() for path in (run, *(other or ()))}) <= len(other or ()):
        raise UsageError("--other names a run twice, or the run itself; name runs of other seeds, each once.")
    adata = cells_for(model, data, Reading(gene_column, make_unique, na_as_level, on_disk))
    with shown_warnings():
        others = [celbo.load(path) for path in other or ()]
        found = model.counterfactual(adata, given, others=others, n_samples=n_samples, seed=seed)
    write_counterfactual(found, adata, output, sample=sample, seed=seed)
    counts = found.support["verdict"].value_counts()
    names = ["supported", "edge", "extrapolation", *(["empty"] if "empty" in counts else [])]
    said = ", ".join(f"{counts.get(name, 0):,} {name}" for name in names)
    say(f"{adata.n_obs:,} cells under {', '.join(conditions)}: {said}: {output}")


@app.command()
def sample(
    run: RunPath,
    output: Annotated[Path, typer.Option("-o", "--output", help="The .h5ad file to write.")],
    n: Annotated[int, typer.Option("-n", help="How many cells.")] = 1000,
    given: Annotated[
        list[str] | None, typer.Option(help="Condition and what it is to be, as stim=ctrl; repeat for more.")
    ] = None,
    source: Annotated[
        str,
        typer.Option("--from", help="Where z is drawn from: aggregated (posteriors of cells of fit), mixture, prior."),
    ] = "aggregated",
    library: Annotated[float | None, typer.Option(help="Library size of all cells; drawn if not given.")] = None,
    seed: Seed = 0,
) -> None:
    """Draw new cells from a fitted model, with the noise that its likelihood has.

    `celbo sample run -n 1000 --given stim=ctrl -o new.h5ad`

    **X** has counts over the model's genes, **obs** the conditions and library sizes, **obsm["z"]** the latent.
    """
    from celbo.runs.outputs import check_sample_path, write_sample

    check_sample_path(output)
    model = celbo.load(run)
    with shown_warnings():
        wanted = conditions_of(model, given or (), "--given")
        cells = model.sample(n, conditions=wanted, source=source, library=library, seed=seed)
    write_sample(cells, output)
    say(f"{cells.n_obs:,} cells x {cells.n_vars:,} genes, drawn: {output}")


@app.command()
def predict(
    run: RunPath,
    data: DataPath,
    output: Annotated[Path, typer.Option("-o", "--output", help="The .csv file to write.")],
    unseen: Unseen = "refuse",
    genes_present: GenesPresent = 0.8,
    gene_column: GeneColumn = None,
    make_unique: MakeUnique = False,
    na_as_level: NaAsLevel = False,
    on_disk: OnDisk = False,
) -> None:
    """Tell the labels of cells by a model that was fitted with --labels.

    `celbo predict run new.h5ad -o labels.csv`

    A line for each cell: **label** (or "none of these"), **probability**, **p_known**, and the probability of each.
    """
    from celbo.runs.outputs import check_table_path, write_table

    check_table_path(output)
    model = celbo.load(run)
    adata = cells_for(model, data, Reading(gene_column, make_unique, na_as_level, on_disk))
    with shown_warnings():
        found = model.predict(adata, unseen=unseen, genes_present=genes_present)
    write_table(found, output)
    none, empty = int((found["label"] == "none of these").sum()), int(found["label"].isna().sum())
    without = f", {empty:,} without a count" if empty else ""
    could_not = "" if found["p_known"].notna().any() else " (which could not be told)"
    say(f"{len(found):,} cells, {none:,} of them none of these{could_not}{without}: {output}")


@app.command()
def score(
    run: RunPath,
    data: DataPath,
    output: Annotated[Path, typer.Option("-o", "--output", help="The .csv file to write.")],
    outliers: Annotated[
        bool, typer.Option("--outliers", help="Tell how unusual each cell is, given its depth and batch.")
    ] = False,
    refine: Annotated[
        bool, typer.Option("--refine", help="Fit each cell's posterior by itself first: slower, and surer.")
    ] = False,
    n_samples: Annotated[
        int | None, typer.Option(help="Draws of z for each cell, for log p(x).", show_default="500")
    ] = None,
    unseen: Unseen = "refuse",
    genes_present: GenesPresent = 0.8,
    gene_column: GeneColumn = None,
    make_unique: MakeUnique = False,
    na_as_level: NaAsLevel = False,
    on_disk: OnDisk = False,
    seed: Seed = 0,
) -> None:
    """Say how likely each cell is, log p(x) in nats, or how unusual.

    `celbo score run new.h5ad -o scores.csv`

    A line for each cell: **log_p**, its standard error **se**, the effective number of draws **ess**, **trusted**. With
    `--outliers`: **score**, **p_value**, **q_value**, **kind** (doublet-like, ...), **top_genes**.
    """
    from celbo.runs.outputs import check_table_path, write_table

    check_table_path(output)
    if outliers and (refine or n_samples is not None):
        raise UsageError("--refine and --n-samples are about log p(x), not about --outliers; leave one of them out.")
    model = celbo.load(run)
    adata = cells_for(model, data, Reading(gene_column, make_unique, na_as_level, on_disk))
    with shown_warnings():
        if outliers:
            found = model.outliers(adata, unseen=unseen, genes_present=genes_present, seed=seed)
        else:
            found = model.log_prob(
                adata,
                n_samples=500 if n_samples is None else n_samples,
                refine=refine,
                unseen=unseen,
                genes_present=genes_present,
                seed=seed,
            )
    write_table(found, output)
    if outliers:
        counts = found["kind"].value_counts()
        say(f"{', '.join(f'{n:,} {kind}' for kind, n in counts.items())}: {output}")
    else:
        empty = int(found["log_p"].isna().sum())
        doubted = int((~found["trusted"]).sum()) - empty
        advice = "more draws (--n-samples)" if refine else "--refine, or more draws (--n-samples)"
        few = f"; {doubted:,} cells with too few effective draws to trust: try {advice}" if doubted else ""
        few += f"; {empty:,} without a count" if empty else ""
        say(f"{len(found):,} cells, mean log p(x) {found['log_p'].mean():,.2f} nats{few}: {output}")


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Two runs or more, the simplest first.")],
    data: Annotated[Path, typer.Option(help="Cells to compare them on; those they were fitted to, or others.")],
    on_disk: OnDisk = False,
    as_json: AsJson = False,
    seed: Seed = 0,
) -> None:
    """Compare models by how likely they find the same held-out cells, and say how sure the difference is.

    `celbo compare run_nb run_zinb --data counts.h5ad`
    """
    if len({run.resolve() for run in runs}) < max(2, len(runs)):
        raise UsageError("a run is compared with others: name two different ones, or more, each once.")
    first, adata, _, _ = open_run(runs[0], data, on_disk=on_disk)
    models = {str(runs[0]): first, **{str(run): celbo.load(run) for run in runs[1:]}}
    with shown_warnings():
        found = celbo.compare(models, adata, seed=seed)
    typer.echo(json.dumps(found.to_json(), indent=1, ensure_ascii=False) if as_json else plain(str(found)))


@app.command()
def de(
    run: RunPath,
    data: DataPath,
    output: Annotated[Path, typer.Option("-o", "--output", help="The .csv file to write.")],
    groupby: Annotated[str, typer.Option(help="Column of obs that groups the cells.")],
    group: Annotated[str | None, typer.Option(help="The group to compare; each of them if not given.")] = None,
    reference: Annotated[
        str | None, typer.Option(help="What to compare it with; all other cells if not given.")
    ] = None,
    least_change: Annotated[float, typer.Option(help="Log2 fold change that matters.")] = 0.25,
    pair_by: Annotated[
        str | None, typer.Option(help="Column of obs, as donor, within whose levels groups are compared.")
    ] = None,
    gene_column: GeneColumn = None,
    make_unique: MakeUnique = False,
    na_as_level: NaAsLevel = False,
    on_disk: OnDisk = False,
    seed: Seed = 0,
) -> None:
    """Tell which genes differ between groups of cells, by how much, and how sure that is.

    `celbo de run counts.h5ad --groupby cell_type -o genes.csv`

    A line for each gene, surest first: **log2_fold_change** with its 90 % interval, **probability** that it is beyond
    `--least-change`, **fdr**. Cells are no donors: for what holds beyond these, add them up (`celbo.pseudobulk`).
    """
    from celbo.runs.outputs import check_table_path, write_table

    check_table_path(output)
    model = celbo.load(run)
    adata = cells_for(model, data, Reading(gene_column, make_unique, na_as_level, on_disk))
    with shown_warnings():
        found = model.differential_expression(
            adata,
            groupby=groupby,
            group=group,
            reference=reference,
            least_change=least_change,
            pair_by=pair_by,
            seed=seed,
        )
    write_table(found, output)
    sure = int((found["fdr"] <= _FDR).sum())
    n_groups, n_genes = found["group"].nunique(), found.index.nunique()
    what = f"{sure:,} of {n_genes:,} genes change" if n_groups == 1 else f"{sure:,} changes in {n_groups} groups"
    say(f"{what} by log2 {least_change:g} or more at a false discovery rate of {_FDR:.0%}: {output}")


@app.command("map")
def map_query(
    run: RunPath,
    data: DataPath,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the model and the embedding.")],
    genes_present: GenesPresent = 0.8,
    gene_column: GeneColumn = None,
    make_unique: MakeUnique = False,
    na_as_level: NaAsLevel = False,
    on_disk: OnDisk = False,
) -> None:
    """Take cells of new batches into a fitted model, without moving what it knows by a bit.

    `celbo map run new.h5ad -o mapped`

    New levels of conditions get weights of their own; all others stay. Writes **model/** and **embedding.h5ad** (of
    the new cells).
    """
    from celbo.app.progress import shown_progress
    from celbo.runs.claims import claimed_folder
    from celbo.runs.outputs import write_embedding
    from celbo.runs.writing import embedding

    refuse_same_run(run, output)
    if (output / "run.json").exists():
        raise UsageError(f"{output} has a run that celbo fit wrote, and would lose its model; name another folder.")
    model = celbo.load(run)
    adata = cells_for(model, data, Reading(gene_column, make_unique, na_as_level, on_disk))
    with claimed_folder(output, data):
        with shown_warnings(), shown_progress(Console(stderr=True, highlight=False)) as track:
            mapped = model.map_query(adata, genes_present=genes_present, track=ending_when_told(track))
            cells = embedding(mapped, adata, genes_present=genes_present)
        mapped.save(output / "model")
        write_embedding(cells, output / "embedding.h5ad")
    if mapped is model:
        say("every level of the conditions is known: nothing was trained")
    else:
        say(f"learned, with so many cells: {', '.join(new_levels(model, mapped, adata))}")
    say(f"cells mapped: {adata.n_obs:,}: {output}")


@app.command()
def inspect(run: RunPath, as_json: AsJson = False) -> None:
    """Say what a model folder holds, after checking that it is whole; nothing in it is executed."""
    found = describe(checkpoint.describe_folder(run))
    if as_json:
        typer.echo(json.dumps(found, indent=1, ensure_ascii=False))
        return
    for name, value in found.items():
        if isinstance(value, dict):
            value = [f"{key} ({part if isinstance(part, str) else ', '.join(part)})" for key, part in value.items()]
        shown = ", ".join(map(str, value)) if isinstance(value, list) else value
        typer.echo(f"{name:<17}{'none' if shown in ('', None) else plain(str(shown))}")


@app.command()
def demo(
    output: OutFolder = Path("celbo-demo"),
    seed: Seed = 0,
) -> None:
    """Simulate cells with known truth, fit them, and say how much of the truth came back."""
    from celbo.app.demo import demo_cells, demo_model, recover

    say("simulating 3,000 cells x 1,000 genes: 6 types, 2 batches, a treatment that acts in 3 of the types")
    adata, model = demo_cells(seed), demo_model(seed)
    summary = fit_and_write(model, adata, output, source="simulated cells", recover=recover)
    for name, value, reference, meaning in (row.values() for row in summary["recovery"]):
        beside = "" if reference is None else f" (principal components {reference:.3f})"
        typer.echo(f"{name}: {value:.3f}{beside}: {meaning}")
    say(f"picture: {output / 'latent.png'}\nopen {output / 'report.html'}")


def main() -> None:
    """Run the command line."""
    guarded(app)
