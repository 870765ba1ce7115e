"""All parts of a file of expression but the values: the genes, the tables of cells and genes, and how it was made."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray

from celbo.data.features import features_of_query
from celbo.data.schema import Schema
from celbo.errors import UsageError, listed
from celbo.fit.cells import Cells
from celbo.fit.fitted import Fitted
from celbo.runs.answers import EXPRESSION

__all__ = ["chosen_genes", "expression_frame"]


def chosen_genes(schema: Schema, names: Sequence[str], file: Path | None) -> NDArray[np.intp]:
    """Return the positions of genes among those of a model; all positions if none are named.

    Parameters
    ----------
    schema
        Schema of the model.
    names
        Names of genes, in the order wanted. A name that occurs again counts once.
    file
        Text file with further names, one a line; blank lines are ignored.

    Raises
    ------
    UsageError
        If the file cannot be read or has no name, or the model does not have a gene.
    """
    if file is None and not names:
        return np.arange(len(schema.genes))
    wanted = list(dict.fromkeys([*names, *([] if file is None else _names_in(file))]))
    columns = pd.Index(schema.genes).get_indexer(pd.Index(wanted))
    if (columns < 0).any():
        missing = [name for name, column in zip(wanted, columns, strict=True) if column < 0]
        why = "" if schema.selection is None else f" (chosen among those of the data: {schema.selection})"
        raise UsageError(
            f"{len(missing):,} of the {len(wanted):,} genes asked for are not among the {len(schema.genes):,} genes of "
            f"the model{why}: {listed(missing)}. Leave them out, or fit a model that has them."
        )
    return columns


def _names_in(file: Path) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text in UTF-8"
        raise UsageError(f"--genes {file} cannot be read: {reason}. Name a text file with one gene a line.") from error
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise UsageError(f"--genes {file} has no name in it; write one gene a line.")
    return names


def expression_frame(
    fitted: Fitted, cells: Cells, adata: AnnData, columns: NDArray[np.intp], how: Mapping[str, Any]
) -> AnnData:
    """Make the AnnData of expression without X.

    obs is that of the cells, with ``celbo_empty`` if some have no count. var is that of the cells for the chosen genes;
    if no cell has some of these, ``celbo_measured`` is False there. Columns of genes that the file lacks are missing
    values.
    ``uns["celbo_expression"]`` has the likelihood, and the entries of ``how`` that are not empty.

    Parameters
    ----------
    fitted, cells
        The model, and the cells opened for it.
    adata
        The cells as they were read.
    columns
        Positions of the chosen genes among those of the model.
    how
        How they are decoded.
    """
    obs = adata.obs.copy()
    if cells.empty.any():
        obs["celbo_empty"] = cells.empty
    genes = pd.Index(fitted.schema.genes)[columns]
    features = features_of_query(adata.var, fitted.schema.features).of(
        adata.var
    )  # an antibody may be named as its gene
    in_file, measured = cells.measured[columns], cells.source.measured_in_any[columns]
    var = features.iloc[fitted.schema.columns(features.index)[columns][in_file]]
    if not in_file.all():
        flags = {name: "boolean" for name, column in var.items() if pd.api.types.is_bool_dtype(column)}
        var = var.astype(flags).reindex(genes)  # a column of bool has no missing values
    if not measured.all():
        var = var.assign(celbo_measured=measured)
    kept = {name: value for name, value in how.items() if value}
    return AnnData(obs=obs, var=var.copy(), uns={EXPRESSION: {"likelihood": fitted.likelihood.name, **kept}})
