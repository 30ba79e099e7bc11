"""The model: one embedding space, saved and loaded with its preprocessing and its rule, and never running a file's code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import mmrep
from mmrep.encoders import ConvImageEncoder, Encoder, FeaturesEncoder, MelAudioEncoder, NgramTextEncoder
from mmrep.errors import CheckpointError, ConfigError, DataError, MmrepError
from mmrep.losses import PairwiseCLIPLoss, SymileLoss
from mmrep.model import MultimodalModel
from mmrep.weights import BoundedBuilding
from tests.tiny import png


def small(loss: Any = None, **settings: Any) -> MultimodalModel:
    encoders: dict[str, Encoder] = {
        "image": ConvImageEncoder(8, image_size=16, width=8),
        "text": NgramTextEncoder(8, width=16, buckets=99, length=32),
        "audio": MelAudioEncoder(8, seconds=0.2, width=16),
    }
    return MultimodalModel(encoders, loss or PairwiseCLIPLoss(), **settings)


ITEMS: dict[str, list[Any]] = {
    "image": [Image.new("RGB", (20, 20), "red"), Image.new("L", (9, 9), 30)],
    "text": ["a red thing", "ein dunkles Ding", ""],
    "audio": [(np.sin(np.arange(4000) / 5).astype(np.float32), 16000)],
}


def test_encode_gives_unit_rows_and_leaves_the_mode_alone() -> None:
    model = small().train()
    rows = model.encode(**ITEMS, batch_size=2)
    assert model.training
    for name, values in ITEMS.items():
        assert rows[name].shape == (len(values), 8) and rows[name].dtype == torch.float32
        assert torch.allclose(rows[name].norm(dim=1), torch.ones(len(values)), atol=1e-5)
    assert torch.equal(model.encode(text=[])["text"], torch.zeros(0, 8))
    again = model.encode(**ITEMS, batch_size=1)
    assert all(torch.allclose(rows[name], again[name], atol=1e-6) for name in rows)


def test_layernorm_gives_rows_of_mean_0_and_variance_1() -> None:
    rows = small(normalize="layernorm").encode(text=["a", "b"])["text"]
    assert torch.allclose(rows.mean(1), torch.zeros(2), atol=1e-5)
    assert torch.allclose(rows.var(1, unbiased=False), torch.ones(2), atol=1e-2)


@pytest.mark.parametrize(
    "loss", [PairwiseCLIPLoss(init_temperature=0.2), SymileLoss(negatives="all", init_logit_scale=2.0)]
)
def test_a_saved_model_comes_back_with_preprocessing_and_rule(tmp_path: Path, loss: Any) -> None:
    model = small(loss, normalize="layernorm").eval()
    again = mmrep.load(model.save_pretrained(tmp_path / "m"))
    assert again.config() == model.config() and again.modalities == ("image", "text", "audio")
    one, other = model.encode(**ITEMS), again.encode(**ITEMS)
    assert all(torch.equal(one[name], other[name]) for name in one)
    given = {"text": one["text"][:1], "audio": one["audio"]}
    scores = [each.score(target="image", candidates=one["image"], given=given) for each in (model, again)]
    assert torch.equal(*scores)


def test_files_are_read_and_bad_ones_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png((200, 10, 10)))
    (tmp_path / "b.png").write_bytes(b"no picture")
    model = small()
    assert model.encode(image=[tmp_path / "a.png", str(tmp_path / "a.png")])["image"].shape == (2, 8)
    with pytest.raises(DataError, match=r"b\.png"):
        model.encode(image=[tmp_path / "b.png"])
    with pytest.raises(DataError, match="no such image file"):
        model.encode(image=[tmp_path / "c.png"])
    with pytest.raises(MmrepError, match="did you mean 'text'"):
        model.encode(txt=["a"])


def test_what_is_not_there_is_none_and_says_nothing(tmp_path: Path) -> None:
    model = small()
    there = model.encode(text=["a", "b"], audio=ITEMS["audio"] * 2)
    rows = model.encode(text=["a", None, "b"], audio=[None, *ITEMS["audio"], None], batch_size=1)
    assert rows.present["text"].tolist() == [True, False, True]
    assert rows.present["audio"].tolist() == [False, True, False]
    assert torch.allclose(rows["text"][[0, 2]], there["text"], atol=1e-6) and not rows["text"][1].any()
    candidates = model.encode(image=ITEMS["image"])["image"]
    scores = model.score(target="image", candidates=candidates, given=rows)
    alone = model.score(target="image", candidates=candidates, given={"text": rows["text"]})
    assert torch.allclose(scores[[0, 2]], alone[[0, 2]], atol=1e-5), "the absent sound says nothing"
    assert torch.equal(
        scores, model.score(target="image", candidates=candidates, given=dict(rows), present=rows.present)
    )
    assert model.encode(text=[None])["text"].shape == (1, 8) and model.encode().present == {}


def test_arrays_sounds_and_pictures_are_taken_in_every_usual_form(tmp_path: Path) -> None:
    model = small()
    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    forms = [tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(pixels), pixels, torch.from_numpy(pixels)]
    rows = model.encode(image=forms)["image"]
    assert torch.equal(rows, rows[:1].expand(5, -1))
    grey = model.encode(image=[pixels[..., 0], Image.fromarray(pixels[..., 0])])["image"]
    assert torch.equal(grey[0], grey[1])
    samples, rate = ITEMS["audio"][0]
    stereo = np.stack([samples, samples])
    soundfile.write(tmp_path / "a.wav", samples, rate, subtype="FLOAT")
    sounds = model.encode(
        audio=[(samples, rate), (stereo, rate), (torch.from_numpy(samples), np.int64(rate)), tmp_path / "a.wav"]
    )
    assert torch.equal(sounds["audio"], sounds["audio"][:1].expand(4, -1))
    assert torch.equal(model.encode(text=["a"], device="cpu")["text"], model.encode(text=["a"])["text"])


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ({"text": "a"}, r"'text' is str, and no list; write text=\[...\]"),
        ({"text": [3]}, r"a text is int \[text\[0\]\]"),
        ({"image": [np.zeros((4, 4, 3))]}, r"float64 \[4, 4, 3\] \[image\[0\]\].*uint8"),
        ({"audio": [np.zeros(4)]}, r"\[audio\[0\]\]; give a path or \(samples"),
        ({"audio": [(np.zeros(4, dtype=np.int16), 16000)]}, r"int16.*floats in"),
        ({"audio": [(np.zeros((16000, 2)), 16000)]}, r"16000 channels .*transpose"),
        ({"audio": [(np.zeros(4), 1.5)]}, r"a rate of 1\.5"),
        ({"audio": [(np.zeros(4), 999)]}, r"a rate of 999 .*from 1000 to 768000"),
        ({"image": [Image.new("RGB", (1, 201))]}, r"1 x 201 pixels.* 200 times the other \[image\[0\]\]"),
        ({"image": [np.zeros((2, 403), np.uint8)]}, r"403 x 2 pixels"),
        ({"image": [Image.new("I", (4, 4), 70000)]}, r"mode I.*convert\('L'\)"),
        ({"image": [Image.new("F", (4, 4))]}, r"mode F"),
    ],
)
def test_an_item_of_the_wrong_kind_is_named(items: dict[str, Any], message: str) -> None:
    with pytest.raises(MmrepError, match=message):
        small().encode(**items)


def test_float_items_come_in_the_type_of_the_weights() -> None:
    encoders = {"a": FeaturesEncoder(4, size=3), "b": FeaturesEncoder(4, size=2)}
    model = MultimodalModel(encoders, PairwiseCLIPLoss())
    expected = model.encode(a=[np.arange(3.0, dtype=np.float32)])["a"]
    rows = model.to(torch.bfloat16).encode(a=[np.arange(3.0, dtype=np.float32)])["a"]
    assert rows.dtype == torch.float32 and torch.allclose(rows, expected, atol=0.05)


class Codes(NgramTextEncoder):
    """Keeps a tokenizer's file of its own."""

    def __init__(self, embed_dim: int, files: dict[str, str] | None = None, **settings: Any) -> None:
        super().__init__(embed_dim, **settings)
        self.files = files or {"bpe.codes": "a b 1"}


def test_files_of_an_encoder_are_texts_of_any_ending_but_those_of_code(tmp_path: Path) -> None:
    def saved(name: str) -> Path:
        encoders = {"a": Codes(8, {name: "a b 1"}, width=16, buckets=99), "b": FeaturesEncoder(8, size=2)}
        return MultimodalModel(encoders, PairwiseCLIPLoss()).save_pretrained(tmp_path / name)

    for name in ("bpe.codes", "prophetnet.tokenizer", "vocab.txt", "merges", "chat_template.jinja"):
        assert mmrep.load(saved(name), classes={"Codes": Codes}).files() == {"a": {name: "a b 1"}}
    for name in ("evil.py", "evil.PY", "evil.so"):
        with pytest.raises(CheckpointError, match="is no text of a model's"):
            mmrep.load(saved(name), classes={"Codes": Codes})


def test_building_is_bounded_by_the_weights_and_by_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"x" * 100)
    with BoundedBuilding(tmp_path / "weights"):
        for _ in range(3):
            assert torch.empty(1 << 28, device="meta").device.type == "meta"
        assert torch.zeros(3, 4, layout=torch.sparse_coo).shape == (3, 4)
        assert torch.rand(2, generator=torch.Generator().manual_seed(0)).shape == (2,)
        with pytest.raises(CheckpointError, match="much larger than the weights"):
            torch.nn.Linear(1 << 15, 1 << 14)


def test_a_shared_encoder_is_one_module_and_survives_saving(tmp_path: Path) -> None:
    text = NgramTextEncoder(8, width=16, buckets=99, length=32)
    model = MultimodalModel({"text": text}, PairwiseCLIPLoss(), share={"title": "text"}).eval()
    assert model.by_modality["title"] is text and model.modalities == ("text", "title")
    rows = model({"text": text.transform(False)("x")[None], "title": text.transform(False)("x")[None]})
    assert torch.equal(rows["text"], rows["title"])
    again = mmrep.load(model.save_pretrained(tmp_path))
    assert torch.equal(again.encode(title=["x"])["title"], model.encode(text=["x"])["text"])


def test_views_are_rows_per_sample() -> None:
    model = small()
    views = [torch.zeros(2, 3, 3, 16, 16, dtype=torch.uint8), torch.zeros(2, 1, 3, 8, 8, dtype=torch.uint8)]
    assert model({"image": views})["image"].shape == (2, 4, 8)


def test_impossible_models_are_refused() -> None:
    with pytest.raises(ConfigError, match="common embed_dim"):
        MultimodalModel({"a": FeaturesEncoder(4), "b": FeaturesEncoder(5)}, PairwiseCLIPLoss())
    with pytest.raises(ConfigError, match="did you mean 'layernorm'"):
        MultimodalModel({"a": FeaturesEncoder(4)}, PairwiseCLIPLoss(), normalize="layer_norm")
    with pytest.raises(ConfigError, match="share"):
        MultimodalModel({"a": FeaturesEncoder(4)}, PairwiseCLIPLoss(), share={"b": "c"})
    with pytest.raises(ConfigError, match="plain names"):
        MultimodalModel({"a.b": FeaturesEncoder(4)}, PairwiseCLIPLoss())


def test_missing_and_broken_folders_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="give a run folder"):
        mmrep.load(tmp_path / "nowhere")
    folder = small().save_pretrained(tmp_path / "m")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-40])
    with pytest.raises(CheckpointError, match="broken file"):
        mmrep.load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        mmrep.load(folder)


def test_weights_of_another_config_are_a_short_diff(tmp_path: Path) -> None:
    folder = small().save_pretrained(tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    weights["encoders.text.head.weight"] = torch.zeros(8, 99)
    del weights["loss.logit_scale"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(
        CheckpointError,
        match=r"text: 1 of another shape .*head.weight \[8, 99\] instead of \[8, 16\]\); loss: 1 missing",
    ):
        mmrep.load(folder)


@pytest.mark.parametrize("name", ["os.system", "subprocess.Popen", "Encoder", "Loss", "PairwiseCLIPLoss"])
def test_a_config_cannot_name_code_to_run(tmp_path: Path, name: str) -> None:
    folder = small().save_pretrained(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    config["encoders"]["text"] = {"class": name, "settings": {}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"class '{name}'"):
        mmrep.load(folder)


class MyEncoder(FeaturesEncoder):
    """An encoder of the user's own."""


def test_own_classes_are_given_by_hand(tmp_path: Path) -> None:
    folder = MultimodalModel({"x": MyEncoder(4)}, PairwiseCLIPLoss()).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="classes="):
        mmrep.load(folder)
    assert isinstance(mmrep.load(folder, classes={"MyEncoder": MyEncoder}).encoders["x"], MyEncoder)


class Evil:
    """Unpickling this would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_checkpoint_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "x": Evil(tmp_path / "ran")}, tmp_path / "evil.ckpt")
    (tmp_path / "cut.ckpt").write_bytes((tmp_path / "evil.ckpt").read_bytes()[:300])
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    for name in ("evil", "cut"):
        with pytest.raises(CheckpointError, match="not a safe, whole checkpoint"):
            mmrep.load(tmp_path / f"{name}.ckpt")
    with pytest.raises(CheckpointError, match="not a checkpoint of mmrep"):
        mmrep.load(tmp_path / "foreign.ckpt")
    assert not (tmp_path / "ran").exists()


def test_a_picture_is_the_same_by_path_and_opened(tmp_path: Path) -> None:
    """Turned as the camera was held, and on white where it is transparent."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 40, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "held.jpg", exif=exif)
    Image.fromarray(np.dstack([pixels, pixels[..., :1]]), "RGBA").save(tmp_path / "clear.png")
    model = small()
    for name in ("held.jpg", "clear.png"):
        by_path, opened = model.encode(image=[tmp_path / name, Image.open(tmp_path / name)])["image"]
        assert torch.equal(by_path, opened), name


def test_a_config_is_a_copy_and_names_no_other_source(tmp_path: Path) -> None:
    model = small()
    model.config()["encoders"]["image"]["settings"]["image_size"] = 99
    assert model.config()["encoders"]["image"]["settings"]["image_size"] == 16
    folder = model.save_pretrained(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["encoders"]["image"]["settings"]["pretrained"] = "/somewhere/else"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="names another source of weights: pretrained"):
        mmrep.load(folder)
