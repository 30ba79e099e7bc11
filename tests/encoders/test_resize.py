"""Random crops: Pillow's pixels to a few levels, and parts drawn as torchvision draws them."""

from __future__ import annotations

import pickle
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from mmrep.encoders.resize import RandomResizedCrop, random_part
from mmrep.errors import ConfigError


def photo(height: int, width: int) -> Image.Image:
    rng = np.random.default_rng(height)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((width, height))
    noisy = np.asarray(coarse).astype(float) + rng.normal(scale=20, size=(height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


SIZES = [
    (64, 64),
    (100, 224),
    (224, 90),
    (300, 200),
    (320, 512),
    (512, 300),
    (700, 500),
    (225, 223),
    (7, 300),
    (300, 7),
]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("backend", "most", "mean"), [("torch", 2, 0.02), ("opencv", 16, 2.5)])
def test_the_same_part_with_pillows_pixels(size: tuple[int, int], backend: str, most: int, mean: float) -> None:
    picture = photo(*size)
    crop = RandomResizedCrop(224, (0.9, 1.0), backend)
    for seed in range(4):
        torch.manual_seed(seed)
        ours = crop(picture)
        torch.manual_seed(seed)
        part = random_part(*size, (0.9, 1.0))
        reference = F.resized_crop(picture, *part, [224, 224], interpolation=InterpolationMode.BICUBIC)
        apart = (ours.int() - F.pil_to_tensor(reference).int()).abs()
        assert ours.dtype == torch.uint8 and ours.shape == (3, 224, 224)
        assert int(apart.max()) <= most and float(apart.float().mean()) < mean


@pytest.mark.parametrize("size", [(100, 120), (40, 200), (200, 40)])
@pytest.mark.parametrize("scale", [(0.9, 1.0), (0.1, 0.6)])
def test_parts_are_distributed_as_torchvisions(size: tuple[int, int], scale: tuple[float, float]) -> None:
    theirs = v2.RandomResizedCrop(9, scale=scale)
    picture = torch.zeros(3, *size)
    names = ("top", "left", "height", "width")
    drawn = [theirs.make_params([picture]) for _ in range(3000)]
    expected = np.array([[params[name] for name in names] for params in drawn], dtype=float)
    found = np.array([random_part(*size, scale) for _ in range(3000)], dtype=float)
    assert (found[:, 0] + found[:, 2] <= size[0]).all() and (found[:, 1] + found[:, 3] <= size[1]).all()
    for column in range(4):
        apart = ks_2samp(found[:, column], expected[:, column])
        assert apart.pvalue > 1e-4 or np.array_equal(np.unique(found[:, column]), np.unique(expected[:, column]))


def test_it_travels_to_workers_and_leaves_the_picture_alone() -> None:
    picture = photo(80, 90)
    before = picture.tobytes()
    crop = pickle.loads(pickle.dumps(RandomResizedCrop(32)))
    torch.manual_seed(0)
    crop(picture)
    assert picture.tobytes() == before


def test_wrong_settings_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="did you mean 'opencv'"):
        RandomResizedCrop(32, backend="open_cv")
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ConfigError, match=r"mmrep\[fast\]"):
        RandomResizedCrop(32, backend="opencv")
