"""Compiled encoders: the same rows, gradients and names, and no graph for every batch size.

The backend traces as every backend does and then runs torch's own kernels, so that no compiler is needed.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel

from mmrep.data.datamodule import ShardDataModule
from mmrep.encoders import ConvImageEncoder, FeaturesEncoder, MelAudioEncoder, NgramTextEncoder, SeriesEncoder
from mmrep.errors import ConfigError
from mmrep.interop.load import load
from mmrep.losses import PairwiseCLIPLoss
from mmrep.model import MultimodalModel
from mmrep.modules import PairwiseCLIP
from mmrep.modules.gradient_caching import GradientCaching
from mmrep.modules.preparation import compile_encoders
from tests.gloo_pool import GlooPool

BACKEND = "aot_eager"
ENCODERS: dict[str, Any] = {
    "series": lambda d: SeriesEncoder(d, channels=2, length=32, width=8, stages=1),
    "text": lambda d: NgramTextEncoder(d, width=16, buckets=99, length=32),
    "audio": lambda d: MelAudioEncoder(d, seconds=0.2, width=8),
}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """No graph of another test's, and torch's own limits afterwards."""
    torch._dynamo.reset()
    counters.clear()
    limit = torch._dynamo.config.recompile_limit
    yield
    torch._dynamo.config.recompile_limit = limit
    torch._dynamo.reset()


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def inputs(n: int) -> dict[str, Any]:
    return {
        "series": torch.randn(n, 2, 32),
        "text": torch.randint(0, 99, (n, 32), dtype=torch.int32),
        "audio": torch.randint(-9999, 9999, (n, 3200), dtype=torch.int16),
    }


def results(module: PairwiseCLIP, batch: dict[str, Any]) -> dict[str, Tensor]:
    torch.manual_seed(1)
    module.zero_grad()
    rows = module.model(batch, module.caching)
    module.model.loss(rows).loss.backward()
    return rows | {name: weight.grad for name, weight in module.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("options", [{}, {"micro_batch_size": 4}, {"activation_checkpointing": True}])
def test_rows_gradients_and_names_are_those_of_eager(options: dict[str, Any]) -> None:
    """With random masks, in parts, with blocks computed again."""
    made = []
    for compile in (False, BACKEND):
        torch.manual_seed(0)
        made.append(PairwiseCLIP(ENCODERS, embed_dim=8, compile=compile, **options))
    eager, compiled = made
    assert list(eager.state_dict()) == list(compiled.state_dict())
    batch = inputs(6)
    expected, found = results(eager, batch), results(compiled, batch)
    assert graphs() >= 3 and expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, rtol=1e-4, atol=1e-5), name
    assert results(copy.deepcopy(compiled), batch).keys() == found.keys(), "a copy is not compiled, and works"


def test_no_graph_for_every_batch_size_however_many_encoders() -> None:
    """Torch counts graphs by function, and all encoders share theirs: at 8 it would give up, silently."""
    encoders = [FeaturesEncoder(4, size=n + 2, layers=0) for n in range(9)]
    compile_encoders(encoders, BACKEND)

    def epoch() -> None:
        for encoder in encoders:
            for n in (8, 8, 3, 5, 7):
                encoder.train()(torch.randn(n, encoder.size)).sum().backward()
            with torch.no_grad():
                for n in (8, 4, 6):
                    encoder.eval()(torch.randn(n, encoder.size))

    epoch()
    after_one = graphs()
    assert after_one <= 4 * len(encoders)
    epoch()
    assert graphs() == after_one and counters["frames"]["ok"] == counters["frames"]["total"]


def test_parts_are_compiled_too() -> None:
    encoder = FeaturesEncoder(4, size=6, width=8)
    compile_encoders([encoder], BACKEND)
    for n in (10, 11, 10, 12):  # parts of 4, and of 1 to 3
        GradientCaching(4)(encoder, torch.randn(n, 6)).sum().backward()
    assert 1 <= graphs() <= 3


def test_a_compiled_run_writes_ordinary_checkpoints(tiny_shards: Path, tmp_path: Path) -> None:
    encoders: dict[str, Any] = {
        "image": lambda d: ConvImageEncoder(d, image_size=16, width=8),
        "text": ENCODERS["text"],
    }
    module = PairwiseCLIP(encoders, embed_dim=8, compile=BACKEND, micro_batch_size=8)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    run = pl.Trainer(max_epochs=1, default_root_dir=tmp_path, enable_model_summary=False, **quiet)
    run.fit(module, ShardDataModule(str(tiny_shards), global_batch_size=16, num_workers=0))
    assert graphs() >= 2
    run.save_checkpoint(tmp_path / "a.ckpt")
    loaded = load(tmp_path / "a.ckpt")
    assert list(loaded.state_dict()) == list(module.model.state_dict())
    assert loaded.encode(text=["red"])["text"].shape == (1, 8)


def ddp_gradients(rows: dict[str, Tensor], compiled: bool) -> dict[str, Tensor]:
    torch.manual_seed(0)
    encoders = {name: SeriesEncoder(6, channels=2, length=32, width=8, stages=1) for name in rows}
    model = MultimodalModel(encoders, PairwiseCLIPLoss())
    if compiled:
        compile_encoders(list(encoders.values()), BACKEND)

    class Objective(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, rows: dict[str, Tensor]) -> Tensor:
            found: Tensor = model.loss(model(rows, GradientCaching(2))).loss
            return found

    DistributedDataParallel(Objective())(rows).backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def test_compiled_on_two_ranks(pool2: GlooPool) -> None:
    shares = [{name: torch.randn(n, 2, 32) for name in "ab"} for n in (5, 3)]
    eager, compiled = (pool2.run(ddp_gradients, [(share, c) for share in shares], 90) for c in (False, True))
    for one, other in zip(eager, compiled, strict=True):
        for name, gradient in one.items():
            assert torch.allclose(other[name], gradient, rtol=1e-4, atol=1e-6), name


@pytest.mark.slow  # a minute of compilation
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no compiler is here")
def test_inductor() -> None:
    """The default backend; without a C++ compiler only the others are tested."""
    torch.manual_seed(0)
    encoder = FeaturesEncoder(4, size=6, width=8)
    batch = torch.randn(5, 6)
    expected = encoder(batch)
    module = PairwiseCLIP(
        {"a": lambda _: encoder, "b": lambda d: FeaturesEncoder(d, size=6)}, embed_dim=4, compile=True
    )
    assert torch.allclose(module.model.encoders["a"](batch), expected, atol=1e-5) and graphs() == 1


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"compile='inductr'; did you mean 'inductor'\?"):
        PairwiseCLIP(ENCODERS, compile="inductr")
