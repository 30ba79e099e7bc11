"""Embeddings on disk, and finding samples in them by any modality or several."""

from mmrep.search.embed import EmbeddingJob
from mmrep.search.index import Answers, EmbeddingIndex, Hit

__all__ = ["Answers", "EmbeddingIndex", "EmbeddingJob", "Hit"]
