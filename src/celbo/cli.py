"""The command line: parse, one call, write. Data and JSON go to stdout, talk to stderr.

Commands import what they need when they run, so that ``celbo --help`` costs no torch.
"""

import errno
import io
import json
import math
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, NoReturn

import typer
from rich.console import Console

import celbo
from celbo import checkpoint
from celbo.errors import CelboError, DataError, StorageError, UsageError

if TYPE_CHECKING:
    from anndata import AnnData

    from celbo.checkpoint import FolderDescription
    from celbo.comparing import Comparison
    from celbo.curing import Step
    from celbo.demo import Recovery
    from celbo.estimator import ExpressionVAE
    from celbo.minibatch import Rows
    from celbo.train import Epoch, Plan, Track

__all__ = ["app", "main"]

app = typer.Typer(
    name="celbo",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

DataPath = Annotated[Path, typer.Argument(help="Cells with raw counts: an .h5ad file or a .zarr folder.")]
RunPath = Annotated[Path, typer.Argument(help="What `celbo fit` wrote, or the model folder in it.")]
OutFolder = Annotated[Path, typer.Option("-o", "--output", help="Folder to write to; made if it is not there.")]
Seed = Annotated[int, typer.Option(help="Same seed, same result.")]

_FDR = 0.05
"""At which changed genes are counted."""
N_TOP_GENES = 4000
"""Genes that `celbo fit` models at most unless told otherwise."""

# Disk full, quota, read-only, permission: what the person, not celbo, can mend.
_STORAGE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG}


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


# Options that fit and check share.
Config = Annotated[
    Path | None,
    typer.Option(help="Options from a .toml file, or from the run.json of a run to repeat; the command line wins."),
]
Conditions = Annotated[
    list[str] | None,
    typer.Option("--condition", help="Column of obs given to the model (batch, treatment); repeat for more."),
]
Nuisance = Annotated[
    list[str] | None,
    typer.Option(help="Column of obs to be removed, as batch or donor: a condition one does not ask about; repeat."),
]
_LIKELIHOODS = "nb (most droplet counts), zinb, poisson, bernoulli (detection), or gaussian"
LikelihoodName = Annotated[str, typer.Option(help=f"{_LIKELIHOODS}.")]
LikelihoodToFit = Annotated[
    str, typer.Option(help=f"{_LIKELIHOODS}; auto for the simplest that explains held-out counts as well as any.")
]
Layer = Annotated[str | None, typer.Option(help="Layer that holds the counts; X if not given.")]
SizeFactor = Annotated[str | None, typer.Option(help="Column of obs to use in place of each cell's sum of counts.")]
AllowNoninteger = Annotated[
    bool, typer.Option("--allow-noninteger", help="Let estimated counts through, which need not be whole.")
]
GeneColumn = Annotated[str | None, typer.Option(help="Column of var to name genes by, in place of its index.")]
MakeUnique = Annotated[bool, typer.Option("--make-unique", help="Number gene names that occur more than once.")]
NaAsLevel = Annotated[
    bool, typer.Option("--na-as-level", help="Let cells without a condition be a level of their own.")
]
OnDisk = Annotated[bool, typer.Option("--on-disk", help="Leave the counts on disk: less memory, slower.")]
Unseen = Annotated[
    str,
    typer.Option(
        help="Levels that fit did not see: refuse, read as the nearest known one, marginal (as all alike), or adapt "
        "(learn them from these cells)."
    ),
]
GenesPresent = Annotated[
    float, typer.Option(help="Share of the model's genes that must be there; it fills in the rest.")
]
AsJson = Annotated[bool, typer.Option("--json", help="For programs.")]


@app.command()
def check(
    ctx: typer.Context,
    data: DataPath,
    model: Annotated[Path | None, typer.Option(help="A run, or its model folder, that is to read these cells.")] = None,
    condition: Conditions = None,
    nuisance: Nuisance = None,
    likelihood: LikelihoodName = "nb",
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
    from celbo.data import Check, check_query

    try:
        if model is not None:
            _refuse_options_of_fit(ctx)
            fitted = celbo.load(model)
            reading = _Reading(gene_column, make_unique, na_as_level, on_disk)
            adata = _read(data, reading, fitted.schema_.layer, [each.name for each in fitted.schema_.conditions])
            seen = "marginal" if unseen in ("nearest", "adapt") else unseen
            found = check_query(adata, fitted.schema_, unseen=seen, genes_present=genes_present)
        else:
            chosen, reading = _chosen_options(ctx, config)
            unfitted = _make_model(chosen)
            found = unfitted.check(_read(data, reading, unfitted.layer, [*unfitted.conditions, *unfitted.nuisance]))
    except DataError as error:  # nothing could be looked at
        found = Check(0, 0)
        found.add("unreadable", "error", str(error))
    document = {"path": str(data), "celbo_version": celbo.__version__, **found.to_json()}
    if as_json:
        typer.echo(json.dumps(document, indent=1, ensure_ascii=False))
    else:
        size = f"{found.n_cells:,} cells x {found.n_genes:,} genes, {found.n_values:,} stored values"
        typer.echo(_plain(f"{data}: {size}"))
        for problem in found.problems:
            typer.echo(_plain(f"{problem.severity} ({problem.name}): {problem.message}"))
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
    likelihood: LikelihoodToFit = "nb",
    labels: Annotated[
        str | None, typer.Option(help="Column of obs with types, known of some cells, for celbo predict.")
    ] = None,
    unlabelled: Annotated[str, typer.Option(help="What that column reads where the type is unknown.")] = "unknown",
    n_top_genes: Annotated[
        int | None,
        typer.Option(
            help="Most variable genes to model, chosen within the first condition's levels; 0 for all.  "
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
        from celbo.remedies import remedy_table

        typer.echo(remedy_table())
        return
    chosen, reading = _chosen_options(ctx, config)
    auto = {name for name in ("likelihood", "latent_dim") if chosen["model"].get(name) == "auto"}
    chosen["model"] = {name: value for name, value in chosen["model"].items() if name not in auto}
    model = _make_model(chosen)
    model.recipe()  # a remedy that is none is told before the data are read
    adata = _read(data, reading, model.layer, [*model.conditions, *model.nuisance])
    _compare_with_record(adata, model.layer, chosen, config)
    if "n_top_genes" not in chosen["model"] and adata.n_vars > N_TOP_GENES and model.likelihood != "gaussian":
        model.n_top_genes = N_TOP_GENES
        _say(f"modelling the {N_TOP_GENES:,} most variable of {adata.n_vars:,} genes; --n-top-genes 0 for all of them")
    _fit_and_write(
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
    _say(f"open {output / 'report.html'}")


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
    from celbo.runs import embedding, refuse_no_embedding, write_embedding

    if output.exists() and data.exists() and output.samefile(data):
        raise UsageError(f"{output} is the data themselves; name another file with -o.")
    refuse_no_embedding(output)
    model = celbo.load(run)
    reading = _Reading(gene_column, make_unique, na_as_level, on_disk)
    adata = _read(data, reading, model.schema_.layer, [condition.name for condition in model.schema_.conditions])
    with _shown_warnings():
        cells = embedding(model, adata, unseen=unseen, genes_present=genes_present)
    write_embedding(cells, output)
    _say(f"{cells.n_obs:,} cells, {model.latent_dim} latent dimensions: {output}")


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
    model, adata, _, _ = _open_run(run, data, on_disk=on_disk)
    with _shown_warnings():
        found = model.diagnose(adata, groupby=groupby)
    typer.echo(json.dumps(found.to_json(), indent=1, ensure_ascii=False) if as_json else _plain(str(found)))


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
    from celbo.progress import shown_progress
    from celbo.runs import claimed_folder, write_run

    model, adata, path, reading = _open_run(run, data, on_disk=on_disk)
    with claimed_folder(output, path):
        started = time.perf_counter()
        with _shown_warnings() as notes, shown_progress(Console(stderr=True, highlight=False)) as track:
            cured, trail = celbo.cure(model, adata, tolerance=tolerance, tries=tries, track=_ending_when_told(track))
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
        _show_trail(trail)
    _say(f"open {output / 'report.html'}")


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
    says per cell whether such cells were seen near it (`celbo_verdict`: supported, edge, extrapolation), **var** how
    each gene changes.
    """
    from celbo.runs import refuse_no_counterfactual, write_counterfactual

    if output.exists() and data.exists() and output.samefile(data):
        raise UsageError(f"{output} is the data themselves; name another file with -o.")
    refuse_no_counterfactual(output)
    model = celbo.load(run)
    given = _conditions_of(model, conditions, "--set")
    reading = _Reading(gene_column, make_unique, na_as_level, on_disk)
    adata = _read(data, reading, model.schema_.layer, [condition.name for condition in model.schema_.conditions])
    with _shown_warnings():
        others = [celbo.load(path) for path in other or ()]
        found = model.counterfactual(adata, given, others=others, n_samples=n_samples, seed=seed)
    write_counterfactual(found, adata, output, sample=sample, seed=seed)
    counts = found.support["verdict"].value_counts()
    said = ", ".join(f"{counts.get(name, 0):,} {name}" for name in ("supported", "edge", "extrapolation"))
    _say(f"{adata.n_obs:,} cells under {', '.join(conditions)}: {said}: {output}")


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
    from celbo.runs import refuse_no_sample, write_sample

    refuse_no_sample(output)
    model = celbo.load(run)
    with _shown_warnings():
        wanted = _conditions_of(model, given or (), "--given")
        cells = model.sample(n, conditions=wanted, source=source, library=library, seed=seed)
    write_sample(cells, output)
    _say(f"{cells.n_obs:,} cells x {cells.n_vars:,} genes, drawn: {output}")


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
    from celbo.runs import write_table

    model = celbo.load(run)
    reading = _Reading(gene_column, make_unique, na_as_level, on_disk)
    adata = _read(data, reading, model.schema_.layer, [condition.name for condition in model.schema_.conditions])
    with _shown_warnings():
        found = model.predict(adata, unseen=unseen, genes_present=genes_present)
    write_table(found, output)
    none = int((found["label"] == "none of these").sum())
    _say(f"{len(found):,} cells, {none:,} of them none of these: {output}")


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
    n_samples: Annotated[int, typer.Option(help="Draws of z for each cell.")] = 500,
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
    from celbo.runs import write_table

    model = celbo.load(run)
    reading = _Reading(gene_column, make_unique, na_as_level, on_disk)
    adata = _read(data, reading, model.schema_.layer, [condition.name for condition in model.schema_.conditions])
    with _shown_warnings():
        if outliers:
            found = model.outliers(adata, unseen=unseen, genes_present=genes_present, seed=seed)
        else:
            found = model.log_prob(
                adata, n_samples=n_samples, refine=refine, unseen=unseen, genes_present=genes_present, seed=seed
            )
    write_table(found, output)
    if outliers:
        counts = found["kind"].value_counts()
        _say(f"{', '.join(f'{n:,} {kind}' for kind, n in counts.items())}: {output}")
    else:
        doubted = int((~found["trusted"]).sum())
        few = f"; {doubted:,} cells with too few effective draws to trust: try --refine" if doubted else ""
        _say(f"{len(found):,} cells, mean log p(x) {found['log_p'].mean():,.2f} nats{few}: {output}")


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
    models = {str(run): _open_run(run, data, on_disk=on_disk)[0] for run in runs}
    adata = _open_run(runs[0], data, on_disk=on_disk)[1]
    with _shown_warnings():
        found = celbo.compare(models, adata, seed=seed)
    typer.echo(json.dumps(found.to_json(), indent=1, ensure_ascii=False) if as_json else _plain(str(found)))


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
    from celbo.runs import write_table

    model = celbo.load(run)
    reading = _Reading(gene_column, make_unique, na_as_level, on_disk)
    adata = _read(data, reading, model.schema_.layer, [condition.name for condition in model.schema_.conditions])
    with _shown_warnings():
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
    _say(f"{sure:,} genes change by log2 {least_change:g} or more at a false discovery rate of {_FDR:.0%}: {output}")


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
    from celbo.progress import shown_progress
    from celbo.runs import claimed_folder, embedding, write_embedding

    model = celbo.load(run)
    reading = _Reading(gene_column, make_unique, na_as_level, on_disk)
    adata = _read(data, reading, model.schema_.layer, [condition.name for condition in model.schema_.conditions])
    with claimed_folder(output, data):
        with _shown_warnings(), shown_progress(Console(stderr=True, highlight=False)) as track:
            mapped = model.map_query(adata, genes_present=genes_present, track=_ending_when_told(track))
            cells = embedding(mapped, adata, genes_present=genes_present)
        mapped.save(output / "model")
        write_embedding(cells, output / "embedding.h5ad")
    if mapped is model:
        _say("every level of the conditions is known: nothing was trained")
    _say(f"{adata.n_obs:,} cells mapped: {output}")


@app.command()
def inspect(run: RunPath, as_json: AsJson = False) -> None:
    """Say what a model folder holds, after checking that it is whole; nothing in it is executed."""
    found = _describe(checkpoint.describe_folder(run))
    if as_json:
        typer.echo(json.dumps(found, indent=1, ensure_ascii=False))
        return
    for name, value in found.items():
        if isinstance(value, dict):
            value = [f"{key} ({part if isinstance(part, str) else ', '.join(part)})" for key, part in value.items()]
        shown = ", ".join(map(str, value)) if isinstance(value, list) else value
        typer.echo(f"{name:<17}{'none' if shown in ('', None) else _plain(str(shown))}")


@app.command()
def demo(
    output: OutFolder = Path("celbo-demo"),
    seed: Seed = 0,
) -> None:
    """Simulate cells with known truth, fit them, and say how much of the truth came back."""
    from celbo.demo import demo_cells, demo_model, recover

    _say("simulating 3,000 cells x 1,000 genes: 6 types, 2 batches, a treatment that acts in 3 of the types")
    adata, model = demo_cells(seed), demo_model(seed)
    summary = _fit_and_write(model, adata, output, source="simulated cells", recover=recover)
    for name, value, reference, meaning in (row.values() for row in summary["recovery"]):
        beside = "" if reference is None else f" (principal components {reference:.3f})"
        typer.echo(f"{name}: {value:.3f}{beside}: {meaning}")
    _say(f"picture: {output / 'latent.png'}\nopen {output / 'report.html'}")


class _Reading(NamedTuple):
    """How data are read; names are those of `celbo.config.READING`."""

    gene_column: str | None = None
    make_unique: bool = False
    na_as_level: bool = False
    on_disk: bool = False


# Options of the command line that have another name in Python, or stand for one of several.
_NAMES = {"condition": "conditions", "hidden_dim": "hidden_dims", "epochs": "max_epochs", "remedy": "remedies"}


def _chosen_options(ctx: typer.Context, config: Path | None) -> tuple[dict[str, dict[str, Any]], _Reading]:
    """What the command line and the config file say of model, training and reading; the command line wins."""
    from celbo.config import READING, read_config

    defaults = celbo.ExpressionVAE().options()
    train = defaults.pop("train")
    chosen: dict[str, dict[str, Any]] = {"model": {}, "train": {}, "reading": {}}
    if config is not None:
        chosen = read_config(config, defaults, train)
    for parameter, value in ctx.params.items():
        name = _NAMES.get(parameter, parameter)
        source = ctx.get_parameter_source(parameter)
        if source is None or source.name != "COMMANDLINE":
            continue
        if name == "latent_dim" and value != "auto":
            value = _whole(value)
        for table, known in (("model", defaults), ("train", train), ("reading", READING)):
            if name in known:
                chosen[table][name] = value
    return chosen, _Reading(**chosen["reading"])


def _whole(text: str) -> int:
    """The number of latent dimensions, which may be a word."""
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"--latent-dim {text}: give a whole number, or auto.") from None


def _refuse_options_of_fit(ctx: typer.Context) -> None:
    """Refuse options that a fitted model brings of its own, where it is named."""
    of_fit = ("condition", "nuisance", "likelihood", "layer", "size_factor", "allow_noninteger", "config")
    given = [name for name in of_fit if (source := ctx.get_parameter_source(name)) and source.name == "COMMANDLINE"]
    if given:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise UsageError(f"with --model the model says what it reads; leave out {options}.")


def _compare_with_record(
    adata: "AnnData", layer: str | None, chosen: dict[str, dict[str, Any]], config: Path | None
) -> None:
    """Say so if a run is repeated on other data than it was about."""
    from celbo.runs import fingerprint

    expected = chosen.get("data", {}).get("sha256_values")
    if expected and fingerprint(adata, layer)["sha256_values"] != expected:
        _say(f"warning: the values are not those of the run that {config} records; the result will differ.")


def _make_model(chosen: dict[str, dict[str, Any]]) -> "ExpressionVAE":
    model = dict(chosen["model"])
    model["n_top_genes"] = model.get("n_top_genes") or None
    return celbo.ExpressionVAE(**model, train=celbo.TrainConfig(**chosen["train"]))


def _read(data: Path, reading: _Reading, layer: str | None, conditions: "Sequence[str]") -> "AnnData":
    from celbo.data import fill_missing_levels, name_genes, read_adata

    adata = name_genes(
        read_adata(data, layer=layer, on_disk=reading.on_disk), reading.gene_column, make_unique=reading.make_unique
    )
    return fill_missing_levels(adata, conditions) if reading.na_as_level else adata


def _open_run(run: Path, data: Path | None, *, on_disk: bool) -> "tuple[ExpressionVAE, AnnData, Path, _Reading]":
    """A fitted model and cells for it: those named, or those that its run was fitted to."""
    from celbo.runs import record_of_run

    model = celbo.load(run)
    record = record_of_run(run)
    recorded = record.get("reading", {})
    reading = _Reading(**{name: recorded[name] for name in _Reading._fields if name in recorded})
    reading = reading._replace(on_disk=on_disk or reading.on_disk)
    if data is None:
        if "path" not in recorded:
            raise UsageError(f"{run} does not say which cells it was fitted to; name them.")
        data = Path(recorded["path"])
        if not data.exists():
            raise UsageError(f"{run} was fitted to {data}, which is not there now; name the cells.")
    conditions = [condition.name for condition in model.schema_.conditions]
    return model, _read(data, reading, model.schema_.layer, conditions), data, reading


def _conditions_of(model: "ExpressionVAE", texts: "Sequence[str]", option: str) -> dict[str, str | float]:
    """What CONDITION=VALUE says, numbers for continuous conditions."""
    continuous = {condition.name for condition in model.schema_.conditions if condition.levels is None}
    given: dict[str, str | float] = {}
    for text in texts:
        name, _, value = text.partition("=")
        if not value:
            raise UsageError(f"{option} {text} names no value; write it as CONDITION=VALUE.")
        try:
            given[name] = float(value) if name in continuous else value
        except ValueError:
            raise UsageError(f"{option} {text}: {name!r} is continuous; give a number.") from None
    return given


def _show_trail(trail: "Sequence[Step]") -> None:
    """What was tried, in a line each."""
    for step in trail:
        typer.echo(_plain(f"{' + '.join(step.remedies) or 'no remedy'}: {step.verdict}"))
        price = "" if step.difference is None else f" (s.e. {step.se:.2f})"
        typer.echo(_plain(f"  {step.said}{price}"))


def _fit_and_write(
    model: "ExpressionVAE",
    adata: "AnnData",
    output: Path,
    *,
    source: str,
    path: Path | None = None,
    reading: dict[str, Any] | None = None,
    keep_reference: bool = True,
    auto_remedy: bool = False,
    auto: Collection[str] = (),
    recover: "Callable[[ExpressionVAE, AnnData], list[Recovery]] | None" = None,
) -> dict[str, Any]:
    """Train with progress, then write the run; warnings are shown, and repeated in the report."""
    from celbo.progress import shown_progress
    from celbo.runs import claimed_folder, write_run
    from celbo.train import settle_device

    _say(f"computing on {settle_device(model.train.device)}")
    with claimed_folder(output, path):
        started = time.perf_counter()
        with _shown_warnings() as notes, shown_progress(Console(stderr=True, highlight=False)) as track:
            choices: list[Comparison] = []
            trail = None
            if auto:
                model, choices = celbo.choose(
                    model,
                    adata,
                    likelihood="likelihood" in auto,
                    latent_dim="latent_dim" in auto,
                    track=_ending_when_told(track),
                )
            else:
                model.fit(adata, track=_ending_when_told(track))
            if auto_remedy:
                fitted, of_it = model, len(notes)
                model, trail = celbo.cure(fitted, adata, track=_ending_when_told(track))
                if model is not fitted:  # what was said of the model that was given up is no longer true
                    del notes[:of_it]
        seconds = time.perf_counter() - started
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what the data are was said before they were fitted
            summary = write_run(
                output,
                model,
                adata,
                seconds=seconds,
                source=source,
                notes=notes,
                reading=reading,
                recovery=None if recover is None else [row._asdict() for row in recover(model, adata)],
                keep_reference=keep_reference,
                trail=trail,
                choices=choices,
            )
    for choice in choices:
        typer.echo(_plain(str(choice)))
    if trail is not None:
        _show_trail(trail)
    metrics = summary["metrics"]
    elbo = "elbo_train" if metrics["elbo_validation"] is None else "elbo_validation"
    of = "training" if elbo == "elbo_train" else "held-out"
    _say(
        f"{summary['verdict']} ELBO of {of} cells: {metrics[elbo]:,.1f} nats per cell; "
        f"epochs: {metrics['epochs']}, seconds: {seconds:.0f}."
    )
    return summary


def _describe(folder: "FolderDescription") -> dict[str, Any]:
    """Say what a model folder holds in a line each; what the folder lacks is None."""
    document = folder.document
    options, schema = document.get("options", {}), document.get("schema", {})
    history = document.get("history") or [{}]
    return {
        "path": str(folder.path),
        "format": folder.format_version,
        "celbo_version": folder.celbo_version,
        "size_bytes": folder.size,
        "likelihood": options.get("likelihood"),
        "objective": options.get("objective"),
        "latent_dim": options.get("latent_dim"),
        "hidden_dims": options.get("hidden_dims"),
        "n_genes": len(schema.get("genes", [])),
        "genes": schema.get("genes", [])[:5],
        "selection": schema.get("selection"),
        "layer": schema.get("layer"),
        "size_factor": schema.get("size_factor"),
        "conditions": {item["name"]: item["levels"] or "continuous" for item in schema.get("conditions", [])},
        "epochs": len(document.get("history") or []),
        "kl_weight": history[-1].get("kl_weight"),
        "elbo_validation": history[-1].get("validation_elbo"),
        "n_parameters": sum(math.prod(shape) for shape in folder.shapes.values()),
        "has_reference": folder.has_reference,
    }


def _say(text: str) -> None:
    """Tell the person, not the pipe; names in data cannot control the terminal, nor can a full one stop the work."""
    with suppress(OSError):
        typer.echo(_plain(text), err=True)


def _plain(text: str) -> str:
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


@contextmanager
def _shown_warnings() -> Iterator[list[str]]:
    """Say warnings in a line each, and keep them."""
    notes: list[str] = []

    def show(message: Warning | str, *_: Any) -> None:
        notes.append(str(message))
        _say(f"warning: {message}")

    with warnings.catch_warnings():
        warnings.showwarning = show  # type: ignore[assignment]
        yield notes


_OUT_OF_MEMORY = "out of memory: use fewer cells, genes or hidden units, or a machine with more of it."

_signals: list[int] = []
"""Numbers of the signals received; like signals themselves, one list for the process."""


def _stop(number: int, _: FrameType | None) -> NoReturn:
    """End with 128 + the signal's number, as shells expect (130 interrupted, 143 terminated)."""
    _signals.append(number)
    _say("interrupted" if number == signal.SIGINT else "terminated")
    sys.exit(128 + number)


def _ending_when_told(track: "Track") -> "Track":
    """End at the next minibatch if a signal came; Python drops what `_stop` raises while it runs a destructor."""

    def ending(minibatches: "Iterable[Rows]", plan: "Plan", history: "list[Epoch]") -> "Iterator[Rows]":
        for rows in track(minibatches, plan, history):
            if _signals:
                sys.exit(128 + _signals[0])
            yield rows

    return ending


def main() -> None:
    """Run the command line; every failure ends in a message and its exit code, never in a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show ends nothing
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        app()
    except CelboError as error:
        _fail(str(error), error.exit_code)
    except MemoryError:
        _fail(_OUT_OF_MEMORY, 137)
    except OSError as error:
        if error.errno not in _STORAGE_ERRORS:
            _bug(error)
        _fail(f"{error.filename or 'a file'}: {error.strerror}.", StorageError.exit_code)
    except Exception as error:  # noqa: BLE001 - the last line of defence
        if "allocate memory" in str(error) or type(error).__name__ == "OutOfMemoryError":  # torch's own ways to say it
            _fail(_OUT_OF_MEMORY, 137)
        _bug(error)


def _fail(message: str, exit_code: int) -> NoReturn:
    _say(f"error: {message}")
    sys.exit(exit_code)


def _bug(error: Exception) -> NoReturn:
    if os.environ.get("CELBO_DEBUG"):
        traceback.print_exc()
    _fail(
        f"{type(error).__name__}: {error}. This is a fault in celbo, not in your data or command. Please report it "
        "with what CELBO_DEBUG=1 shows when set before the same command.",
        CelboError.exit_code,
    )
