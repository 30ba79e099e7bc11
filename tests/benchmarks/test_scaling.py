"""The scaling model: its bytes are those that are counted, its memory those that were measured, its page what it prints."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F

from benchmarks import scaling, scaling_model, scaling_rows, scaling_tables
from benchmarks.scaling_model import LOSSES, Cluster, LossCost, Shape, StepTime, step_time
from benchmarks.scaling_rows import Numbers, row
from benchmarks.traffic import Traffic
from mmrep.losses import (
    ClusterSwapLoss,
    ConFuLoss,
    GRAMLoss,
    Loss,
    ModalityPairwiseLoss,
    PairwiseCLIPLoss,
    SymileLoss,
    TriangleLoss,
)
from mmrep.ops import paths
from tests.gloo_pool import GlooPool

ROOT = Path(__file__).parents[2]
NAMES, WIDTH, PROTOTYPES = ["image", "text", "audio"], 16, 7
MADE: dict[str, Callable[[], Loss]] = {
    "pairwise": PairwiseCLIPLoss,
    "siglip": lambda: PairwiseCLIPLoss(form="sigmoid"),
    "symile-shuffled": lambda: SymileLoss(init_logit_scale=1.0),
    "symile-all": lambda: SymileLoss(negatives="all", init_logit_scale=1.0),
    "swav": lambda: ClusterSwapLoss(modalities=NAMES, embed_dim=WIDTH, num_prototypes=PROTOTYPES),
    "modality-pairwise": ModalityPairwiseLoss,
    "gram": GRAMLoss,
    "triangle": TriangleLoss,
    "confu": lambda: ConFuLoss(modalities=NAMES, embed_dim=WIDTH),
}


def sent_by_all(rank: int, rows: int) -> dict[str, float]:
    """Bytes that this rank sends in a step of each loss."""
    found = {}
    for name, make in MADE.items():
        torch.manual_seed(0)
        loss, views = make(), scaling_rows.VIEWS.get(name, 1)
        shape = (rows, views, WIDTH) if views > 1 else (rows, WIDTH)
        torch.manual_seed(rank)
        embeddings = {n: F.normalize(torch.randn(shape), dim=-1).requires_grad_() for n in NAMES}
        traffic = Traffic()
        with traffic.counted():
            loss(embeddings, {n: torch.ones(rows, dtype=torch.bool) for n in NAMES}).loss.backward()
        found[name] = traffic.sent
    return found


@pytest.mark.parametrize("rows", [6, 10])
def test_every_loss_sends_what_the_model_says_to_the_byte(pool2: GlooPool, pool4: GlooPool, rows: int) -> None:
    assert MADE.keys() == LOSSES.keys()
    for pool in (pool2, pool4):
        counted = pool.run(sent_by_all, [(rank, rows) for rank in range(pool.world)])
        for name, model in LOSSES.items():
            views = scaling_rows.VIEWS.get(name, 1)
            cost = model(Shape(pool.world, pool.world * rows, WIDTH, 3, views, PROTOTYPES))
            assert [found[name] for found in counted] == [pytest.approx(cost.sent, rel=1e-9)] * pool.world, name


def test_memory_is_that_of_the_measured_peaks() -> None:
    """Of one process on a CPU, whose tiles are smaller; within a fifth."""
    measured = {
        row["case"]: row["ours"]
        for row in json.loads((ROOT / "benchmarks/results/losses.json").read_text())["rows"]
        if row["metric"] == "peak MiB"
    }
    cpu = {"tile": 1024, "strip": 2**21}
    cases = {
        "CLIP N=16384 D=512": ("pairwise", Shape(1, 16384, 512, 2, **cpu), paths.CACHE_BYTES),
        "Symile all, M=3 N=256 D=512, tiled": ("symile-all", Shape(1, 256, 512, 3, **cpu), -1),
        "Symile all, M=3 N=512 D=256": ("symile-all", Shape(1, 512, 256, 3, **cpu), paths.CACHE_BYTES),
        "Symile shuffled, M=3 N=4096 D=512": ("symile-shuffled", Shape(1, 4096, 512, 3, **cpu), paths.CACHE_BYTES),
    }
    assert cases.keys() == measured.keys()
    for case, (loss, shape, budget) in cases.items():
        with patch.object(paths, "CACHE_BYTES", budget):
            assert LOSSES[loss](shape).memory / 2**20 == pytest.approx(measured[case], rel=0.2), case


def test_products_are_counted_by_hand() -> None:
    """Golden rows: N = 8,192 on 8 GPUs, D = 512."""
    unit = 2 * 1024 * 8192 * 512
    shape = Shape(8, 8192, 512, 3)
    assert LOSSES["pairwise"](replace(shape, modalities=2)).flops == 3 * unit  # 32 MiB of logits are kept
    assert LOSSES["pairwise"](shape).flops == 3 * 3 * unit
    assert LOSSES["pairwise"](replace(shape, gpus=1, modalities=2)).flops == 3 * 8 * unit
    assert LOSSES["pairwise"](replace(shape, gpus=1, batch=16384, modalities=2)).flops == 4 * 32 * unit  # these are not
    assert LOSSES["siglip"](shape).flops == 3 * 3 * unit
    assert LOSSES["symile-shuffled"](shape).flops == 3 * 3 * unit
    assert LOSSES["symile-all"](shape).flops == 4 * unit * 8192
    assert LOSSES["modality-pairwise"](replace(shape, modalities=2, views=2)).flops == 3 * 4 * unit
    assert LOSSES["triangle"](shape).flops == 3 * 2 * 4 * unit


def test_a_golden_step() -> None:
    """1,000 samples/s and GPU, 64 GPUs of 8 nodes, 10 and 5 GB/s, 1e8 parameters, 2 % of waiting."""
    cluster = Cluster(1000.0, 2.0, 10.0, 5.0, 8, 1e8, 0.02)
    time = step_time(Shape(64, 6400), cluster, LossCost(4e10, 1e8, 2e8, 1e8, 0.0))
    parts = (0.1, 0.02, 0.04, 2 * 63 / 64 * 4e8 / 1e10)
    assert (time.encoders, time.loss, time.loss_traffic, time.gradients) == pytest.approx(parts)
    assert time.waiting == pytest.approx(0.02 * 3 * sum(parts)) and time.total == pytest.approx(1.06 * sum(parts))
    assert time.loss_share == pytest.approx(0.06 / sum(parts))
    assert cluster.bandwidth(8) == 10e9 and cluster.bandwidth(16) == 10e9
    assert replace(cluster, inter=1.0).bandwidth(16) == 8e9


def test_a_golden_row_of_clip() -> None:
    """ViT-B/32 at N = 32,768 on 8 H100."""
    found = row("pairwise", 8, 32768, Numbers(), 2)
    rate = 989.4e12 * 0.206 / (3 * 14.78e9)
    assert found.time.encoders == pytest.approx(4096 / rate)
    assert found.cost.gathered == found.cost.returned == pytest.approx(7 / 8 * 32768 * 512 * 4)
    assert found.time.gradients == pytest.approx(2 * 7 / 8 * 151.28e6 * 4 / 450e9) and found.time.waiting == 0
    assert found.time.loss == pytest.approx(4 * 2 * 4096 * 32768 * 512 / 40e12)
    assert found.reader_rate == pytest.approx(found.samples_per_second * 25_000)


@pytest.mark.parametrize(("loss", "modalities"), scaling_rows.CASES)
def test_more_is_more(loss: str, modalities: int | None) -> None:
    numbers = Numbers()
    by_gpus = [row(loss, gpus, 32768, numbers, modalities) for gpus in scaling_rows.GPUS]
    for fewer, more in itertools.pairwise(by_gpus):
        assert more.time.encoders == pytest.approx(fewer.time.encoders / 2)
        assert more.cost.sent >= fewer.cost.sent and more.cost.flops < fewer.cost.flops
        assert more.time.gradients >= fewer.time.gradients
        assert more.time.total < fewer.time.total, "up to here more GPUs are faster"
    by_batch = [row(loss, 64, batch, numbers, modalities) for batch in scaling_rows.BATCHES]
    for smaller, larger in itertools.pairwise(by_batch):
        assert larger.cost.flops > smaller.cost.flops and larger.cost.sent >= smaller.cost.sent
        assert larger.time.total > smaller.time.total
    assert by_gpus[0].cost.sent == 0 and by_gpus[0].time.gradients == 0


def test_the_published_scaling_is_reproduced_within_five_points_of_efficiency() -> None:
    errors = [(ours - published) / nodes for _, nodes, published, ours in scaling_rows.calibration()]
    assert len(errors) == 8 and max(map(abs, errors)) < 0.051
    assert scaling_rows.calibration()[3][2] == pytest.approx(15.44, abs=0.01)
    assert scaling_rows.calibration()[7][2] == pytest.approx(14.79, abs=0.01)


def test_the_waiting_is_what_fits_best() -> None:
    def error(waiting: float) -> float:
        return math.fsum(
            ((ours - samples / found.samples[0]) / 2**power) ** 2
            for found in scaling_rows.NEMO
            for power, (ours, samples) in enumerate(
                zip(scaling_rows.speedups(found, waiting), found.samples, strict=True)
            )
        )

    assert min(range(400), key=lambda step: error(step * 1e-4)) * 1e-4 == pytest.approx(scaling_rows.WAITING)


def test_limits_are_the_first_sizes_above() -> None:
    assert scaling_tables.first_above([(1, 0.05), (2, 0.2), (4, 0.6)], 0.1) == "2"
    assert scaling_tables.first_above([(1024, 0.05)], 0.1) == "never"


def test_the_page_has_what_the_script_prints() -> None:
    page = (ROOT / "benchmarks/scaling.md").read_text()
    assert scaling_tables.page_tables() in page, "python -m benchmarks.scaling --markdown"


def test_the_committed_result_is_of_these_formulas() -> None:
    result = json.loads((ROOT / scaling_tables.RESULT).read_text())
    assert len(result["rows"]) == len(scaling_rows.CASES) * len(scaling_rows.GPUS) * len(scaling_rows.BATCHES)
    for found in result["rows"][:: len(scaling_rows.GPUS) + 2]:
        again = row(found["loss"], found["gpus"], found["batch"], Numbers(), found["modalities"])
        for name in StepTime.__dataclass_fields__:
            assert found[f"{name}_s"] == pytest.approx(getattr(again.time, name))
        assert found["loss_gathered"] == pytest.approx(again.cost.gathered)
        assert found["loss_memory"] == pytest.approx(again.cost.memory)
    assert (ROOT / scaling_tables.PLOT).stat().st_size > 20_000


def test_the_page_draws_the_conclusions_of_its_tables() -> None:
    numbers, page = Numbers(), " ".join((ROOT / "benchmarks/scaling.md").read_text().split())
    quadratic = [case for case in scaling_rows.CASES if case[0] not in ("symile-all", "swav")]
    at_32k = [row(loss, 64, 32768, numbers, m).time.loss_share for loss, m in quadratic]
    assert max(at_32k) < 0.06 and at_32k[0] == pytest.approx(0.014, abs=5e-4)
    on_256 = [row(loss, 256, 32768, numbers, m).time for loss, m in quadratic]
    shares = [time.loss_traffic / (time.loss_traffic + time.gradients) for time in on_256]
    assert min(shares) == pytest.approx(0.10, abs=5e-3) and max(shares) == pytest.approx(0.18, abs=5e-3)
    left = {n: row("pairwise", 1024, n, numbers).time for n in (32768, 131072)}
    assert left[131072].encoders / left[131072].total == pytest.approx(0.76, abs=5e-3)
    assert left[32768].encoders / left[32768].total == pytest.approx(0.60, abs=0.02)
    assert row("symile-all", 1, 32768, numbers).time.total == pytest.approx(3600, rel=0.01)
    assert [round(row("swav", w, 32768, numbers).cost.sent / 1e6, 1) for w in (256, 1024)] == [0.3, 0.3]
    assert row("pairwise", 1024, 32768, numbers).cost.sent / 1e6 == pytest.approx(135, abs=0.5)
    assert row("pairwise", 8, 131072, numbers).cost.memory / 2**30 == pytest.approx(1.7, abs=0.05)
    alone = row("swav", 8, 131072, numbers)
    assert alone.reader_cores == pytest.approx(42, abs=0.5) and alone.reader_rate == pytest.approx(0.9e9, rel=0.05)
    figures = (
        "pairwise CLIP 1.4 %",
        "131,072 leave 76 %",
        "That is 0.3 MB with 3,000 prototypes",
        "sends 135 MB of 32,768",
        "1.7 GiB",
        "42 of its cores",
        "each takes at most 6 % of a ViT-B/32 step on 64 GPUs",
        "10 to 18 % of that time",
        "60 % of the step is left to the encoders",
        "an hour a step at 32,768",
        "0.9 GB/s",
    )
    assert all(said in page for said in figures)


def test_it_prints_a_table_of_the_users_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    options = "--loss symile-all --gpus 2,4 --batches 64 --samples-per-second-per-gpu 320 --modalities 4 --embed-dim 96"
    options += " --bandwidth-gbps 80,8 --gpus-per-node 2 --parameters 1e6 --bytes-per-sample 1000 --loss-tflops 1"
    assert scaling.main(options.split()) == 0
    printed = capsys.readouterr().out
    assert "symile-all, M = 4, D = 96" in printed
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if line.startswith("│ ")]
    assert [line[:3] for line in lines] == [["64", "2", "100"], ["64", "4", "50"]]
    assert len({len(line) for line in printed.splitlines()[2:-1]}) == 1, "aligned"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--gpus 3 --batches 1024", "--batches 1024 is no multiple of --gpus 3: every GPU has equally many samples"),
        ("--gpus 1,x", "argument --gpus: 'x' is no positive number"),
        ("--gpus 1.5", "argument --gpus: '1.5' is no whole number"),
        ("--batches 0", "argument --batches: '0' is no positive number"),
        ("--mfu 1.2", "argument --mfu: '1.2' is a share, at most 1"),
        ("--gpu-tflops -1", "argument --gpu-tflops: '-1' is no positive number"),
        ("--gpu-tflops nan", "argument --gpu-tflops: 'nan' is no positive number"),
        ("--bandwidth-gbps 400", "argument --bandwidth-gbps: '400': two numbers are wanted"),
        ("--modalities 1", "--modalities 1: at least two are contrasted"),
        ("--modalities 4 --loss triangle", "--modalities 4: triangle wants three"),
        ("--modalities 2 --loss confu", "--modalities 2: confu wants at least three"),
        ("--loss clip", "argument --loss: invalid choice: 'clip'"),
        ("--embed-width 5", "unrecognized arguments: --embed-width 5"),
    ],
)
def test_wrong_values_are_one_line(options: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        scaling.main(options.split())
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and message in said and said.count("\n") == 1


def test_losses_that_do_not_fit_are_left_out_where_none_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert scaling.main(["--modalities", "2", "--gpus", "8", "--batches", "1024"]) == 0
    printed = capsys.readouterr().out
    assert "gram, M = 2" in printed and "triangle" not in printed and "confu" not in printed


def test_the_model_knows_the_kernels_of_a_gpu() -> None:
    """Tiles are bounded by the batch, and kept logits by the kernels' own budget."""
    small, large = (scaling_model.pairwise(Shape(1, n)).memory for n in (1024, 65536))
    assert small < 64 * 2**20 and math.isclose(large, 4 * 512 * 5 * 65536 + 2 * 4 * 8192**2)
