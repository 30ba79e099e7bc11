"""The environments that torchrun and srun give to the processes they start, without either."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from tests.multi_node.hosts import Host, Process

PORT = 29517
Environment = Callable[[Sequence[Host], int, int], dict[str, str]]


def as_torchrun(
    hosts: Sequence[Host], node: int, local: int, per_node: int = 1, restarts: int = 0, max_restarts: int = 0
) -> dict[str, str]:
    """What ``torchrun --nnodes N --nproc-per-node P --max-restarts M`` sets; as with its store not shared."""
    values = {
        "RANK": node * per_node + local,
        "LOCAL_RANK": local,
        "GROUP_RANK": node,
        "WORLD_SIZE": len(hosts) * per_node,
        "LOCAL_WORLD_SIZE": per_node,
        "GROUP_WORLD_SIZE": len(hosts),
        "MASTER_ADDR": hosts[0].address,
        "MASTER_PORT": PORT,
        "TORCHELASTIC_RUN_ID": "test",
        "TORCHELASTIC_RESTART_COUNT": restarts,
        "TORCHELASTIC_MAX_RESTARTS": max_restarts,
    }
    return {name: str(value) for name, value in values.items()}


def as_srun(hosts: Sequence[Host], node: int, local: int, per_node: int = 1, restarts: int = 0) -> dict[str, str]:
    """What ``srun`` sets in a job of ``--nodes N --ntasks-per-node P``; the nodes' names are their addresses."""
    values = {
        "SLURM_JOB_ID": 4711,
        "SLURM_JOB_NAME": "fit",
        "SLURM_NTASKS": len(hosts) * per_node,
        "SLURM_NTASKS_PER_NODE": per_node,
        "SLURM_NNODES": len(hosts),
        "SLURM_NODELIST": ",".join(host.address for host in hosts),
        "SLURM_PROCID": node * per_node + local,
        "SLURM_LOCALID": local,
        "SLURM_NODEID": node,
        "SLURM_RESTART_COUNT": restarts,
    }
    return {name: str(value) for name, value in values.items()}


def start(
    hosts: Sequence[Host],
    words: Callable[[int], list[str]],
    folder: Path,
    environment: Callable[..., dict[str, str]] = as_torchrun,
    per_node: int = 1,
    restarts: int = 0,
) -> list[Process]:
    """Start ``mmrep`` on every host.

    Args:
        words: From the number of the node to the words after ``mmrep``.
        folder: Where what rank r prints goes, as ``rankR.txt``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    processes = []
    for node, host in enumerate(hosts):
        for local in range(per_node):
            rank = node * per_node + local
            given = environment(hosts, node, local, per_node, restarts)
            processes.append(host.fork(command(words(node), rank), folder / f"rank{rank}.txt", given))
    return processes


def command(words: list[str], rank: int) -> Callable[[], int]:
    """``mmrep`` with these words, as rank ``rank``."""

    def run() -> int:
        from lightning_fabric.utilities import rank_zero as fabric
        from pytorch_lightning.utilities import rank_zero as lightning

        from mmrep.cli import main

        # As in a process of its own, where Lightning reads it from the environment on import.
        fabric.rank_zero_only.rank = lightning.rank_zero_only.rank = rank
        return main(words)

    return run
