"""How good embeddings are: retrieval, its metrics, and its report."""
