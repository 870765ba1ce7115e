"""The command line: parse options, call the library once, write the answer.

Data and JSON go to stdout, messages to stderr. The exit code is that of the error (`celbo.errors`). Commands import
what they need when they run, so that ``celbo --help`` does not load torch.
"""

import json
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import celbo
from celbo import checkpoint
from celbo.app import model_commands, options
from celbo.app.commands import (
    Commands,
    Reading,
    cells_for,
    cells_of_fit,
    check_cells,
    chosen_options,
    describe,
    draw_report,
    fit_and_write,
    make_model,
    open_run,
    point_to_report,
    read_cells,
    refuse_options_of_fit,
    refuse_overwriting_run,
    show_trail,
)
from celbo.app.options import N_TOP_GENES
from celbo.app.terminal import INTERRUPTED, guarded, plain, say, shown_warnings, stop_on_signal
from celbo.data.paths import existing_path
from celbo.errors import DataError, ModelFileError, StorageError, UsageError
from celbo.runs.record import record_of_run, run_of

if TYPE_CHECKING:
    from celbo.data.checks import Check

__all__ = ["app", "main"]

app = typer.Typer(
    name="celbo",
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
_FIT, _ASK = "Fit a model", "Ask a fitted model"
"""Panels of the help of `celbo`."""


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"celbo {celbo.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Variational autoencoders for transcriptomics: counts in, latent space out.

    Try it: `celbo demo` simulates cells, fits them, and says what to open.

    Then: `celbo fit counts.h5ad -o run` and open `run/report.html`.
    """
    ctx.with_resource(shown_warnings())


@app.command(rich_help_panel=_FIT)
def demo(output: options.OutFolder = Path("celbo-demo"), seed: options.Seed = 0) -> None:
    """Simulate cells with known truth, fit them, and measure how much of the truth the model recovers."""
    from celbo.app.demo import demo_cells, demo_model, recover

    say("simulating 3,000 cells x 1,000 genes: 6 types, 2 batches, a treatment that acts in 3 of the types")
    adata, model = demo_cells(seed), demo_model(seed)
    summary = fit_and_write(model, adata, output, source="simulated cells", recover=recover)
    for name, value, reference, meaning in (row.values() for row in summary["recovery"]):
        components = "" if reference is None else f" (principal components {reference:.3f})"
        typer.echo(f"{name}: {value:.3f}{components}: {meaning}")
    if (output / "latent.png").exists():
        say(f"picture: {output / 'latent.png'}")
    point_to_report(output)
    _end_if_interrupted(summary)


@app.command(rich_help_panel=_FIT)
def check(
    ctx: typer.Context,
    data: options.DataToFit,
    model: options.ModelToCheck = None,
    condition: options.Conditions = None,
    nuisance: options.Nuisance = None,
    layer: options.Layer = None,
    labels: options.Labels = None,
    unlabelled: options.Unlabelled = "unknown",
    groupby: options.TypesToCheck = None,
    gene_column: options.GeneColumn = None,
    make_unique: options.MakeUnique = False,
    na_as_level: options.NaAsLevel = False,
    size_factor: options.SizeFactor = None,
    allow_noninteger: options.AllowNoninteger = False,
    features: options.Features = None,
    mask_absent: options.MaskAbsent = None,
    on_disk: options.OnDisk = False,
    unseen: options.Unseen = "refuse",
    genes_present: options.GenesPresent = 0.8,
    likelihood: options.Likelihood = "nb",
    interaction: options.Interactions = None,
    config: options.Config = None,
    as_json: options.AsJson = False,
) -> None:
    """Check every value, name and condition, and say what is wrong, where, and what to do. Nothing is trained.

    `celbo check counts.h5ad --condition batch` before `celbo fit` with the same options

    `celbo check new.h5ad --model run` before `celbo embed`

    The exit code is 3 if there is an error. `celbo fit` and `celbo embed` make the same checks first.
    """
    if model is not None:
        refuse_options_of_fit(ctx)
    try:
        existing_path(data)
        if model is not None:
            fitted = celbo.load(model)
            adata = cells_for(fitted, data, Reading(gene_column, make_unique, na_as_level, on_disk))
            result = check_cells(fitted, adata, unseen=unseen, genes_present=genes_present)
        else:
            chosen, reading = chosen_options(ctx, config)
            if chosen["model"].get("likelihood") == "auto":  # chooses among the likelihoods of counts
                del chosen["model"]["likelihood"]
            unfitted = make_model(chosen)
            adata = read_cells(data, reading, unfitted.layer, [*unfitted.conditions, *unfitted.nuisance])
            result = unfitted.check(adata, groupby=groupby)
    except (DataError, StorageError) as error:  # the cells could not be read
        problem = {"name": "unreadable", "severity": "error", "message": str(error)}
        sizes = dict.fromkeys(("n_cells", "n_genes", "n_values"))
        if as_json:
            _print_json(data, {"ok": False, **sizes, "problems": [problem]})
        else:
            typer.echo(plain(f"error (unreadable): {error}"))
        raise typer.Exit(error.exit_code) from None
    if as_json:
        _print_json(data, result.to_json())
    else:
        _show_check(result, data, "fit" if model is None else "embed")
    if result.errors:
        raise typer.Exit(DataError.exit_code)


def _print_json(data: Path, result: dict[str, Any]) -> None:
    document = {"path": str(data), "celbo_version": celbo.__version__, **result}
    typer.echo(json.dumps(document, indent=1, ensure_ascii=False))


def _show_check(result: "Check", data: Path, command: str) -> None:
    values = "" if result.n_values is None else f", {result.n_values:,} stored values"
    typer.echo(plain(f"{data}: {result.n_cells:,} cells x {result.n_genes:,} genes{values}"))
    for problem in result.problems:
        typer.echo(plain(f"{problem.severity} ({problem.name}): {problem.message}"))
    if not result.errors:
        n = len(result.problems)
        doubts = "" if n == 0 else ", with one warning (above)" if n == 1 else f", with {n} warnings (above)"
        typer.echo(f"ready to {command}{doubts}")


@app.command(rich_help_panel=_FIT)
def fit(
    ctx: typer.Context,
    data: options.DataToFit,
    output: options.OutFolder,
    condition: options.Conditions = None,
    nuisance: options.Nuisance = None,
    layer: options.Layer = None,
    n_top_genes: options.NTopGenes = None,
    labels: options.Labels = None,
    unlabelled: options.Unlabelled = "unknown",
    gene_column: options.GeneColumn = None,
    make_unique: options.MakeUnique = False,
    na_as_level: options.NaAsLevel = False,
    size_factor: options.SizeFactor = None,
    allow_noninteger: options.AllowNoninteger = False,
    features: options.Features = None,
    mask_absent: options.MaskAbsent = None,
    on_disk: options.OnDisk = False,
    likelihood: options.Likelihood = "nb",
    latent_dim: options.LatentDim = "10",
    hidden_dim: options.HiddenDims = None,
    prior: options.Prior = "normal",
    interaction: options.Interactions = None,
    dispersion: options.Dispersion = "gene",
    objective: options.Objective = "vae",
    norm: options.Norm = "layer",
    dropout: options.Dropout = 0.2,
    epochs: options.Epochs = None,
    patience: options.Patience = 10,
    batch_size: options.BatchSize = 128,
    learning_rate: options.LearningRate = 1e-2,
    warmup_fraction: options.WarmupFraction = 0.25,
    validation_fraction: options.ValidationFraction = 0.1,
    remedy: options.Remedies = None,
    auto_remedy: options.AutoRemedy = False,
    device: options.Device = "auto",
    threads: options.Threads = None,
    seed: options.Seed = 0,
    config: options.Config = None,
    keep_reference: options.KeepReference = True,
    encode_context: options.EncodeContext = True,
) -> None:
    """Check the counts, train a model, and write everything under one folder.

    `celbo fit counts.h5ad -o run --condition batch`

    The folder gets **report.html** (open it), **latent.png** and **embedding.h5ad** (the latent space),
    **metrics.json**, **history.jsonl**, **run.json** and **model/** (for `celbo embed` and `celbo.load`).
    `--config run/run.json` repeats the run.
    """
    if remedy == ["list"]:
        from celbo.fit.remedies import remedy_table

        typer.echo(remedy_table())
        return
    existing_path(data)
    chosen, reading = chosen_options(ctx, config)
    auto = {name for name in ("likelihood", "latent_dim") if chosen["model"].get(name) == "auto"}
    chosen["model"] = {name: value for name, value in chosen["model"].items() if name not in auto}
    model = make_model(chosen)
    model.recipe()  # refuses an unknown remedy before the data are read
    adata = read_cells(data, reading, model.layer, [*model.conditions, *model.nuisance])
    from celbo.data.features import choose_features

    n_genes = len(choose_features(adata.var, model.features).of(adata.var))
    if "n_top_genes" not in chosen["model"] and n_genes > N_TOP_GENES and model.likelihood != "gaussian":
        model.n_top_genes = N_TOP_GENES
        say(f"modelling the {N_TOP_GENES:,} most variable of {n_genes:,} genes; --n-top-genes 0 for all of them")
    summary = fit_and_write(
        model,
        adata,
        output,
        source=data.name,
        path=data,
        reading={"path": str(data.absolute()), **reading._asdict()},
        keep_reference=keep_reference,
        auto_remedy=auto_remedy,
        auto=auto,
        repeats=(chosen.get("data", {}).get("sha256_values"), config),
    )
    point_to_report(output)
    _end_if_interrupted(summary)


def _end_if_interrupted(summary: "dict[str, Any]") -> None:
    """End with the exit code of an interrupt if the run that was written is of an interrupted fit."""
    if summary["stopped"]:
        raise typer.Exit(INTERRUPTED)


@app.command(rich_help_panel=_FIT)
def diagnose(
    run: options.Run,
    data: options.DataOfRun = None,
    groupby: options.TypesColumn = None,
    on_disk: options.OnDisk = False,
    as_json: options.AsJson = False,
) -> None:
    """Look for posterior collapse and related faults of a model, and say what to try.

    `celbo diagnose run`

    First comes a verdict in one line, then the measurements on held-out cells, worst first, then the remedies in the
    order to try them.
    """
    model, adata, _, _ = open_run(run, data, on_disk=on_disk)
    diagnosis = model.diagnose(adata, groupby=groupby)
    typer.echo(json.dumps(diagnosis.to_json(), indent=1, ensure_ascii=False) if as_json else plain(str(diagnosis)))


@app.command(rich_help_panel=_FIT)
def cure(
    run: options.Run,
    output: options.OutFolder,
    data: options.DataOfRun = None,
    tolerance: options.Tolerance = 1.0,
    tries: options.Tries = 3,
    on_disk: options.OnDisk = False,
    as_json: options.AsJson = False,
) -> None:
    """Diagnose a run, apply the first remedy that fits, fit again and compare, until the model is healthy.

    `celbo cure run -o cured`

    The folder gets the files of `celbo fit` for the best model, and **cure.json** with all attempts.
    """
    refuse_overwriting_run(run, output)
    model, adata, path, reading = open_run(run, data, on_disk=on_disk)
    from celbo.fit.progress import shown_progress
    from celbo.runs.claims import claimed_folder
    from celbo.runs.run_folder import write_run

    with claimed_folder(output, path):
        started = time.perf_counter()
        with shown_warnings() as notes, shown_progress() as track:
            cured, trail = celbo.cure(model, adata, tolerance=tolerance, tries=tries, track=stop_on_signal(track))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            write_run(
                output,
                cured,
                cells_of_fit(cured, adata),
                seconds=time.perf_counter() - started,
                source=path.name,
                notes=notes,
                reading={"path": str(path.absolute()), **reading._asdict()},
                trail=trail,
            )
            draw_report(output)
    if as_json:
        typer.echo((output / "cure.json").read_text())
    else:
        show_trail(trail)
    point_to_report(output)


@app.command(rich_help_panel=_FIT)
def report(run: options.RunToDraw) -> None:
    """Draw the report of a run again: **report.html** and **latent.png**, from the other files of its folder.

    `celbo report run`

    If celbo did not change since `celbo fit` wrote the run, the page has the same bytes. It needs no cells and no
    model.
    """
    folder = run_of(run)
    if not folder.exists():
        checkpoint.find_folder(folder)
    if not record_of_run(folder):
        raise ModelFileError(f"{folder} has no run.json of celbo fit or celbo cure; name a folder that they wrote.")
    from celbo.runs.claims import claimed_folder
    from celbo.runs.reporting import write_report

    with claimed_folder(folder, otherwise="copy the run, and name the copy"):
        write_report(folder)
    point_to_report(folder)


@app.command(rich_help_panel=_FIT)
def compare(
    runs: options.Runs,
    data: options.CompareData,
    on_disk: options.OnDisk = False,
    as_json: options.AsJson = False,
    seed: options.Seed = 0,
) -> None:
    """Compare models by how likely the same held-out cells are under each, and say how sure the difference is.

    `celbo compare run_nb run_zinb --data counts.h5ad`
    """
    if len({run.resolve() for run in runs}) < max(2, len(runs)):
        raise UsageError("a comparison needs two runs or more, each named once.")
    first, adata, _, _ = open_run(runs[0], data, on_disk=on_disk)
    models = {str(runs[0]): first, **{str(run): celbo.load(run) for run in runs[1:]}}
    comparison = celbo.compare(models, adata, seed=seed)
    typer.echo(json.dumps(comparison.to_json(), indent=1, ensure_ascii=False) if as_json else plain(str(comparison)))


@app.command(rich_help_panel=_FIT)
def inspect(run: options.Run, as_json: options.AsJson = False) -> None:
    """Check that a model folder is complete, and list what it holds. Nothing in it is executed."""
    description = describe(checkpoint.describe_folder(run))
    if as_json:
        typer.echo(json.dumps(description, indent=1, ensure_ascii=False))
        return
    for name, value in description.items():
        if isinstance(value, dict):
            value = [f"{key} ({item if isinstance(item, str) else ', '.join(item)})" for key, item in value.items()]
        text = ", ".join(map(str, value)) if isinstance(value, list) else value
        typer.echo(f"{name:<17}{'none' if text in ('', None) else plain(str(text))}")


for _command in (
    model_commands.embed,
    model_commands.predict,
    model_commands.score,
    model_commands.express,
    model_commands.counterfactual,
    model_commands.de,
    model_commands.sample,
):
    app.command(rich_help_panel=_ASK)(_command)
app.command("map", rich_help_panel=_ASK)(model_commands.map_cells)


def main() -> None:
    """Run the command line."""
    guarded(app)
