"""Networks of transformers: the library's own numbers, settings that rebuild them without their source, safe loading."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mmrep.encoders import Encoder, HFAudioEncoder, HFTextEncoder
from mmrep.encoders.hugging_face import pool
from mmrep.errors import CheckpointError, ConfigError
from mmrep.losses import PairwiseCLIPLoss
from mmrep.model import MultimodalModel
from tests.encoders.sources import (
    AUDIO_NETWORKS,
    TEXT_NETWORKS,
    TEXTS,
    TONE,
    write_audio_source,
    write_text_source,
)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hugging_face")
    for kind in TEXT_NETWORKS:
        write_text_source(folder / kind, kind)
    for kind in AUDIO_NETWORKS:
        write_audio_source(folder / kind, kind)
    return folder


def rebuilt(encoder: Encoder) -> Encoder:
    """From settings and files alone, as a model folder does it."""
    files = {"files": encoder.files} if encoder.files else {}
    again: Encoder = type(encoder)(encoder.embed_dim, **json.loads(json.dumps(encoder.settings)), **files)
    again.load_state_dict(encoder.state_dict())
    assert again.settings == encoder.settings and again.files == encoder.files
    return again.eval()


def every_parameter_once(encoder: Encoder) -> bool:
    layers = [id(parameter) for layer in encoder.layers() for parameter in layer]
    own = {id(p) for name, p in encoder.named_parameters() if not name.startswith("head.")}
    return len(layers) == len(set(layers)) and set(layers) == own


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@pytest.mark.parametrize("kind", TEXT_NETWORKS)
def test_text_equals_the_librarys_own_forward(kind: str, pooling: str, sources: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    encoder = HFTextEncoder(6, str(sources / kind), pooling=pooling, length=8).eval()
    transform = pickle.loads(pickle.dumps(encoder.transform(False)))
    inputs = torch.stack([transform(text) for text in TEXTS])
    tokenizer, network = (cls.from_pretrained(sources / kind) for cls in (AutoTokenizer, AutoModel))
    network = (network.get_encoder() if network.config.is_encoder_decoder else network).eval()
    tokens = tokenizer(TEXTS, padding="max_length", truncation=True, max_length=8, return_tensors="pt")
    assert torch.equal(inputs[:, 0].long(), tokens["input_ids"])
    assert torch.equal(inputs[:, 1].long(), tokens["attention_mask"])
    mask = tokens["attention_mask"]
    with torch.no_grad():
        rows = network(input_ids=tokens["input_ids"], attention_mask=mask).last_hidden_state
        for row, hidden, count in zip(encoder.features(inputs), rows, mask.sum(dim=1), strict=True):
            expected = {"mean": hidden[:count].mean(dim=0), "cls": hidden[0], "last": hidden[count - 1]}[pooling]
            assert torch.allclose(row, expected, atol=1e-5)


@pytest.mark.parametrize("kind", TEXT_NETWORKS)
def test_text_contract(kind: str, sources: Path) -> None:
    encoder = HFTextEncoder(6, str(sources / kind), length=8).eval()
    row, blank = encoder.transform(True)(TEXTS[0]), encoder.empty(2)
    assert blank.shape == (2, *row.shape) and blank.dtype == row.dtype and not blank.any()
    assert bool(encoder(blank).isfinite().all())  # an absent text has no token to attend to
    assert torch.allclose(encoder(row[None]), encoder(torch.stack([row, blank[0]]))[:1], atol=1e-6)
    assert torch.equal(encoder(row[None]), rebuilt(encoder)(row[None]))
    assert every_parameter_once(encoder) and len(encoder.layers()) >= 3
    encoder.train()
    encoder(torch.stack([row, blank[0]])).sum().backward()
    lacking = [name for name, p in encoder.named_parameters() if p.requires_grad and p.grad is None]
    assert not lacking  # DDP waits for each


@pytest.mark.parametrize("kind", AUDIO_NETWORKS)
def test_audio_contract_and_the_librarys_own_forward(kind: str, sources: Path) -> None:
    from transformers import AutoFeatureExtractor, AutoModel

    encoder = HFAudioEncoder(6, str(sources / kind), seconds=2.0).eval()
    row, blank = pickle.loads(pickle.dumps(encoder.transform(False)))(TONE), encoder.empty(2)
    assert blank.shape == (2, *row.shape) and blank.dtype == row.dtype and not blank.any()
    assert bool(encoder(blank).isfinite().all())
    assert torch.equal(encoder(row[None]), rebuilt(encoder)(row[None]))
    assert every_parameter_once(encoder) and len(encoder.layers()) >= 3
    if kind != "whisper":  # whose own model takes 30 seconds, see below
        extractor, network = (
            AutoFeatureExtractor.from_pretrained(sources / kind),
            AutoModel.from_pretrained(sources / kind),
        )
        made = extractor(TONE[0][:32000], sampling_rate=16000, return_tensors="pt")
        with torch.no_grad():
            expected = network.eval()(**made).last_hidden_state.mean(dim=1)
            ours = encoder.features(row[None])
        assert torch.allclose(ours, expected, atol=2e-4)
        assert not torch.allclose(ours, encoder.features(blank[:1]), atol=2e-2)
    encoder.train()
    encoder(torch.stack([row, blank[0]])).sum().backward()
    lacking = [name for name, p in encoder.named_parameters() if p.requires_grad and p.grad is None]
    assert not lacking


def test_whisper_is_cut_to_the_clips_length(sources: Path) -> None:
    """Of 30 seconds it is transformers' own; of 2 it keeps the weights and the first positions."""
    from transformers import AutoFeatureExtractor, AutoModel

    source = str(sources / "whisper")
    whole, short = HFAudioEncoder(6, source, seconds=30).eval(), HFAudioEncoder(6, source, seconds=2).eval()
    row = whole.transform(False)(TONE)
    made = AutoFeatureExtractor.from_pretrained(source)(TONE[0], sampling_rate=16000, return_tensors="pt")
    with torch.no_grad():
        network = AutoModel.from_pretrained(source).get_encoder().eval()
        expected = network(made["input_features"]).last_hidden_state.mean(dim=1)
        assert torch.allclose(whole.features(row[None]), expected, atol=1e-3)
    assert short.transform(False)(TONE).shape == (80, 200) and row.shape == (80, 3000)
    own, cut = whole.state_dict(), short.state_dict()
    positions = "network.embed_positions.weight"
    assert torch.equal(own[positions][:100], cut[positions]) and cut[positions].shape[0] == 100
    assert all(torch.equal(own[k], cut[k]) for k in own if k != positions and not k.startswith("head."))
    with pytest.raises(ConfigError, match="a whole number from 1 to 30"):
        HFAudioEncoder(6, source, seconds=1.5)


def test_pooling_by_hand() -> None:
    rows = torch.tensor([[[1.0], [3.0], [50.0]], [[7.0], [9.0], [11.0]]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    assert pool(rows, mask, "mean").tolist() == [[2.0], [9.0]]
    assert pool(rows, mask, "cls").tolist() == [[1.0], [7.0]]
    assert pool(rows, mask, "last").tolist() == [[3.0], [11.0]]


def test_weights_come_from_the_source_unless_they_are_not_wanted(sources: Path) -> None:
    source = str(sources / "bert")
    stored = load_file(sources / "bert" / "model.safetensors")["encoder.layer.0.output.dense.weight"]
    name = "encoder.layer.0.output.dense.weight"
    loaded, random = (HFTextEncoder(6, source, pretrained=p).network.get_parameter(name) for p in (True, False))
    assert torch.equal(loaded, stored) and not torch.equal(random, stored)


def test_model_folder_needs_no_source(sources: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(sources / "bert", source)
    text, audio = HFTextEncoder(6, str(source), length=8), HFAudioEncoder(6, str(sources / "wav2vec2"), seconds=1.0)
    model = MultimodalModel({"text": text, "audio": audio}, PairwiseCLIPLoss()).eval()
    model.save_pretrained(tmp_path / "model")
    shutil.rmtree(source)
    again = MultimodalModel.from_pretrained(tmp_path / "model")
    one, other = (m.encode(text=TEXTS, audio=[TONE]) for m in (model, again))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert str(tmp_path) not in (tmp_path / "model" / "config.json").read_text()  # no path of this machine travels


class Pickled:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (self.command,)


def test_broken_sources_say_so_in_a_line(sources: Path, tmp_path: Path) -> None:
    def refused(match: str) -> None:
        with pytest.raises(CheckpointError, match=match) as caught:
            HFTextEncoder(6, str(tmp_path / "bad"), length=8)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 600

    shutil.copytree(sources / "bert", tmp_path / "bad")
    weights = tmp_path / "bad" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:5000])
    refused("SafetensorError")
    tensors = load_file(sources / "bert" / "model.safetensors")
    save_file({name: t for name, t in tensors.items() if "layer.1" not in name}, weights, {"format": "pt"})
    refused("16 of 37 weights are missing")
    weights.unlink()
    refused("no file named model.safetensors")
    torch.save({"a": Pickled(f"touch {tmp_path}/ran")}, tmp_path / "bad" / "pytorch_model.bin")
    refused("pickled with objects that could run code")
    assert not (tmp_path / "ran").exists()
    weights.write_bytes(whole)
    config = tmp_path / "bad" / "config.json"
    config.write_text(config.read_text().replace('"hidden_size": 16', '"hidden_size": 32'))
    refused("of another shape")
    config.write_text("{}")
    refused("the config cannot be had")


def test_code_in_a_repository_is_never_run(sources: Path, tmp_path: Path) -> None:
    shutil.copytree(sources / "bert", tmp_path / "code")
    content = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModel": "mine.Model"}}
    (tmp_path / "code" / "config.json").write_text(json.dumps(content))
    (tmp_path / "code" / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(CheckpointError, match="config cannot be had"):
        HFTextEncoder(6, str(tmp_path / "code"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("source", "match"), [("nobody/nothing", "by hand"), ("/nowhere/at/all", "no such folder")])
def test_a_source_that_is_not_there(source: str, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        HFTextEncoder(6, source)
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match=match):
        HFAudioEncoder(6, source)


def test_wrong_use(sources: Path) -> None:
    with pytest.raises(ConfigError, match="give a folder or a hub id"):
        HFTextEncoder(6)
    with pytest.raises(ConfigError, match="give a folder or a hub id"):
        HFAudioEncoder(6)
    with pytest.raises(ConfigError, match="2 to 64 tokens"):
        HFTextEncoder(6, str(sources / "bert"), length=65)
    with pytest.raises(ConfigError, match="did you mean 'mean'"):
        HFTextEncoder(6, str(sources / "bert"), pooling="means")
    config = {"model_type": "clip", "text_config": {"hidden_size": 8}}
    with pytest.raises(ConfigError, match="open_clip"):
        HFTextEncoder(6, config=config, files={"tokenizer.json": ""})


def test_silence_around_a_clip_is_cut_or_added(sources: Path) -> None:
    encoder = HFAudioEncoder(6, str(sources / "wav2vec2"), seconds=1.0)
    transform = encoder.transform(False)
    assert transform(TONE).shape == (16000,) and transform((np.zeros(10, np.float32), 8000)).shape == (16000,)
