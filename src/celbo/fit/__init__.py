"""From a schema to a fitted model."""
