"""What `mmrep predict` writes, whatever the modalities are called."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mmrep.cli.predictions import PredictionWriter
from mmrep.errors import ConfigError


def write(folder: Path, names: list[str]) -> Any:
    """As Lightning calls it: two batches, of two samples and of one."""
    writer, trainer, module = PredictionWriter(folder), SimpleNamespace(global_rank=0), SimpleNamespace()
    module.model, module.predict_step = SimpleNamespace(modalities=tuple(names)), lambda batch, batch_idx: None
    writer.setup(trainer, module, "predict")  # type: ignore[arg-type]  # what it looks at of them
    batches = [
        {
            "keys": [f"k{number}" for number in numbers],
            "embeddings": {name: torch.tensor(numbers)[:, None] + torch.arange(3.0) for name in names},
            "present": {name: torch.tensor(numbers) > 0 for name in names},
        }
        for numbers in ([0, 1], [2])
    ]
    writer.write_on_epoch_end(trainer, module, batches, [])  # type: ignore[arg-type]  # as above
    return np.load(folder / "embeddings-rank0.npz", allow_pickle=False)


def test_modalities_may_have_the_names_of_numpys_parameters(tmp_path: Path) -> None:
    found = write(tmp_path, ["file", "allow_pickle", "args"])
    assert sorted(found.files) == sorted(
        ["keys", *(name + end for name in ("file", "allow_pickle", "args") for end in ("", "_present"))]
    )
    assert found["keys"].tolist() == ["k0", "k1", "k2"] and found["file_present"].tolist() == [False, True, True]
    assert found["file"].dtype == np.float32 and found["allow_pickle"].tolist() == [[0, 1, 2], [1, 2, 3], [2, 3, 4]]


@pytest.mark.parametrize("names", [["text", "keys"], ["text", "text_present"]])
def test_a_modality_whose_array_would_take_another_place(names: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"array '{names[1]}' of their own"):
        write(tmp_path / "out", names)
    assert not (tmp_path / "out").exists()
