"""What celbo takes from an AnnData: the checks, the schema, the sources of minibatches."""

from celbo.data.checks import Check, Problem, check_adata, check_query
from celbo.data.conditions import Condition
from celbo.data.read import fill_missing_levels, name_genes, read_adata
from celbo.data.schema import Schema
from celbo.data.sources import CellSource, make_source, open_source

__all__ = [
    "CellSource",
    "Check",
    "Condition",
    "Problem",
    "Schema",
    "check_adata",
    "check_query",
    "fill_missing_levels",
    "make_source",
    "name_genes",
    "open_source",
    "read_adata",
]
