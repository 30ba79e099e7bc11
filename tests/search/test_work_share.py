"""Whose share of the shards is whose, under torchrun, srun, a SLURM array, and all of them."""

from __future__ import annotations

import pytest
import torch

from mmrep.cli.embed import _own_device
from mmrep.cli.work_share import local_rank, work_share
from mmrep.errors import ConfigError

ARRAY = {"SLURM_ARRAY_TASK_ID": "12", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "10"}
TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2"}
SRUN = {"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "3"}


@pytest.mark.parametrize(
    ("given", "environment", "expected"),
    [
        ((None, None), {}, (0, 1, "")),
        ((2, 5), TORCHRUN, (2, 5, "--shard-index")),
        ((None, None), TORCHRUN, (1, 2, "RANK")),
        ((None, None), SRUN, (2, 3, "SLURM_PROCID")),
        ((None, None), SRUN | TORCHRUN, (1, 2, "RANK")),
        ((None, None), ARRAY, (2, 4, "SLURM_ARRAY_TASK_ID")),
        ((None, None), ARRAY | {"SLURM_ARRAY_TASK_STEP": "2"}, (1, 4, "SLURM_ARRAY_TASK_ID")),
        ((None, None), ARRAY | TORCHRUN, (5, 8, "SLURM_ARRAY_TASK_ID, RANK")),
        ((None, None), ARRAY | SRUN, (8, 12, "SLURM_ARRAY_TASK_ID, SLURM_PROCID")),
        ((None, None), {"RANK": "1"}, (0, 1, "")),
        ((None, None), {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, (0, 1, "")),  # in a batch script, beside srun
    ],
)
def test_the_share_of_the_work(
    given: tuple[int | None, int | None], environment: dict[str, str], expected: tuple[int, int, str]
) -> None:
    share = work_share(*given, environment)
    assert (share.index, share.count, share.said_by) == expected


def test_every_process_of_an_array_of_torchruns_has_its_own() -> None:
    shares = [
        work_share(None, None, ARRAY | {"SLURM_ARRAY_TASK_ID": str(10 + task), "RANK": str(rank), "WORLD_SIZE": "3"})
        for task in range(4)
        for rank in range(3)
    ]
    assert [share.index for share in shares] == list(range(12)) and {share.count for share in shares} == {12}


@pytest.mark.parametrize(
    ("given", "environment", "message"),
    [
        ((1, None), {}, "belong together"),
        ((3, 3), {}, "counts from 0"),
        ((None, None), {"RANK": "x", "WORLD_SIZE": "2"}, "RANK=x; give --shard-index"),
        ((None, None), {"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 is no place among 2"),
        ((None, None), {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "2"}, "7 is no place among 2"),
        ((None, None), ARRAY | {"SLURM_ARRAY_TASK_STEP": "4"}, "is no place among 4; give --shard-index"),
    ],
)
def test_impossible_shares(given: tuple[int | None, int | None], environment: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        work_share(*given, environment)


def test_ranks_of_a_machine_take_its_gpus_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    assert local_rank({}) == 0 and local_rank({"SLURM_LOCALID": "3"}) == 3
    assert local_rank({"SLURM_LOCALID": "3", "LOCAL_RANK": "1"}) == 1
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for rank, device in (("0", "cuda:0"), ("1", "cuda:1"), ("2", "cuda:0")):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert _own_device(None) == _own_device("cuda") == device
        assert _own_device("cpu") == "cpu" and _own_device("cuda:1") == "cuda:1"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert _own_device(None) is None
