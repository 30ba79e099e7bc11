"""A small untrained model of three modalities, and its embeddings of the tiny shards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mmrep.data.index import Index
from mmrep.encoders import ConvImageEncoder, Encoder, MelAudioEncoder, NgramTextEncoder
from mmrep.losses import PairwiseCLIPLoss
from mmrep.model import MultimodalModel
from mmrep.search import EmbeddingJob
from mmrep.search.manifest import Manifest


def small(loss: Any = None, *, seed: int = 0, **settings: Any) -> MultimodalModel:
    torch.manual_seed(seed)
    encoders: dict[str, Encoder] = {
        "image": ConvImageEncoder(16, image_size=16, width=8),
        "text": NgramTextEncoder(16, width=16, buckets=512, length=32),
        "audio": MelAudioEncoder(16, seconds=0.2, width=16),
    }
    return MultimodalModel(encoders, loss or PairwiseCLIPLoss(), **settings).eval()


Embed = Callable[..., tuple[EmbeddingJob, Manifest | None]]


def embed(model: MultimodalModel, shards: Path, out: Path, **settings: Any) -> tuple[EmbeddingJob, Manifest | None]:
    """Run a whole job in batches that do not end where shards end."""
    job = EmbeddingJob(model, Index.load(shards), out, data=str(shards), **settings)
    job.run(batch_size=9)
    return job, job.finish()


@pytest.fixture(scope="session", params=["npy", "parquet"])
def embedded(request: pytest.FixtureRequest, tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Embeddings of the tiny shards, in either format; read only."""
    folder = tmp_path_factory.mktemp("embedded") / request.param
    embed(small(), tiny_shards, folder, file_format=request.param)
    return folder
