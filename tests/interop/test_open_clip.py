"""Models of open_clip go in and come out with equal features, transforms, tokens and scale."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import mmrep
from mmrep.encoders import NgramTextEncoder, OpenClipImageEncoder, OpenClipTextEncoder
from mmrep.encoders.open_clip import LOCAL
from mmrep.errors import CheckpointError, ConfigError
from mmrep.interop import export_open_clip
from mmrep.losses import PairwiseCLIPLoss, SymileLoss
from mmrep.model import MultimodalModel
from tests.interop.open_clip_models import NATIVE, PREPROCESS, SIGMOID, TIMM, hf_text, write_open_clip_folder

TEXTS = ["a red thing", "green apples", "", "a thing " * 40]
CONFIGS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "native": lambda _: NATIVE,
    "native, custom text": lambda _: {**NATIVE, "custom_text": True},
    "sigmoid": lambda _: SIGMOID,
    "timm": lambda _: {**TIMM, "custom_text": True},
    "hf text": hf_text,
}


def pictures() -> list[Image.Image]:
    random = np.random.default_rng(0)
    sizes = [(40, 56), (200, 91), (32, 32)]
    made = [Image.fromarray(random.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in sizes]
    return [*made, made[0].convert("L")]


def theirs(folder: Path) -> tuple[Any, Any, Any]:
    """Model, transform and tokenizer as open_clip loads them."""
    import open_clip

    name = f"{LOCAL}{folder}"
    model, _, transform = open_clip.create_model_and_transforms(name)
    return model.eval(), transform, open_clip.get_tokenizer(name)


@torch.no_grad()
def features(loaded: tuple[Any, Any, Any]) -> dict[str, Tensor]:
    model, transform, tokenizer = loaded
    images = torch.stack([transform(picture) for picture in pictures()])
    tokens = tokenizer(TEXTS)
    return {
        "pixels": images,
        "tokens": tokens,
        "image": model.encode_image(images, normalize=True),
        "text": model.encode_text(tokens, normalize=True),
        "scale": model.logit_scale.detach(),
        "bias": torch.zeros(0) if model.logit_bias is None else model.logit_bias.detach(),
    }


@torch.no_grad()
def ours(model: MultimodalModel) -> dict[str, Tensor]:
    """The same of a model of mmrep's; pixels after the conversion that its encoder does on the device."""
    image, text = model.by_modality["image"], model.by_modality["text"]
    assert isinstance(image, OpenClipImageEncoder) and isinstance(model.loss, PairwiseCLIPLoss)
    tokens = torch.stack([text.transform(train=False)(words) for words in TEXTS])
    pixels = torch.stack([image.transform(train=False)(picture) for picture in pictures()])
    rows = model.encode(image=pictures(), text=TEXTS)
    scale, bias = model.loss.pair_scalars("image", "text")
    return {
        "pixels": image.standardize(pixels),
        "tokens": tokens,
        "image": rows["image"],
        "text": rows["text"],
        "scale": scale,
        "bias": torch.zeros(0) if bias is None else bias,
    }


def assert_bit_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("kind", CONFIGS)
def test_round_trip_is_bit_equal(kind: str, tmp_path: Path) -> None:
    folder = write_open_clip_folder(tmp_path / "in", CONFIGS[kind](tmp_path / "hf"))
    before = features(theirs(folder))
    assert len({tuple(row.tolist()) for row in before["image"]}) == 4, "the model tells pictures apart"
    model = mmrep.load(f"open_clip:{LOCAL}{folder}")
    assert_bit_equal(before, ours(model))
    again = mmrep.load(model.save_pretrained(tmp_path / "model"))  # without the folder that it came from
    assert_bit_equal(before, ours(again))
    assert_bit_equal(before, features(theirs(export_open_clip(again, tmp_path / "out"))))
    exported = json.loads((tmp_path / "out" / "open_clip_config.json").read_text())
    assert exported["preprocess_cfg"].items() >= PREPROCESS.items()
    assert exported["model_cfg"].get("quick_gelu", False) == (kind.startswith("native"))


def test_a_round_trip_in_the_plain_layout_of_clip(tmp_path: Path) -> None:
    folder = write_open_clip_folder(tmp_path / "in", NATIVE)
    names = load_file(folder / "open_clip_model.safetensors").keys()
    model = mmrep.load(folder)  # recognised by its files
    out = export_open_clip(model, tmp_path / "out", layout="clip")
    assert load_file(out / "open_clip_model.safetensors").keys() == names and "token_embedding.weight" in names
    assert_bit_equal(features(theirs(folder)), features(theirs(out)))
    assert_bit_equal(features(theirs(folder)), ours(mmrep.load(out)))


def test_a_trained_model_goes_to_open_clip(tmp_path: Path) -> None:
    """Trained towers, a scale per pair, a third modality that open_clip has no room for."""
    folder = write_open_clip_folder(tmp_path / "in", NATIVE)
    image = OpenClipImageEncoder(24, pretrained=f"{LOCAL}{folder}", projection=False)
    text = OpenClipTextEncoder(24, pretrained=f"{LOCAL}{folder}", projection=False)
    loss = PairwiseCLIPLoss(scale_per_pair=True, modalities=["photo", "caption", "tag"])
    model = MultimodalModel({"photo": image, "caption": text, "tag": NgramTextEncoder(24)}, loss)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pixels = torch.stack([image.transform(train=False)(picture) for picture in pictures()])
    tokens = torch.stack([text.transform(train=False)(words) for words in TEXTS])
    tags = torch.stack([model.by_modality["tag"].transform(train=False)(words) for words in TEXTS])
    for _ in range(2):
        optimizer.zero_grad()
        loss(model({"photo": pixels, "caption": tokens, "tag": tags})).loss.backward()
        optimizer.step()
    model.eval()
    untrained = features(theirs(folder))
    out = features(theirs(export_open_clip(model, tmp_path / "out", image="photo", text="caption")))
    rows = model.encode(photo=pictures(), caption=TEXTS)
    assert torch.equal(out["image"], rows["photo"]) and torch.equal(out["text"], rows["caption"])
    assert torch.equal(out["scale"], loss.pair_scalars("photo", "caption")[0])
    assert not torch.allclose(out["image"], untrained["image"], atol=1e-4), "it was trained"


def test_pretrained_towers_train_on_and_come_back_without_their_source(tmp_path: Path) -> None:
    folder = write_open_clip_folder(tmp_path / "in", hf_text(tmp_path / "hf"))
    encoders: dict[str, Any] = {
        "image": OpenClipImageEncoder(6, pretrained=f"{LOCAL}{folder}", crops=None),
        "text": OpenClipTextEncoder(6, pretrained=f"{LOCAL}{folder}"),
    }
    model = MultimodalModel(encoders, PairwiseCLIPLoss()).eval()
    want = model.encode(image=pictures(), text=TEXTS)
    saved = model.save_pretrained(tmp_path / "model")
    for path in (tmp_path / "in", tmp_path / "hf"):
        path.rename(path.with_name(f"{path.name}-gone"))
    again = mmrep.load(saved)
    assert again.config() == model.config() and again.files() == model.files()
    assert_bit_equal(dict(want), dict(again.encode(image=pictures(), text=TEXTS)))
    (saved / "files" / "text" / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no such file of the model's \[.*tokenizer\.json\]"):
        mmrep.load(saved)


def test_a_models_files_cannot_name_others(tmp_path: Path) -> None:
    folder = write_open_clip_folder(tmp_path / "in", hf_text(tmp_path / "hf"))
    saved = mmrep.load(folder).save_pretrained(tmp_path / "model")
    (tmp_path / "secret").write_text("x")
    for name in ("../../../secret", "/etc/hostname", "..", ""):
        config = json.loads((saved / "config.json").read_text())
        config["files"]["text"] = [name]
        (saved / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match="is no text of a model's"):
            mmrep.load(saved)


def test_a_snapshot_of_the_hub_is_links_to_its_blobs_and_to_nothing_else(tmp_path: Path) -> None:
    """As the hub's client lays out its cache."""
    made = mmrep.load(write_open_clip_folder(tmp_path / "in", hf_text(tmp_path / "hf")))
    saved = made.save_pretrained(tmp_path / "model")
    snapshot, blobs = (tmp_path / "models--org--mine" / name for name in ("snapshots/0f", "blobs"))
    blobs.mkdir(parents=True)
    for number, path in enumerate(path for path in saved.rglob("*") if path.is_file()):
        link = snapshot / path.relative_to(saved)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(path.rename(blobs / str(number)), link.parent))
    assert torch.equal(mmrep.load(snapshot).encode(text=TEXTS)["text"], made.encode(text=TEXTS)["text"])
    (tmp_path / "secret").write_text("{}")
    link = snapshot / "files" / "text" / "tokenizer.json"
    link.unlink()
    link.symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="a link to another place"):
        mmrep.load(snapshot)


def test_bare_weights_are_refused_until_their_config_is_stated(tmp_path: Path) -> None:
    folder = write_open_clip_folder(tmp_path / "in", NATIVE)
    weights = folder / "open_clip_model.safetensors"
    torch.save(load_file(weights), tmp_path / "bare.pt")
    for bare in (weights, tmp_path / "bare.pt"):
        with pytest.raises(CheckpointError, match=r"config='open_clip_config\.json'"):
            mmrep.load(bare)
        assert_bit_equal(features(theirs(folder)), ours(mmrep.load(bare, config=folder / "open_clip_config.json")))
    with pytest.raises(CheckpointError, match="no preprocess_cfg"):
        mmrep.load(weights, config={"model_cfg": NATIVE})
    with pytest.raises(CheckpointError, match="does not say its architecture, activation and preprocessing"):
        OpenClipImageEncoder(24, "ViT-B-32", pretrained=str(weights))
    stated = OpenClipImageEncoder(24, NATIVE, pretrained=str(weights), preprocess=PREPROCESS, projection=False)
    assert stated.preprocessing["mean"] == PREPROCESS["mean"]


def test_position_embeddings_are_resized_as_open_clip_does(tmp_path: Path) -> None:
    folder = write_open_clip_folder(tmp_path / "in", NATIVE)
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"]["image_size"] = 48
    config["model_cfg"]["text_cfg"]["context_length"] = 20
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    assert_bit_equal(features(theirs(folder)), ours(mmrep.load(folder)))


def test_a_clip_checkpoint_in_a_sigmoid_model_keeps_the_configured_bias(tmp_path: Path) -> None:
    """open_clip fills it with 0."""
    folder = write_open_clip_folder(tmp_path / "in", SIGMOID)
    weights = load_file(folder / "open_clip_model.safetensors")
    del weights["logit_bias"]
    save_file(weights, folder / "open_clip_model.safetensors")
    assert ours(mmrep.load(folder))["bias"].item() == -10.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_cfg": {**NATIVE["vision_cfg"], "layers": 3}}, "12 missing .*likely another depth"),
        ({"embed_dim": 48}, "of another shape .*likely another width"),
        ({"text_cfg": {**NATIVE["text_cfg"], "width": 64}}, "likely another width"),
        ({"vision_cfg": TIMM["vision_cfg"]}, "missing .*too many"),
    ],
)
def test_a_mismatch_is_one_line_with_its_likely_cause(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = write_open_clip_folder(tmp_path / "in", NATIVE)
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"] |= change
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message) as caught:
        mmrep.load(folder)
    assert len(str(caught.value)) < 700 and "\n" not in str(caught.value)


def test_unknown_names_are_answered_with_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match="did you mean 'ViT-B-32'"):
        mmrep.load("open_clip:ViT-B-32x/openai")
    with pytest.raises(ConfigError, match="did you mean 'laion2b_s34b_b79k'"):
        mmrep.load("open_clip:ViT-B-32/laion2b_s34b_b79")
    with pytest.raises(CheckpointError, match="write open_clip:ARCH/TAG"):
        mmrep.load("open_clip:ViT-B-32")
    with pytest.raises(CheckpointError, match="no such folder"):
        mmrep.load("open_clip:local-dir:nowhere")
    with pytest.raises(CheckpointError, match="no model"):
        mmrep.load("nowhere")


def test_what_open_clip_cannot_hold_is_refused(tmp_path: Path) -> None:
    model = mmrep.load(write_open_clip_folder(tmp_path / "in", NATIVE))
    with pytest.raises(ConfigError, match="did you mean 'image'"):
        export_open_clip(model, tmp_path / "out", image="imag")
    with pytest.raises(ConfigError, match="did you mean 'clip'"):
        export_open_clip(model, tmp_path / "out", layout="clipp")
    headed = MultimodalModel(
        {"image": OpenClipImageEncoder(8, NATIVE), "text": OpenClipTextEncoder(8, NATIVE)}, SymileLoss()
    )
    with pytest.raises(ConfigError, match="projection: false and embed_dim: 24"):
        export_open_clip(headed, tmp_path / "out")
    other = {**NATIVE, "quick_gelu": False}
    mixed = MultimodalModel(
        {
            "image": OpenClipImageEncoder(24, NATIVE, projection=False),
            "text": OpenClipTextEncoder(24, other, projection=False),
        },
        PairwiseCLIPLoss(),
    )
    with pytest.raises(ConfigError, match="one activation for both"):
        export_open_clip(mixed, tmp_path / "out")
    symile = MultimodalModel(dict(model.encoders), SymileLoss(), normalize="layernorm")
    with pytest.raises(ConfigError, match="scales embeddings to length 1"):
        export_open_clip(symile, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_decide_on_the_bias_and_none_is_dropped(tmp_path: Path) -> None:
    folder = write_open_clip_folder(tmp_path / "in", NATIVE)
    weights = load_file(folder / "open_clip_model.safetensors")
    save_file({**weights, "logit_bias": torch.tensor(-7.0)}, folder / "open_clip_model.safetensors")
    loss = mmrep.load(folder).loss
    assert isinstance(loss, PairwiseCLIPLoss) and loss.form == "sigmoid" and float(loss.logit_bias.detach()) == -7.0
    save_file({**weights, "decoder.weight": torch.zeros(2)}, folder / "open_clip_model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 weights are of neither tower \(decoder\.weight"):
        mmrep.load(folder)
