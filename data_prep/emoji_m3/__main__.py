"""Builds Emoji-M3: ``python -m data_prep.emoji_m3 --out DIR --size mini``."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from data_prep.emoji_m3.settings import SIZES, TASKS
from mmrep.errors import MmrepError
from mmrep.printing import printable


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns 0, or 2 after an error that the user can mend."""
    arguments = make_parser().parse_args(argv)
    try:
        run(arguments)
    except (MmrepError, OSError) as error:
        print(f"error: {printable(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; run the same command to go on from here", file=sys.stderr)
        return 130
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data_prep.emoji_m3", description="Build the Emoji-M3 dataset.")
    parser.add_argument("--out", type=Path, required=True, help="folder that gets plain/ and joint/")
    parser.add_argument("--size", choices=sorted(SIZES), required=True, help="how many emoji, languages and samples")
    parser.add_argument("--task", choices=[*TASKS, "both"], default="both")
    parser.add_argument(
        "--workers", type=positive, default=os.cpu_count() or 1, help="processes (default: one per CPU)"
    )
    parser.add_argument("--cache", type=Path, help="folder of fetched packages (default: ~/.cache/mmrep/emoji_m3)")
    parser.add_argument("--overwrite", action="store_true", help="replace the shards that --out holds")
    return parser


def positive(text: str) -> int:
    """An int of at least 1, for argparse."""
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def run(arguments: argparse.Namespace) -> None:
    from data_prep.emoji_m3.build import build
    from data_prep.emoji_m3.sources import default_cache

    tasks = TASKS if arguments.task == "both" else (arguments.task,)
    start = time.monotonic()
    built = build(
        SIZES[arguments.size],
        arguments.out,
        tasks=tasks,
        workers=arguments.workers,
        cache=arguments.cache or default_cache(),
        overwrite=arguments.overwrite,
    )
    seconds = time.monotonic() - start
    for task in tasks:
        print(f"{arguments.out / task}: {f'built in {seconds:.0f} s' if task in built else 'already built'}")


if __name__ == "__main__":
    sys.exit(main())
