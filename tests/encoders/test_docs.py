"""The YAML of docs/encoders.md is accepted by the command line and builds; its table names every encoder and setting."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import timm
import yaml
from safetensors.torch import save_file

import mmrep.encoders
from mmrep.encoders import Encoder
from tests.encoders.sources import write_audio_source, write_text_source
from tests.test_configs import ParseOnly

PAGE = (Path(__file__).parents[2] / "docs" / "encoders.md").read_text()
BLOCKS = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the page calls towers/, small and random."""
    folder = tmp_path_factory.mktemp("docs")
    write_text_source(folder / "towers" / "all-MiniLM-L6-v2")
    write_audio_source(folder / "towers" / "wav2vec2-base", "wav2vec2")
    weights = timm.create_model("resnet18").state_dict()
    save_file({name: tensor.clone() for name, tensor in weights.items()}, folder / "towers" / "resnet18.safetensors")
    return folder


def build(content: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> mmrep.MultimodalModel:
    monkeypatch.chdir(folder)
    (folder / "config.yaml").write_text(content)
    model: mmrep.MultimodalModel = ParseOnly(["fit", "--config", "config.yaml", "--data.path", "none"]).model.model
    return model


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_yaml_of_the_page_builds(block: str, towers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = yaml.safe_load(block)["model"]["init_args"]
    model = build(block, towers, monkeypatch)
    assert set(model.modalities) == set(arguments["encoders"])
    for name, encoder in model.by_modality.items():
        assert type(encoder).__name__ == arguments["encoders"][name]["class_path"].rsplit(".", 1)[-1]
    frozen = {name for name, p in model.encoders.named_parameters() if not p.requires_grad}
    if "freeze" in arguments:
        assert frozen == {name for name, _ in model.encoders.named_parameters() if name.startswith("image.backbone")}
    elif "lora" not in block:
        assert not frozen


def test_the_pages_options_are_all_shown() -> None:
    together = "".join(BLOCKS)
    assert len(BLOCKS) >= 5 and all(word in together for word in ("freeze:", "layer_decay:", "lora:", "layers: 0"))


@pytest.mark.parametrize("name", [n for n in mmrep.encoders.__all__ if n != "Encoder"])
def test_head_settings_reach_every_encoder_from_yaml(name: str, towers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = {"HFTextEncoder": "model: towers/all-MiniLM-L6-v2, ", "HFAudioEncoder": "model: towers/wav2vec2-base, "}
    own |= {
        "OpenClipImageEncoder": "architecture: ViT-S-32-alt, ",
        "OpenClipTextEncoder": "architecture: ViT-S-32-alt, ",
    }
    arguments = f"{{{own.get(name, '')}head_width: 24, batch_norm: true}}"
    content = f"""
model:
  class_path: mmrep.modules.PairwiseCLIP
  init_args:
    embed_dim: 16
    encoders:
      one: {{class_path: mmrep.encoders.{name}, init_args: {arguments}}}
      other: {{class_path: mmrep.encoders.FeaturesEncoder}}
"""
    encoder = build(content, towers, monkeypatch).by_modality["one"]
    assert encoder.settings["head_width"] == 24 and encoder.settings["batch_norm"] is True and encoder.views == 1


@pytest.mark.parametrize("name", [n for n in mmrep.encoders.__all__ if n != "Encoder"])
def test_the_table_names_every_encoder_and_its_settings(name: str) -> None:
    (row,) = [line for line in PAGE.splitlines() if line.startswith(f"| `{name}`")]
    encoder: type[Encoder] = getattr(mmrep.encoders, name)
    assert row.split("|")[2].strip() == encoder.kind
    if name.startswith(("OpenClip", "MelTower")):
        return  # the row refers to others
    stored = {"config", "files", "pad", "extractor", "preprocessing"}  # what a model folder gives back
    settings = set(inspect.signature(encoder).parameters) - {"embed_dim", "head", "model", "pretrained"} - stored
    assert not {setting for setting in settings if f"`{setting}`" not in row}
