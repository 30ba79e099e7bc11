"""Twenty epochs with persistent workers leave memory and open files where they were."""

from __future__ import annotations

import os
from pathlib import Path

from mmrep.data.dataset import ShardDataset, make_loader
from mmrep.data.index import Index
from mmrep.data.plan import Plan
from mmrep.data.reader import Samples
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


def open_files(processes: list[int]) -> int:
    return sum(len(list(Path(f"/proc/{process}/fd").iterdir())) for process in processes)


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
        processes = [os.getpid(), *workers]
        memory.append(resident(processes))
        files.append(open_files(processes))
    assert len(set(orders)) == 20 and len({len(order) for order in orders}) == 1
    print([round(bytes_ / 1e6) for bytes_ in memory], files)
    early, late = max(memory[4:8]), min(memory[16:])
    assert late < early * 1.05 + 4e6, memory
    assert max(files[16:]) <= max(files[4:8]) + 8  # a leak of one a pass would be ten
