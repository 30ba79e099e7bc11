"""``make demo``: from package registries to a retrieval table, through the whole platform, on a CPU.

Builds Emoji-M3 mini, trains the joint task with pairwise CLIP and with Symile through the command line, evaluates both on
held-out vendors and voices, and writes ``runs/demo/results.json`` and ``runs/demo/report.png``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_prep.emoji_m3.__main__ import main as build_emoji_m3
from mmrep.cli import main as mmrep
from mmrep.data.index import Index

OBJECTIVES = {"clip": "joint_clip", "symile": "joint_symile"}
DIRECTION = "audio+text->image"
SPLIT = "test_both"


def main(argv: list[str] | None = None) -> int:
    """Run the demo; gives the exit code of the first step that failed, or 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data/emoji_m3"), help="where Emoji-M3 is, or will be built")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="where runs, results and picture go")
    parser.add_argument("--setup-seconds", type=float, default=0.0, help="what the environment took, for the record")
    options = parser.parse_args(argv)
    seconds = {"setup": options.setup_seconds, "data": 0.0, "train": 0.0, "eval": 0.0}
    try:
        results = run(options.data, options.out, seconds)
    except StepError as failure:
        return failure.code
    (options.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print_summary(results)
    print(f"results: {options.out / 'results.json'}   picture: {options.out / 'report.png'}")
    return 0


class StepError(Exception):
    """A step has said what is wrong, and ended with this code."""

    def __init__(self, code: int) -> None:
        self.code = code
        super().__init__(f"exit code {code}")


def run(data: Path, out: Path, seconds: dict[str, float]) -> dict[str, Any]:
    """Build, train, evaluate; gives the contents of results.json."""
    with timed(seconds, "data"):
        step("Emoji-M3 mini", build_emoji_m3(["--out", str(data), "--size", "mini", "--task", "joint"]))
    for name in OBJECTIVES.values():
        words = ["fit", "--config", f"configs/emoji_m3/{name}.yaml", "--data.path", str(data / "joint")]
        with timed(seconds, "train"):
            step(f"train {name}", mmrep([*words, "--runs", str(out), "--name", name, "--overwrite"]))
    joint = {}
    for objective, name in OBJECTIVES.items():
        with timed(seconds, "eval"):
            joint[objective] = evaluate(out / name, data / "joint", out)
    languages = Index.load(data / "joint").provenance["settings"]["joint_languages"]
    return {
        "joint": joint,
        "chance": joint["clip"]["directions"][DIRECTION]["chance_recall@1"],
        "pairwise_ceiling": 1 / len(languages),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
    }


def evaluate(run: Path, data: Path, out: Path) -> dict[str, Any]:
    """Retrieval of one run on held-out vendors and voices. The picture of the last one stays: Symile's."""
    result = out / f"{run.name}.json"
    words = ["eval", "retrieval", "--checkpoint", str(run), "--data", str(data), "--split", SPLIT, "--out", str(result)]
    picture = ["--picture", str(out / "report.png"), "--picture-direction", DIRECTION]
    step(f"evaluate {run.name}", mmrep([*words, "--overwrite", *picture]))
    content: dict[str, Any] = json.loads(result.read_text())
    return content


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add the wall time of the block to ``seconds[name]``."""
    start = time.monotonic()
    yield
    seconds[name] += time.monotonic() - start


def step(title: str, code: int) -> None:
    """Stop the demo where a command has failed."""
    if code:
        print(f"demo: '{title}' failed", file=sys.stderr)
        raise StepError(code)


def print_summary(results: dict[str, Any]) -> None:
    """One table with chance and the pairwise ceiling in it."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Emoji-M3 joint, {DIRECTION}, held-out vendor and voices")
    for heading in ("objective", "R@1 %", "95 %", "R@5 %", "chance %", "pairwise ceiling %"):
        table.add_column(heading, justify="left" if heading == "objective" else "right")
    for objective, result in results["joint"].items():
        figures = result["directions"][DIRECTION]
        low, high = figures["recall@1_ci95"]
        cells = (
            f"{100 * figures['recall@1']:.1f}",
            f"{100 * low:.1f}-{100 * high:.1f}",
            f"{100 * figures['recall@5']:.1f}",
        )
        table.add_row(objective, *cells, f"{100 * results['chance']:.1f}", f"{100 * results['pairwise_ceiling']:.1f}")
    console = Console(width=None if sys.stdout.isatty() else 100)
    console.print(table)
    seconds = "   ".join(f"{name} {value:.0f} s" for name, value in results["seconds"].items())
    console.print(f"{seconds}   total {sum(results['seconds'].values()):.0f} s", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
