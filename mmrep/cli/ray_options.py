"""The options of a job that may run on Ray, alike in all commands."""

from __future__ import annotations

import argparse
import os

from mmrep.ray_engine import LOCAL, RaySettings

ENGINES = ("processes", "ray")


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--engine`` and what Ray's workers need."""
    add = parser.add_argument
    add("--engine", default="processes", help="processes, or ray: workers on a Ray cluster (default: processes)")
    add(
        "--ray-address",
        metavar="ADDRESS",
        help="local, auto, HOST:PORT or ray://HOST:PORT (default: RAY_ADDRESS, or local)",
    )
    add("--concurrency", type=int, metavar="N", help="Ray workers (default: as many as there is room for)")
    add("--num-cpus", type=float, default=1.0, metavar="F", help="of each Ray worker (default: 1)")
    add("--num-gpus", type=float, default=0.0, metavar="F", help="of each Ray worker; fractions share (default: 0)")


def ray_settings(options: argparse.Namespace) -> RaySettings:
    """What they say.

    Raises:
        ConfigError: If Ray is not installed, or a number is impossible.
    """
    address = options.ray_address or os.environ.get("RAY_ADDRESS") or LOCAL
    return RaySettings(address, options.concurrency, options.num_cpus, options.num_gpus)
