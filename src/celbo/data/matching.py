"""Match genes by name, align columns to the order of a model, and explain why names do not match."""

import re
from collections.abc import Collection, Sequence

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from celbo.errors import listed

__all__ = ["align", "explain_mismatch", "kind_of_names", "match_genes"]

_SAMPLE = 1000
_KINDS = {
    "Ensembl ids with version numbers": re.compile(r"ENS[A-Z]*[GT]\d{6,}\.\d+(_.*)?"),
    "Ensembl ids": re.compile(r"ENS[A-Z]*[GT]\d{6,}"),
    "RefSeq accessions": re.compile(r"[NX][MR]_\d+(\.\d+)?"),
    "numbers (Entrez ids, or no names at all)": re.compile(r"\d+"),
}


def match_genes(genes: Sequence[str], var_names: pd.Index) -> NDArray[np.intp]:
    """Return the positions of genes among the names of the data, ``(genes,)``; -1 for a gene that the data lack."""
    return var_names.get_indexer(pd.Index(genes))


def align(x: sp.csr_matrix, columns: NDArray[np.intp]) -> sp.csr_matrix:
    """Put columns into the model's order. Leave out unknown columns, and fill missing ones with zeros.

    Examples
    --------
    >>> align(sp.csr_matrix([[1, 2, 3]]), np.array([2, -1, 0])).toarray()
    array([[3, 0, 1]])
    """
    if np.array_equal(columns, np.arange(x.shape[1])):
        return x
    position = np.full(x.shape[1], -1, np.int32)
    is_present = columns >= 0
    position[columns[is_present]] = np.flatnonzero(is_present)
    indices = position[x.indices]
    kept = indices >= 0
    n_before = np.concatenate([[0], np.cumsum(kept)])
    aligned = sp.csr_matrix((x.data[kept], indices[kept], n_before[x.indptr]), shape=(x.shape[0], len(columns)))
    aligned.sort_indices()
    return aligned


def kind_of_names(names: Sequence[str]) -> str:
    """Return the kind of identifier that most of these names are, or "symbols".

    Examples
    --------
    >>> kind_of_names(["ENSG00000141510.12", "ENSG00000012048.4"]), kind_of_names(["TP53", "BRCA1"])
    ('Ensembl ids with version numbers', 'symbols')
    """
    sample = [str(name) for name in names[:: max(1, len(names) // _SAMPLE)]]
    for kind, pattern in _KINDS.items():
        if sum(bool(pattern.fullmatch(name)) for name in sample) > len(sample) / 2:
            return kind
    return "symbols"


def explain_mismatch(genes: Sequence[str], var: pd.DataFrame) -> str:
    """Describe how many of a model's genes these data lack, and what would match more of them.

    Parameters
    ----------
    genes
        Genes of the model.
    var
        Table of the data's genes, indexed by name. Its columns are searched as well.

    Examples
    --------
    >>> var = pd.DataFrame({"symbol": ["TP53", "BRCA1"]}, index=["ENSG00000141510", "ENSG00000012048"])
    >>> print(explain_mismatch(["TP53", "BRCA1"], var))
    2 of the model's 2 genes are not in these data (0 % match): 'TP53', 'BRCA1'. Yours look like Ensembl ids
    ('ENSG00000141510', 'ENSG00000012048'), the model's are symbols. var['symbol'] matches 2 of 2 (100 %): use
    --gene-column symbol, or adata.var_names = adata.var['symbol'].
    """
    wanted, n = set(genes), len(genes)
    names = [str(name) for name in var.index]
    present = set(names)
    missing = [gene for gene in genes if gene not in present]
    n_matched = n - len(missing)
    ours, theirs = kind_of_names(genes), kind_of_names(names)
    lines = [
        f"{len(missing):,} of the model's {n:,} genes are not in these data ({_percent(n_matched, n)} match): "
        f"{listed(missing)}."
    ]
    if ours != theirs:
        lines.append(f"Yours look like {theirs} ({listed(names[:3])}), the model's are {ours}.")
    hints = _columns_that_match(wanted, var, n_matched)
    if (matched := len(set(map(_unversioned, wanted)) & set(map(_unversioned, present)))) > n_matched:
        hints.append(f"Without version numbers {_percent(matched, n)} match. {_how_to_match_versions(genes)}")
    if (matched := len({gene.upper() for gene in wanted} & {name.upper() for name in present})) > n_matched:
        hints.append(f"If capitals are ignored {_percent(matched, n)} match: symbols of another species, perhaps.")
    if not hints and ours != theirs:
        hints.append("Give var_names the model's kind of identifier.")
    lines += hints
    return " ".join(lines)


def _columns_that_match(wanted: Collection[str], var: pd.DataFrame, n_matched: int) -> list[str]:
    """Describe the column of var that matches most wanted genes, if it matches more than the names do."""
    matches = {
        column: len(set(var[column].dropna().astype(str)) & set(wanted))
        for column in var.columns
        if not pd.api.types.is_float_dtype(var[column]) and not pd.api.types.is_bool_dtype(var[column])
    }
    best = max(matches, key=lambda column: matches[column], default=None)
    if best is None or matches[best] <= n_matched:
        return []
    return [
        f"var[{best!r}] matches {matches[best]:,} of {len(wanted):,} ({_percent(matches[best], len(wanted))}): use "
        f"--gene-column {best}, or adata.var_names = adata.var[{best!r}]."
    ]


def _how_to_match_versions(genes: Sequence[str]) -> str:
    """Say how to give cells the names of the model's genes, up to version numbers."""
    if all(gene == _unversioned(gene) for gene in genes):
        return r"Take them off: adata.var_names = adata.var_names.str.replace(r'\.\d+$', '', regex=True)."
    return (
        "The model's names have them. Give each gene its name in the model, in Python: import re, anndata, celbo; "
        "genes = celbo.load('RUN').schema_.genes; adata = anndata.read_h5ad('CELLS.h5ad'); "
        r"cut = lambda name: re.sub(r'\.\d+$', '', name); "
        "names = {cut(gene): gene for gene in genes} | {gene: gene for gene in genes}; adata.var_names = "
        "[names.get(name, names.get(cut(name), name)) for name in adata.var_names]; adata.write_h5ad('NEW.h5ad')"
    )


def _unversioned(name: str) -> str:
    return re.sub(r"\.\d+$", "", name)


def _percent(part: int, whole: int) -> str:
    return f"{100 * part // max(whole, 1)} %"
