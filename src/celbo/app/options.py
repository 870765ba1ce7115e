"""Arguments and options of the commands, each defined once, in the panels of the help."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from celbo import checkpoint
from celbo.data.paths import existing_path

N_TOP_GENES = 4000
"""Most genes that `celbo fit` models unless asked for more."""

DATA, MODEL, TRAINING, MORE = "Data", "Model", "Training", "More"
"""Panels of the help. Options without a panel are the common ones, and come first."""


def _option(
    help: str,
    *names: str,
    panel: str | None = None,
    metavar: str | None = None,
    minimum: int | None = None,
    check: Callable[[Any], Any] | None = None,
) -> Any:
    """Describe an option. ``metavar`` stands for its value in the help, ``check`` is called with the value."""
    return typer.Option(*names, help=help, rich_help_panel=panel, metavar=metavar, min=minimum, callback=check)


def _flag(help: str, *names: str, panel: str | None = None) -> Any:
    """Describe an option without a value."""
    return typer.Option(*names, help=help, rich_help_panel=panel, metavar="", show_default=False)


Paths = TypeVar("Paths", Path, list[Path], Path | None, list[Path] | None)


def _refuse_missing_cells(path: Paths) -> Paths:
    """Refuse a path without data while the options are read, which is before torch and anndata are loaded."""
    if isinstance(path, Path):
        existing_path(path)
    return path


def _refuse_missing_models(paths: Paths) -> Paths:
    """Refuse a folder without a model while the options are read."""
    for path in [paths] if isinstance(paths, Path) else paths or ():
        checkpoint.find_folder(path)
    return paths


# What to read and where to write.
_COUNTS = "Cells with raw counts: an .h5ad file or a .zarr folder."
Data = Annotated[Path, typer.Argument(help=_COUNTS, callback=_refuse_missing_cells)]
DataToFit = Annotated[Path, typer.Argument(help=_COUNTS)]
"""The command itself refuses a path without data: another option may be a question that needs none."""
DataOfRun = Annotated[
    Path | None,
    typer.Argument(
        help="Cells: an .h5ad file or a .zarr folder.  [default: the cells of the run]", callback=_refuse_missing_cells
    ),
]
Run = Annotated[
    Path,
    typer.Argument(help="Folder that celbo fit wrote, or the model folder in it.", callback=_refuse_missing_models),
]
RunToDraw = Annotated[Path, typer.Argument(help="Folder that celbo fit or celbo cure wrote.")]
Runs = Annotated[
    list[Path], typer.Argument(help="Two runs or more, the simplest first.", callback=_refuse_missing_models)
]
OutFolder = Annotated[
    Path, _option("Folder to write to. It is made if it does not exist.", "-o", "--output", metavar="FOLDER")
]
OutCells = Annotated[Path, _option("The .h5ad file to write.", "-o", "--output", metavar="FILE")]
OutTable = Annotated[Path, _option("The .csv file to write.", "-o", "--output", metavar="FILE")]
Config = Annotated[
    Path | None,
    _option(
        "Read options from a .toml file, or from the run.json of a run to repeat. The command line has priority.",
        metavar="FILE",
    ),
]
AsJson = Annotated[bool, _flag("Print JSON.", "--json")]
Seed = Annotated[int, _option("Same seed, same result.", panel=MORE, metavar="N", minimum=0)]

# Columns of the data, and how to read them.
Conditions = Annotated[
    list[str] | None,
    _option("Column of obs to give to the model, e.g. treatment; repeat for more.", "--condition", metavar="COLUMN"),
]
Nuisance = Annotated[
    list[str] | None,
    _option("Column of obs whose effect to remove, e.g. batch or donor; repeat for more.", metavar="COLUMN"),
]
Labels = Annotated[
    str | None,
    _option("Column of obs with cell types, known for some cells, for celbo predict.", panel=DATA, metavar="COLUMN"),
]
TypesToCheck = Annotated[
    str | None,
    _option(
        "Column of obs with cell types; a nuisance whose levels have types of their own gets a warning.",
        "--groupby",
        panel=DATA,
        metavar="COLUMN",
    ),
]
Unlabelled = Annotated[
    str, _option("Value of the labels column where the type is unknown.", panel=DATA, metavar="VALUE")
]
NTopGenes = Annotated[
    int | None,
    _option(
        f"Number of most variable genes to model; 0 for all.  [default: at most {N_TOP_GENES}; gaussian: all]",
        panel=DATA,
        metavar="N",
    ),
]
Layer = Annotated[str | None, _option("Layer with the counts.  [default: X]", panel=DATA, metavar="NAME")]
SizeFactor = Annotated[
    str | None, _option("Column of obs to use in place of each cell's sum of counts.", panel=DATA, metavar="COLUMN")
]
AllowNoninteger = Annotated[
    bool, _flag("Accept estimated counts, which are not whole numbers.", "--allow-noninteger", panel=DATA)
]
Features = Annotated[
    str | None,
    _option(
        'Type of features to model, e.g. "Gene Expression", as var["feature_types"] names it; all for every type.  '
        "[default: the genes, if var names genes beside others]",
        panel=DATA,
        metavar="TYPE",
    ),
]
MaskAbsent = Annotated[
    str | None,
    _option(
        "Column of obs, such as the sample: genes without a count in a whole level count as not measured there.",
        panel=DATA,
        metavar="COLUMN",
    ),
]
GeneColumn = Annotated[
    str | None, _option("Column of var with the gene names, in place of its index.", panel=DATA, metavar="COLUMN")
]
MakeUnique = Annotated[bool, _flag("Number gene names that occur more than once.", "--make-unique", panel=DATA)]
NaAsLevel = Annotated[
    bool, _flag("Treat a missing value of a condition as a level of its own.", "--na-as-level", panel=DATA)
]
OnDisk = Annotated[bool, _flag("Leave the counts on disk: less memory, but slower.", "--on-disk", panel=DATA)]
Unseen = Annotated[
    str,
    _option(
        "How to read levels that the model does not know: refuse, nearest (the nearest known level), marginal (all "
        "known levels in equal parts), or adapt (learn them from these cells).",
        panel=DATA,
        metavar="HOW",
    ),
]
GenesPresent = Annotated[
    float,
    _option("Smallest share of the model's genes that the data must have.", panel=DATA, metavar="SHARE"),
]

# The model that `celbo fit` makes.
Likelihood = Annotated[
    str,
    _option(
        "Distribution of the counts: nb (most droplet counts), zinb, poisson, bernoulli (detection) or gaussian. auto "
        "chooses the simplest that explains held-out counts as well as any.",
        panel=MODEL,
        metavar="NAME",
    ),
]
LatentDim = Annotated[
    str,
    _option(
        "Width of the latent space. auto chooses the smallest that explains held-out counts as well.",
        panel=MODEL,
        metavar="N",
    ),
]
HiddenDims = Annotated[
    list[int] | None,
    _option(
        "Width of a hidden layer; repeat for more layers.  [default: 128]", "--hidden-dim", panel=MODEL, metavar="N"
    ),
]
Prior = Annotated[str, _option("normal, conditional, mixture:20 or vamp:100.", panel=MODEL, metavar="NAME")]
Interactions = Annotated[
    list[str] | None,
    _option(
        "Two conditions whose effects depend on each other, as batch:treatment; repeat for more.",
        "--interaction",
        panel=MODEL,
        metavar="A:B",
    ),
]
Dispersion = Annotated[
    str,
    _option(
        "Theta per gene, gene-condition or gene-cell (nb, zinb); fixed for sigma = 1 (gaussian).",
        panel=MODEL,
        metavar="NAME",
    ),
]
Objective = Annotated[str, _option("vae, or autoencoder (no KL, no sampling).", panel=MODEL, metavar="NAME")]
Norm = Annotated[str, _option("Normalisation of hidden layers: none, layer or batch.", panel=MODEL, metavar="NAME")]
Dropout = Annotated[float, _option("Share of hidden units set to zero in training.", panel=MODEL, metavar="SHARE")]

# How `celbo fit` trains the model.
Epochs = Annotated[
    int | None,
    _option(
        "Most passes over the cells.  [default: 10 to 200, by the number of cells; up to 4 times as many]",
        panel=TRAINING,
        metavar="N",
    ),
]
Patience = Annotated[
    int,
    _option(
        "Epochs without a better held-out ELBO before the learning rate falls; the third time training stops.",
        panel=TRAINING,
        metavar="N",
    ),
]
BatchSize = Annotated[int, _option("Cells in a minibatch.", panel=TRAINING, metavar="N")]
LearningRate = Annotated[
    float, _option("Learning rate of Adam. It rises over the first 100 steps.", panel=TRAINING, metavar="RATE")
]
WarmupFraction = Annotated[
    float,
    _option(
        "Share of the planned training over which the KL weight rises, at most half.", panel=TRAINING, metavar="SHARE"
    ),
]
ValidationFraction = Annotated[float, _option("Share of the cells to hold out.", panel=TRAINING, metavar="SHARE")]
Remedies = Annotated[
    list[str] | None,
    _option(
        "Remedy for posterior collapse, e.g. free_bits:0.1; repeat for more. 'list' shows them all.",
        "--remedy",
        panel=TRAINING,
        metavar="NAME",
    ),
]
AutoRemedy = Annotated[
    bool, _flag("If the latent space collapsed, apply remedies as celbo cure does.", "--auto-remedy", panel=TRAINING)
]
Device = Annotated[str, _option("auto, cpu, cuda, cuda:1, ...", panel=TRAINING, metavar="NAME")]
Threads = Annotated[int | None, _option("Number of processor threads.", panel=TRAINING, metavar="N")]
EncodeContext = Annotated[bool, _flag("Give the conditions to the encoder too.  [default: yes]", panel=MORE)]
KeepReference = Annotated[
    bool,
    _flag("Keep the cells' latent positions in the model folder (no counts, no names).  [default: yes]", panel=MORE),
]

# What the commands ask of a fitted model.
ModelToCheck = Annotated[
    Path | None,
    _option(
        "Run, or its model folder, that will read these cells.",
        "--model",
        metavar="FOLDER",
        check=_refuse_missing_models,
    ),
]
TypesColumn = Annotated[
    str | None,
    _option("Column of obs with known types, to search z for conditions within each.", "--groupby", metavar="COLUMN"),
]
Tolerance = Annotated[float, _option("Nats per cell of held-out log p(x) that a remedy may cost.", metavar="NATS")]
Tries = Annotated[int, _option("Most models to fit.", metavar="N")]
CompareData = Annotated[
    Path,
    _option(
        "Cells to compare the models on: those they were fitted to, or others.",
        "--data",
        metavar="FILE",
        check=_refuse_missing_cells,
    ),
]
NewConditions = Annotated[
    list[str],
    _option("Condition and its new value, as stim=treated; repeat for more.", "--set", metavar="NAME=VALUE"),
]
DrawCounts = Annotated[bool, _flag("Write counts drawn from the model in place of means.", "--sample")]
Others = Annotated[
    list[Path] | None,
    _option(
        "Run of the same cells with another seed, to combine with equal weight; repeat for more.",
        "--other",
        metavar="FOLDER",
        check=_refuse_missing_models,
    ),
]
DrawsPerModel = Annotated[int, _option("Draws of z for each cell and model.", "--n-samples", panel=MORE, metavar="N")]
NCells = Annotated[int, _option("Number of cells.", "-n", metavar="N")]
GivenConditions = Annotated[
    list[str] | None,
    _option("Condition and its value, as stim=ctrl; repeat for more.", "--given", metavar="NAME=VALUE"),
]
Over = Annotated[
    list[str] | None,
    _option(
        "Condition over whose levels to take the mean, with equal weights, e.g. batch; repeat for more.",
        "--over",
        metavar="NAME",
    ),
]
SameLibrary = Annotated[
    float | None,
    _option("Library size to decode at, the same for all cells.  [default: each cell's own]", "--library", metavar="N"),
]
Genes = Annotated[
    list[str] | None,
    _option("Gene to write; repeat for more.  [default: all genes of the model]", "--gene", metavar="NAME"),
]
GenesFile = Annotated[
    Path | None, _option("Text file with the genes to write, one name a line.", "--genes", metavar="FILE")
]
OutExpression = Annotated[Path, _option("The .h5ad file or .zarr folder to write.", "-o", "--output", metavar="FILE")]
Source = Annotated[
    str,
    _option(
        "Distribution to draw z from: aggregated (posteriors of the cells of fit), mixture or prior.",
        "--from",
        metavar="NAME",
    ),
]
Library = Annotated[float | None, _option("Library size of all cells.  [default: drawn]", metavar="COUNT")]
Outliers = Annotated[bool, _flag("Score how unusual each cell is, given its depth and batch.", "--outliers")]
Refine = Annotated[
    bool, _flag("Fit the posterior of each cell separately first: slower, but more reliable.", "--refine")
]
DrawsPerCell = Annotated[
    int | None,
    _option("Draws of z for each cell, for log p(x).  [default: 500]", "--n-samples", panel=MORE, metavar="N"),
]
GroupBy = Annotated[str, _option("Column of obs with the groups of cells.", "--groupby", metavar="COLUMN")]
Group = Annotated[str | None, _option("Group to compare.  [default: each group]", metavar="NAME")]
Reference = Annotated[str | None, _option("Group to compare it with.  [default: all other cells]", metavar="NAME")]
LeastChange = Annotated[float, _option("Smallest log2 fold change that matters.", metavar="X")]
PairBy = Annotated[
    str | None,
    _option("Column of obs, e.g. donor: compare groups within each of its levels.", metavar="COLUMN"),
]
