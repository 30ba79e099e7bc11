"""``make xor``: can an objective learn what no two modalities tell? The XOR sweep of the Symile paper, with its rivals.

a and b are 5 random bits each; with probability p, c is a XOR b, and otherwise a copy of a. Predict b from a and c, among all
32. No pair tells anything of b, whatever p: a score that adds pairs is at chance, 1/32. The best possible accuracy is
``p + (1 - p)/32``. Each modality has one linear layer (Saporta et al. 2024, section 5.1; one seed, 30 epochs in place of 100).

Writes ``xor.json`` and ``xor.png``.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.machine import machine, versions
from mmrep.losses import ConFuLoss, GRAMLoss, Loss, PairwiseCLIPLoss, SymileLoss, TriangleLoss
from mmrep.progress import track

BITS, WIDTH = 5, 16
CODES = 2**BITS
NAMES = ("a", "b", "c")
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "1000000000", "MALLOC_TRIM_THRESHOLD_": "4000000000"}
"""Freed memory stays with the process: matrices of 1,000 x 1,000 would be mapped anew at each step, a third of the time."""
TRAIN, VAL, TEST, DRAWS, BATCH = 10_000, 1_000, 5_000, 10, 1_000
WEIGHT_DECAY, EPOCHS = 0.01, 30
SWEEP = tuple(round(0.1 * step, 1) for step in range(11))


@dataclass(frozen=True)
class Objective:
    """An objective, and its learning rate: the published .1, but for ConFu, whose perceptron diverges with it."""

    make: Callable[[], Loss]
    lr: float = 0.1


OBJECTIVES = {
    "Symile": Objective(lambda: SymileLoss(init_logit_scale=-0.3, modalities=NAMES)),
    "ConFu": Objective(lambda: ConFuLoss(modalities=NAMES, embed_dim=WIDTH), lr=0.01),
    "GRAM": Objective(lambda: GRAMLoss(modalities=NAMES)),
    "TRIANGLE": Objective(lambda: TriangleLoss(modalities=NAMES)),
    "pairwise CLIP": Objective(lambda: PairwiseCLIPLoss(reduction="sum", modalities=NAMES)),
}


def bayes(p: float) -> float:
    """The best accuracy that any predictor can have."""
    return p + (1 - p) / float(CODES)


def draw(n: int, p: float, generator: torch.Generator) -> dict[str, Tensor]:
    """Samples ``{name: [n, BITS]}`` of zeros and ones."""
    a, b = (torch.randint(0, 2, (n, BITS), generator=generator) for _ in range(2))
    is_xor = torch.rand(n, 1, generator=generator) < p
    return {"a": a.float(), "b": b.float(), "c": torch.where(is_xor, a ^ b, a).float()}


class Model(nn.Module):
    """A linear encoder per modality, and an objective."""

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict({name: nn.Linear(BITS, WIDTH) for name in NAMES})
        self.loss = loss

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: F.normalize(self.encoders[name](bits), dim=1) for name, bits in batch.items()}


def train(objective: str, p: float, *, epochs: int = EPOCHS, seed: int = 0) -> Model:
    """A model with the weights of the epoch that is best in validation."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    data, held_out = draw(TRAIN, p, generator), draw(VAL, p, generator)
    model = Model(OBJECTIVES[objective].make())
    optimizer = torch.optim.AdamW(model.parameters(), lr=OBJECTIVES[objective].lr, weight_decay=WEIGHT_DECAY)
    best, weights = math.inf, copy.deepcopy(model.state_dict())
    for _ in range(epochs):
        model.train()
        for numbers in torch.randperm(TRAIN, generator=generator).split(BATCH):
            optimizer.zero_grad()
            model.loss(model({name: bits[numbers] for name, bits in data.items()})).loss.backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            found = float(model.loss(model(held_out)).loss)
        if found < best:
            best, weights = found, copy.deepcopy(model.state_dict())
    model.load_state_dict(weights)
    return model.eval()


@torch.no_grad()
def accuracy(model: Model, p: float, *, seed: int = 1) -> tuple[float, float]:
    """Mean over fresh test draws, and its standard error."""
    generator = torch.Generator().manual_seed(seed)
    bits = (torch.arange(CODES)[:, None] >> torch.arange(BITS)) & 1
    candidates = model({"b": bits.float()})["b"]
    found = []
    for _ in range(DRAWS):
        batch = draw(TEST, p, generator)
        rows = model(batch)
        scores = model.loss.score(target="b", candidates=candidates, given={"a": rows["a"], "c": rows["c"]})
        right = (batch["b"].long() << torch.arange(BITS)).sum(dim=1)
        found.append((scores.argmax(dim=1) == right).float().mean())
    values = torch.stack(found)
    return float(values.mean()), float(values.std() / math.sqrt(DRAWS))


def information(p: float) -> dict[str, float]:
    """Nats of the joint distribution of the three codes, by its whole table of 32^3 entries."""
    codes = torch.arange(CODES)
    a, b = torch.meshgrid(codes, codes, indexing="ij")
    joint = torch.zeros(CODES, CODES, CODES, dtype=torch.float64)
    joint.index_put_((a, b, a ^ b), torch.tensor(p / CODES**2, dtype=torch.float64), accumulate=True)
    joint.index_put_((a, b, a), torch.tensor((1 - p) / CODES**2, dtype=torch.float64), accumulate=True)

    def entropy(*kept: int) -> float:
        dropped = [axis for axis in range(3) if axis not in kept]
        table = joint.sum(dim=dropped) if dropped else joint
        return float(torch.special.entr(table).sum())

    whole, singles = entropy(0, 1, 2), [entropy(axis) for axis in range(3)]
    return {
        "I(a;b)": singles[0] + singles[1] - entropy(0, 1),
        "I(b;c)": singles[1] + singles[2] - entropy(1, 2),
        "I(a;c)": singles[0] + singles[2] - entropy(0, 2),
        "I(a;b|c)": entropy(0, 2) + entropy(1, 2) - singles[2] - whole,
        "total correlation": sum(singles) - whole,
    }


@dataclass(frozen=True)
class Case:
    """One training."""

    objective: str
    p: float
    epochs: int


def run_case(case: Case) -> dict[str, Any]:
    """Train and test once; a row of the result."""
    torch.set_num_threads(1)
    mean, error = accuracy(train(case.objective, case.p, epochs=case.epochs), case.p)
    best = bayes(case.p)
    return {"case": case.objective, "p": case.p, "accuracy": mean, "standard_error": error, "bayes": best}


def sweep(cases: list[Case], processes: int) -> Iterator[dict[str, Any]]:
    """The rows, as they are done."""
    os.environ.update(KEEP_MEMORY)  # read by the C library when a process starts
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        yield from pool.imap_unordered(run_case, cases)


def main(argv: list[str] | None = None) -> int:
    """Run the sweep; gives 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.xor", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of xor.json and xor.png")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--processes", type=int, default=multiprocessing.cpu_count())
    options = parser.parse_args(argv)
    cases = [Case(objective, p, options.epochs) for p in SWEEP for objective in OBJECTIVES]
    rows = run(cases, options.processes)
    result = {
        "machine": machine(),
        "versions": versions("torch", "mmrep"),
        "epochs": options.epochs,
        "rows": rows,
        "information": [{"p": p, **information(p)} for p in SWEEP],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "xor.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(result, options.out / "xor.png")
    print_table(rows)
    print(f"{options.out / 'xor.json'} and {options.out / 'xor.png'}")
    return 0


def run(cases: list[Case], processes: int) -> list[dict[str, Any]]:
    """All rows in the order of the cases; reports how far it is."""
    done = track(sweep(cases, processes), len(cases), "trainings")
    order = list(OBJECTIVES)
    return sorted(done, key=lambda row: (order.index(row["case"]), row["p"]))


def print_table(rows: list[dict[str, Any]]) -> None:
    """Accuracies, an objective a line."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="XOR sweep: accuracy of b from a and c, %; chance 3.1")
    table.add_column("p")
    for p in SWEEP:
        table.add_column(f"{p:g}", justify="right")
    table.add_row("best possible", *(f"{100 * bayes(p):.1f}" for p in SWEEP))
    for objective in OBJECTIVES:
        table.add_row(objective, *(f"{100 * row['accuracy']:.1f}" for row in rows if row["case"] == objective))
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Accuracy over p, and what there is to know."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 4.0), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.35, 1))
    left.plot(SWEEP, [bayes(p) for p in SWEEP], color="black", linestyle="--", label="best possible")
    for objective, marker in zip(OBJECTIVES, "os^vD", strict=True):
        rows = [row for row in result["rows"] if row["case"] == objective]
        left.plot([row["p"] for row in rows], [row["accuracy"] for row in rows], marker=marker, label=objective)
    left.axhline(1 / CODES, color="grey", linewidth=0.8, label="chance")
    left.set(
        xlabel="p: share of samples with c = a XOR b", ylabel="accuracy of b from a and c", title="What is learned"
    )
    left.legend(frameon=False, fontsize=8)
    for name in ("I(a;c)", "I(a;b|c)", "total correlation", "I(b;c)"):
        right.plot(
            SWEEP,
            [row[name] for row in result["information"]],
            label=f"{name}{' = I(a;b)' if name == 'I(b;c)' else ''}",
        )
    right.set(xlabel="p", ylabel="nats", title="What there is to learn")
    right.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    sys.exit(main())
