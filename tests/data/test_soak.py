"""Twenty epochs with persistent workers leave memory and open files where they were."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import pytest

from mmrep.data.dataset import ShardDataset, make_loader
from mmrep.data.index import Index
from mmrep.data.plan import Plan
from mmrep.data.reader import Samples
from mmrep.data.shard_files import MOST_OPEN
from tests.modules.test_modules import ENCODERS
from tests.tiny import write_tiny_shards

PAGE = os.sysconf("SC_PAGE_SIZE")


def resident(processes: list[int]) -> int:
    """Bytes of private memory of some processes."""
    total = 0
    for process in processes:
        _, size, shared, *_ = Path(f"/proc/{process}/statm").read_text().split()
        total += (int(size) - int(shared)) * PAGE
    return total


def open_files(process: int, folder: Path) -> tuple[int, int]:
    """How many shards of a folder a process has open, and how many other files. Not counted: tensors that are on their way."""
    shards, others = 0, 0
    for descriptor in Path(f"/proc/{process}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed while we look
            name = str(descriptor.readlink())
            is_shard = name.startswith(str(folder)) and name.endswith(".tar")
            shards += is_shard
            others += not is_shard and "/dev/shm/" not in name
    return shards, others


@pytest.mark.slow
def test_memory_and_files_stay_flat_over_twenty_epochs(tmp_path: Path) -> None:
    shards = write_tiny_shards(tmp_path, {"train": (40,) * 80, "val": (4,), "test": (4,)})  # more than are kept open
    encoders = {name: make(8) for name, make in ENCODERS.items()}
    samples = Samples(Index.load(shards), "train")
    plan = Plan([samples.contents(list(encoders))], 64, 0, True, window=16)
    dataset = ShardDataset(samples, encoders, plan=plan, train=True)
    epoch = [0]
    loader = make_loader(dataset, encoders, num_workers=2, position=lambda: (epoch[0], 0))
    memory, files, orders = [], [], []
    for number in range(20):
        epoch[0] = number
        orders.append(tuple(key for batch in loader for key in batch.keys))
        workers = [worker.pid for worker in loader._iterator._workers]  # type: ignore[union-attr]  # persistent
        memory.append(resident([os.getpid(), *workers]))
        files.append([open_files(process, tmp_path) for process in (os.getpid(), *workers)])
    assert len(set(orders)) == 20 and len({len(order) for order in orders}) == 1
    early, late = max(memory[4:8]), min(memory[16:])
    assert late < early * 1.05 + 4e6, memory
    for at, (_, *in_workers) in enumerate(files[1:]):
        assert [shards for shards, _ in in_workers] == [MOST_OPEN, MOST_OPEN], at  # all that may be, and no more
    for before, after in zip(files[4], files[19], strict=True):
        assert after[1] <= before[1] + 2, files
