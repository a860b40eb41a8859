"""Sequential recommenders whose frozen item embeddings become behaviour tokens."""
