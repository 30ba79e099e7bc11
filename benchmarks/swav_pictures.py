"""``make swav``: SwAV on pictures without text or labels, judged by a linear probe beside random weights and raw pixels.

Builds the data if it is not there, trains ``configs/emoji_pictures/swav.yaml`` through the command line, probes, prints the
table and writes ``swav_pictures.json``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.machine import machine, versions
from data_prep.emoji_pictures import main as build_pictures
from mmrep.cli import main as mmrep

CONFIG = "configs/emoji_pictures/swav.yaml"
LABELS, SPLITS = ("group", "subgroup"), ("test", "test_vendor")
FEATURES = {"trained": "SwAV", "random weights": "random weights", "raw input": "raw pixels"}


def main(argv: list[str] | None = None) -> int:
    """Build, train, probe; gives the exit code of the first step that failed, or 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.swav_pictures", description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data/emoji_pictures"), help="where it is, or will be built")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the run goes")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/swav_pictures.json"))
    parser.add_argument("--keep", action="store_true", help="probe a finished run again without training it")
    options = parser.parse_args(argv)
    start, run = time.monotonic(), options.runs / "swav_pictures"
    code = 0 if (options.data / "index.json").exists() else build_pictures(["--out", str(options.data)])
    if not code and not (options.keep and (run / "model").exists()):
        words = ["--config", CONFIG, "--data.path", str(options.data), "--runs", str(options.runs)]
        code = mmrep(["fit", *words, "--name", run.name, "--overwrite"])
    if code:
        return code
    probes: dict[str, Any] = {}
    for label in LABELS:
        for split in SPLITS:
            out = run / f"probe-{label}-{split}.json"
            words = ["--checkpoint", str(run), "--data", str(options.data), "--modality", "image", "--label", label]
            if code := mmrep(["eval", "probe", *words, "--split", split, "--out", str(out), "--overwrite"]):
                return code
            probes[f"{label}, {split}"] = json.loads(out.read_text())["features"]
    result = {
        "machine": machine(),
        "versions": versions("torch", "pytorch-lightning", "mmrep"),
        "config": CONFIG,
        "seed": 0,
        "seconds": round(time.monotonic() - start),
        "probes": probes,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print_table(probes)
    print(options.out)
    return 0


def print_table(probes: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the accuracies, a label and split a line."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="accuracy of a linear probe, %, on emoji that training never saw")
    for heading in ("label, split", *FEATURES.values(), "chance"):
        table.add_column(heading, justify="left" if heading == "label, split" else "right")
    for name, probe in probes.items():
        cells = (f"{100 * probe[kind]['accuracy']:.1f}" for kind in FEATURES)
        table.add_row(name, *cells, f"{100 * probe['trained']['chance']:.1f}")
    Console(width=None if sys.stdout.isatty() else 140).print(table)


if __name__ == "__main__":
    sys.exit(main())
