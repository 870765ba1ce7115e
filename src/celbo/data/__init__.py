"""What celbo takes from an AnnData: the schema, the checks, the sources of minibatches."""

from celbo.data.schema import Condition, Schema, build_schema
from celbo.data.sources import MemorySource, open_source, read_adata

__all__ = ["Condition", "MemorySource", "Schema", "build_schema", "open_source", "read_adata"]
