"""Arguments and options that several commands take, with their help."""

from pathlib import Path
from typing import Annotated

import typer

DataPath = Annotated[Path, typer.Argument(help="Cells with raw counts: an .h5ad file or a .zarr folder.")]
RunPath = Annotated[Path, typer.Argument(help="What `celbo fit` wrote, or the model folder in it.")]
OutFolder = Annotated[Path, typer.Option("-o", "--output", help="Folder to write to; made if it is not there.")]
Seed = Annotated[int, typer.Option(help="Same seed, same result.", min=0)]
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
Interactions = Annotated[
    list[str] | None,
    typer.Option("--interaction", help="Two conditions that do more together: batch:treatment; repeat for more."),
]
_LIKELIHOODS = "nb (most droplet counts), zinb, poisson, bernoulli (detection), or gaussian"
LikelihoodToFit = Annotated[
    str, typer.Option(help=f"{_LIKELIHOODS}; auto for the simplest that explains held-out counts as well as any.")
]
Labels = Annotated[str | None, typer.Option(help="Column of obs with types, known of some cells, for celbo predict.")]
Unlabelled = Annotated[str, typer.Option(help="What that column reads where the type is unknown.")]
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
