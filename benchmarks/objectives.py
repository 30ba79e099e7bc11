"""``make objectives``: every family of objectives on real data, one seed each, through the command line.

- joint (Emoji-M3): text and speech together tell the picture, neither does alone: pairs can reach 50 %.
- plain (Emoji-M3): each modality alone tells the emoji.
- pictures: SwAV without text or labels, judged by a linear probe beside random weights and raw pixels.

Builds the data that is not there, trains each config, evaluates, prints the tables and writes ``objectives.json``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import machine, versions
from data_prep.emoji_m3.__main__ import main as build_emoji_m3
from data_prep.emoji_pictures import main as build_pictures
from mmrep.cli import main as mmrep

JOINT_DIRECTION = "audio+text->image"
SINGLE = tuple(f"{a}->{b}" for a in ("audio", "image", "text") for b in ("audio", "image", "text") if a != b)


@dataclass(frozen=True)
class Case:
    """One config and what it is called in the tables."""

    task: str
    objective: str
    config: str


CASES = [
    Case("joint", "pairwise CLIP", "emoji_m3/joint_clip"),
    Case("joint", "Symile", "emoji_m3/joint_symile"),
    Case("joint", "GRAM", "emoji_m3/joint_gram"),
    Case("joint", "TRIANGLE", "emoji_m3/joint_triangle"),
    Case("joint", "ConFu", "emoji_m3/joint_confu"),
    Case("plain", "pairwise CLIP", "emoji_m3/plain_clip"),
    Case("plain", "Symile + pairwise", "emoji_m3/plain_symile"),
    Case("plain", "modality-pairwise", "emoji_m3/plain_modality_pairwise"),
    Case("plain", "cross-modal SwAV", "emoji_m3/plain_swav"),
    Case("pictures", "SwAV", "emoji_pictures/swav"),
]
EPOCHS = {
    "joint": 7
}  # the same for all; joint_clip.yaml alone trains for three, which is where it stops getting better
LABELS, PROBE_SPLITS = ("group", "subgroup"), ("test", "test_vendor")


def main(argv: list[str] | None = None) -> int:
    """Run what is asked for; gives the exit code of the first step that failed, or 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.objectives", description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data"), help="where the data sets are, or will be built")
    parser.add_argument("--runs", type=Path, default=Path("runs/objectives"), help="where runs go")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/objectives.json"))
    names = [Path(case.config).name for case in CASES]
    parser.add_argument("--only", action="append", choices=names, help="only this config; may be repeated")
    parser.add_argument("--keep", action="store_true", help="evaluate finished runs again without training them")
    options = parser.parse_args(argv)
    cases = [case for case in CASES if Path(case.config).name in (options.only or names)]
    for case in cases:
        start = time.monotonic()
        code, found = run(case, options)
        if code:
            print(f"objectives: {case.task}, {case.objective} failed", file=sys.stderr)
            return code
        keep(options.out, {**found, "seconds": round(time.monotonic() - start)})
    print_tables(json.loads(options.out.read_text())["rows"])
    print(options.out)
    return 0


def keep(out: Path, row: dict[str, Any]) -> None:
    """Write a row among those of earlier runs, in the order of the cases; each says what it was measured on and with."""
    earlier = json.loads(out.read_text())["rows"] if out.exists() else []
    row = {**row, "machine": machine(), "versions": versions("torch", "pytorch-lightning", "mmrep"), "seed": 0}
    known = {(row["task"], row["objective"]): row for row in [*earlier, row]}
    kept = [known[case.task, case.objective] for case in CASES if (case.task, case.objective) in known]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"rows": kept}, indent=1) + "\n")


def run(case: Case, options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """Build, train and evaluate one case; gives an exit code and its row."""
    data = options.data / ("emoji_pictures" if case.task == "pictures" else f"emoji_m3/{case.task}")
    if case.task == "pictures":
        code = 0 if (data / "index.json").exists() else build_pictures(["--out", str(data)])
    else:
        code = build_emoji_m3(["--out", str(data.parent), "--size", "mini", "--task", case.task])
    name = Path(case.config).name
    folder = options.runs / name
    if not code and not (options.keep and (folder / "model").exists()):
        words = [
            "fit",
            "--config",
            f"configs/{case.config}.yaml",
            "--data.path",
            str(data),
            "--runs",
            str(options.runs),
        ]
        words += ["--trainer.max_epochs", str(EPOCHS[case.task])] if case.task in EPOCHS else []
        code = mmrep([*words, "--name", name, "--overwrite"])
    if code:
        return code, {}
    row = {"task": case.task, "objective": case.objective, "config": f"configs/{case.config}.yaml"}
    found = _probes(folder, data) if case.task == "pictures" else _retrieval(folder, data)
    return found.pop("code", 0), row | found


def _retrieval(folder: Path, data: Path) -> dict[str, Any]:
    out = folder / "retrieval.json"
    words = ["--checkpoint", str(folder), "--data", str(data), "--split", "test_both", "--out", str(out), "--overwrite"]
    code = mmrep(["eval", "retrieval", *words])
    return {"code": code} if code else {"directions": json.loads(out.read_text())["directions"]}


def _probes(folder: Path, data: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for label in LABELS:
        for split in PROBE_SPLITS:
            out = folder / f"probe-{label}-{split}.json"
            words = ["--checkpoint", str(folder), "--data", str(data), "--modality", "image", "--label", label]
            code = mmrep(["eval", "probe", *words, "--split", split, "--out", str(out), "--overwrite"])
            if code:
                return {"code": code}
            found[f"{label}, {split}"] = json.loads(out.read_text())["features"]
    return {"probes": found}


def print_tables(rows: list[dict[str, Any]]) -> None:
    """One table a task."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 140)
    joint = Table(title=f"joint: {JOINT_DIRECTION}, held-out vendor and voices; pairs can reach 50 %")
    for heading in ("objective", "R@1 %", "95 %", "R@5 %", "MRR", "chance %"):
        joint.add_column(heading, justify="left" if heading == "objective" else "right")
    plain = Table(title="plain: R@1 %, held-out vendor and voices")
    for heading in ("objective", *SINGLE, "chance %"):
        plain.add_column(heading, justify="left" if heading == "objective" else "right")
    pictures = Table(title="pictures: accuracy of a linear probe, %, on emoji that training never saw")
    for heading in ("label, split", "SwAV", "random weights", "raw pixels", "chance"):
        pictures.add_column(heading, justify="left" if heading == "label, split" else "right")
    for row in rows:
        if row["task"] == "joint":
            joint.add_row(row["objective"], *_joint_cells(row["directions"][JOINT_DIRECTION]))
        elif row["task"] == "plain":
            recalls = [row["directions"].get(direction) for direction in SINGLE]
            chance = row["directions"][SINGLE[0]]["chance_recall@1"]
            plain.add_row(
                row["objective"], *(f"{100 * r['recall@1']:.1f}" if r else "-" for r in recalls), f"{100 * chance:.1f}"
            )
        else:
            for name, probe in row["probes"].items():
                kinds = ("trained", "random weights", "raw input")
                cells = (f"{100 * probe[kind]['accuracy']:.1f}" for kind in kinds)
                pictures.add_row(name, *cells, f"{100 * probe['trained']['chance']:.1f}")
    for table in (joint, plain, pictures):
        if table.rows:
            console.print(table)


def _joint_cells(figures: Mapping[str, Any]) -> tuple[str, ...]:
    low, high = figures["recall@1_ci95"]
    return (
        f"{100 * figures['recall@1']:.1f}",
        f"{100 * low:.1f}-{100 * high:.1f}",
        f"{100 * figures['recall@5']:.1f}",
        f"{figures['mrr']:.3f}",
        f"{100 * figures['chance_recall@1']:.1f}",
    )


if __name__ == "__main__":
    sys.exit(main())
