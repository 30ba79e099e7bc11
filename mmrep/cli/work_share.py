"""Which share of a job over shards is this process's: asked for, or said by SLURM or torchrun."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mmrep.errors import ConfigError

GIVE = "give --shard-index and --num-shards"


@dataclass(frozen=True)
class WorkShare:
    """A share.

    Attributes:
        index, count: Which, from 0, out of how many.
        said_by: The variables that said so; empty where nothing did.
    """

    index: int
    count: int
    said_by: str = ""

    def __str__(self) -> str:
        return f"share {self.index} of {self.count} ({self.said_by or 'one process'})"


def work_share(index: int | None, count: int | None, environment: Mapping[str, str]) -> WorkShare:
    """As asked for; else of a SLURM array, times that of torchrun, or of srun where torchrun is not there.

    ``RANK`` and ``WORLD_SIZE`` (torchrun) go before ``SLURM_PROCID`` and ``SLURM_STEP_NUM_TASKS`` (srun): where srun starts
    torchrun, the former count all processes. SLURM_NTASKS is not asked: a batch script has it too, around one process.

    Raises:
        ConfigError: If only one of index and count is given, or a variable holds no such number.
    """
    if (index is None) != (count is None):
        raise ConfigError("--shard-index and --num-shards belong together", fix="give both, or none")
    if index is not None and count is not None:
        if not 0 <= index < count:
            raise ConfigError(f"share {index} of {count}", fix="--shard-index counts from 0 to --num-shards - 1")
        return WorkShare(index, count, "--shard-index")
    task, rank = _array(environment), _of("RANK", "WORLD_SIZE", environment)
    if not rank.said_by:
        rank = _of("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", environment)
    said_by = ", ".join(part for part in (task.said_by, rank.said_by) if part)
    return WorkShare(task.index * rank.count + rank.index, task.count * rank.count, said_by)


def local_rank(environment: Mapping[str, str]) -> int:
    """Which of the processes on this machine this is, from 0: of torchrun, or of srun.

    Raises:
        ConfigError: If it is no number.
    """
    name = "LOCAL_RANK" if "LOCAL_RANK" in environment else "SLURM_LOCALID"
    return _number(name, environment) if name in environment else 0


def _array(environment: Mapping[str, str]) -> WorkShare:
    place, total = "SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"
    if place not in environment or total not in environment:
        return WorkShare(0, 1)
    first, step = (
        _number(name, environment) if name in environment else default
        for name, default in (("SLURM_ARRAY_TASK_MIN", 0), ("SLURM_ARRAY_TASK_STEP", 1))
    )
    index, gap = divmod(_number(place, environment) - first, max(step, 1))
    return _checked(place, WorkShare(-1 if gap else index, _number(total, environment), place), environment)


def _of(place: str, total: str, environment: Mapping[str, str]) -> WorkShare:
    if place not in environment or total not in environment:
        return WorkShare(0, 1)
    share = WorkShare(_number(place, environment), _number(total, environment), place)
    return _checked(place, share, environment)


def _checked(place: str, share: WorkShare, environment: Mapping[str, str]) -> WorkShare:
    if not 0 <= share.index < share.count:
        raise ConfigError(f"{place}={environment[place]} is no place among {share.count}", fix=GIVE)
    return share


def _number(name: str, environment: Mapping[str, str]) -> int:
    try:
        return int(environment[name])
    except ValueError as error:
        raise ConfigError(f"{name}={environment[name]}", fix=GIVE) from error
