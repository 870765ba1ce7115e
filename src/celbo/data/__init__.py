"""What celbo reads from an AnnData: checks, the schema, and sources of minibatches."""
