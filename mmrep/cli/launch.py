"""Who started this process, and as which of how many: read from the environment, before torch is imported."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmrep.errors import ConfigError


@dataclass(frozen=True)
class Launch:
    """This process among those that a launcher started, on one node or several.

    Attributes:
        by: ``torchrun`` or ``srun``.
        rank: Its number over all nodes.
        nodes: How many there are.
        per_node: Processes on each of them.
        repeated: Whether the launcher has started this command before, or will do so when it fails.
    """

    by: str
    rank: int
    nodes: int
    per_node: int
    repeated: bool

    @property
    def world(self) -> int:
        """All processes."""
        return self.nodes * self.per_node

    def meeting_place(self) -> tuple[str, int]:
        """Address and port at which the processes make their group."""
        if self.by == "srun":
            from lightning_fabric.plugins.environments.slurm import SLURMEnvironment

            slurm = SLURMEnvironment(auto_requeue=False)
            return slurm.main_address, slurm.main_port
        return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])

    def trainer_options(self, asked: Any, folder: Path) -> dict[str, Any]:
        """What Lightning must be told of the launch, so that the user need not say it twice.

        Args:
            asked: The config's ``trainer``; ``devices`` is ``auto`` and ``num_nodes`` is 1 where the user left them out, and
                devices of -1 are all, too.
            folder: Of the run.

        Raises:
            ConfigError: If the user asks for another number of processes than were started.
        """
        left_open = asked.devices in ("auto", "-1", -1)
        devices = self.per_node if left_open else _count(asked.devices)
        for name, count, started in (("devices", devices, self.per_node), ("num_nodes", asked.num_nodes, self.nodes)):
            if count != started and (name, count) != ("num_nodes", 1):
                raise ConfigError(
                    f"trainer.{name}={getattr(asked, name)}, but {self.by} started {self.nodes} nodes with "
                    f"{self.per_node} processes each",
                    fix=f"leave it out, or give --trainer.{name} {started}",
                )
        options: dict[str, Any] = {"num_nodes": self.nodes}
        if left_open:
            options["devices"] = self.per_node
        if self.by == "srun":
            options |= _no_requeue_by_lightning(asked, folder)
        return options


def _count(devices: Any) -> int:
    """How many devices are meant: by a number, a list, or either of them as text."""
    if isinstance(devices, str):
        return len(devices.strip(", ").split(",")) if "," in devices else int(devices)
    return devices if isinstance(devices, int) else len(devices)


def _no_requeue_by_lightning(asked: Any, folder: Path) -> dict[str, Any]:
    """Under SLURM Lightning writes checkpoints of its own at SIGUSR1, asks SLURM to start the job again, and takes whatever
    such checkpoint lies in the working folder at the next start, of whichever run it is. ``--resume auto`` is the open way."""
    from lightning_fabric.plugins.environments.slurm import SLURMEnvironment

    options: dict[str, Any] = {} if asked.plugins else {"plugins": [SLURMEnvironment(auto_requeue=False)]}
    return options if asked.default_root_dir else {**options, "default_root_dir": str(folder)}


def launched() -> Launch | None:
    """The launch of this process; None where nobody but the user, or Lightning itself, started it.

    Raises:
        ConfigError: If the nodes have unequal numbers of processes, or SLURM was not told how many, which Lightning cannot
            train on; or if torchrun's restarts can hang.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:  # first, since torchrun may itself be started by srun
        repeated = _number("TORCHELASTIC_MAX_RESTARTS", 0) > 0
        if repeated and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # pytorch issue 135712: the store outlives a restart, and with it what the processes of before wrote into it.
            raise ConfigError(
                "torchrun --max-restarts keeps the addresses of processes that are gone, and the new ones may wait for those",
                fix="export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on every node, with --rdzv-backend c10d",
            )
        return _launch("torchrun", "RANK", "WORLD_SIZE", "GROUP_WORLD_SIZE", repeated)
    if "SLURM_NTASKS" in os.environ and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        if _number("SLURM_NTASKS", 1) > 1 and "SLURM_NTASKS_PER_NODE" not in os.environ:
            raise ConfigError(
                "the job names --ntasks alone", where="sbatch", fix="give --ntasks-per-node, one for each GPU"
            )
        return _launch("srun", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_NNODES", _number("SLURM_RESTART_COUNT", 0) > 0)
    return None


def is_first() -> bool:
    """Whether this is the process that writes what a run has once. The other ranks find what it prepared."""
    launch = launched()
    if launch is not None:
        return launch.rank == 0
    return not _number("LOCAL_RANK", 0) and not _number("NODE_RANK", _number("GROUP_RANK", 0))


def _launch(by: str, rank: str, world: str, nodes: str, repeated: bool) -> Launch:
    per_node, rest = divmod(_number(world, 1), _number(nodes, 1))
    local = _number("LOCAL_WORLD_SIZE", per_node) if by == "torchrun" else per_node
    if rest or local != per_node:
        raise ConfigError(
            f"{by} started {_number(world, 1)} processes on {_number(nodes, 1)} nodes, unequally many",
            fix="start as many on each: --nproc-per-node of torchrun, --ntasks-per-node of sbatch",
        )
    return Launch(by, _number(rank, 0), _number(nodes, 1), per_node, repeated)


def _number(name: str, default: int) -> int:
    return int(os.environ.get(name) or default)
