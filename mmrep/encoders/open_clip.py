"""Models of open_clip: where they come from, their two towers, and what their inputs must look like."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from mmrep.encoders.hub import fetch_from_hub, fetch_pretrained, without_waiting
from mmrep.errors import CheckpointError, ConfigError, did_you_mean
from mmrep.files import read_json
from mmrep.weights import load_weights, read_weights

CONFIG_FILE = "open_clip_config.json"
WEIGHT_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "model.safetensors")
TORCH_FILES = ("open_clip_pytorch_model.bin", "pytorch_model.bin", "model.pth")
SCALARS = ("logit_scale", "logit_bias")
NO_WEIGHTS = ("input_resolution", "context_length", "vocab_size")
"""Numbers that OpenAI's archives hold beside the weights."""
LOCAL, HUB = "local-dir:", "hf-hub:"
TOKENIZER_OPTIONS = frozenset({"clean", "strip_sep_token", "language"})
"""Of ``tokenizer_kwargs``: open_clip's own. It hands all others to transformers."""
OF_CODE = "auto_map"
"""In a file of transformers': the code that it would run."""
MOST_CHARACTERS = 32
"""Of a text, for each of its tokens: open_clip's own vocabulary has none of more than 24, and a space after it."""


@dataclass(frozen=True)
class OpenClipSource:
    """What is known of a model of open_clip's before its weights are read.

    Attributes:
        model: Its config, as under ``model_cfg`` in `CONFIG_FILE`; the activation (``quick_gelu``) is that of the weights.
        preprocess: How pictures are prepared, as under ``preprocess_cfg``, with every key.
        weights: The file of its weights; None for random ones.
        folder: Where its tokenizer's files may be.
        name: As the user gave it.
    """

    model: dict[str, Any]
    preprocess: dict[str, Any]
    weights: Path | None = None
    folder: Path | None = None
    name: str = ""


def find_source(
    architecture: str | Mapping[str, Any] | None, pretrained: str | None, preprocess: Mapping[str, Any] | None = None
) -> OpenClipSource:
    """Find a model by the names that open_clip uses.

    Args:
        architecture: A name of ``open_clip.list_models()``, or a config as under ``model_cfg``. None for the source's own.
        pretrained: A tag of that architecture, ``local-dir:DIR``, ``hf-hub:ORG/REPO``, or None for random weights. A weights
            file is taken only where ``architecture`` and ``preprocess`` are stated, since it says neither.
        preprocess: What replaces the source's ``preprocess_cfg``, key by key.

    Raises:
        ConfigError: On an unknown architecture or tag.
        CheckpointError: If files are missing, broken, or cannot be fetched.
    """
    for prefix, fetch in ((LOCAL, _local_folder), (HUB, fetch_from_hub)):
        if pretrained is not None and pretrained.startswith(prefix):
            if architecture is not None:
                raise ConfigError(f"{pretrained} says its architecture itself", fix="leave architecture out")
            return _from_folder(fetch(pretrained.removeprefix(prefix)), pretrained, preprocess)
    if pretrained is not None and Path(pretrained).is_file():
        if architecture is None or preprocess is None:
            raise CheckpointError(
                "a weights file does not say its architecture, activation and preprocessing",
                where=pretrained,
                fix=f"give local-dir:DIR with {CONFIG_FILE}, or state them: architecture and preprocess",
            )
        model = _built_in(architecture, None).model if isinstance(architecture, str) else dict(architecture)
        return OpenClipSource(
            _checked(model, pretrained), _preprocess(model, preprocess), Path(pretrained), None, pretrained
        )
    if isinstance(architecture, Mapping):
        if pretrained is not None:
            raise ConfigError(f"no weights file '{pretrained}'", fix="tags belong to architectures with a name")
        model = dict(architecture)
        return OpenClipSource(
            _checked(model, "architecture"), _preprocess(model, preprocess or {}), name="architecture"
        )
    found = _built_in(architecture or "ViT-B-32", pretrained)
    return replace(found, preprocess={**found.preprocess, **(preprocess or {})})


def _local_folder(text: str) -> Path:
    folder = Path(text)
    if not folder.is_dir():
        raise CheckpointError("no such folder", where=text, fix=f"give a folder with {CONFIG_FILE} and weights")
    return folder


def _from_folder(folder: Path, name: str, preprocess: Mapping[str, Any] | None) -> OpenClipSource:
    config = read_config(folder / CONFIG_FILE)
    found = next((folder / n for n in (*WEIGHT_FILES, *TORCH_FILES) if (folder / n).is_file()), None)
    found = found or next(iter(sorted(folder.glob("*.safetensors"))), None)
    if found is None:
        raise CheckpointError("no weights beside the config", where=folder, fix=f"put {WEIGHT_FILES[0]} there")
    model = config["model_cfg"]
    stated = {**config.get("preprocess_cfg", {}), **(preprocess or {})}
    return OpenClipSource(_checked(model, name), _preprocess(model, stated), found, folder, name)


def read_config(path: Path) -> dict[str, Any]:
    """The content of an ``open_clip_config.json``.

    Raises:
        CheckpointError: If it is not there, broken, or no such config.
    """
    if not path.is_file():
        raise CheckpointError(
            f"no {path.name}", where=path.parent, fix="weights alone do not say their architecture and preprocessing"
        )
    config = read_json(path)
    model = config.get("model_cfg") if isinstance(config, dict) else None
    if not isinstance(model, dict) or not {"embed_dim", "vision_cfg", "text_cfg"} <= model.keys():
        raise CheckpointError("it names no model_cfg with embed_dim, vision_cfg and text_cfg", where=path)
    return dict(config)


def _built_in(architecture: str, tag: str | None) -> OpenClipSource:
    import open_clip  # twenty CPU-seconds that only its users should pay

    model = open_clip.get_model_config(architecture.replace("/", "-"))
    if model is None:
        raise ConfigError(
            f"open_clip has no architecture '{architecture}'", fix=did_you_mean(architecture, open_clip.list_models())
        )
    if tag is None:
        return OpenClipSource(_checked(model, architecture), _preprocess(model, {}), name=architecture)
    known = open_clip.get_pretrained_cfg(architecture, tag)
    if not known:
        tags = open_clip.list_pretrained_tags_by_model(architecture)
        raise ConfigError(f"{architecture} has no pretrained '{tag}'", fix=did_you_mean(tag, tags))
    weights = fetch_pretrained(known, f"{architecture}/{tag}")
    model = {**model, "quick_gelu": known.get("quick_gelu", False)}  # of the weights, whatever the architecture's name
    return OpenClipSource(
        _checked(model, architecture), _preprocess(model, known), weights, name=f"{architecture}/{tag}"
    )


def _checked(model: dict[str, Any], name: str) -> dict[str, Any]:
    if "multimodal_cfg" in model:
        raise ConfigError(f"{name} is a captioning model (CoCa), no pair of towers", fix="choose another architecture")
    try:
        options = model.get("text_cfg", {}).get("tokenizer_kwargs") or {}
        image = str(model.get("vision_cfg", {}).get("timm_model_name") or "")
        if unknown := sorted(set(options) - TOKENIZER_OPTIONS):  # of transformers: names code and files
            raise ConfigError(
                f"{name} sets tokenizer_kwargs {unknown}", fix=f"only {sorted(TOKENIZER_OPTIONS)} are taken"
            )
        if ":" in image or "/" in image:  # a network elsewhere
            raise ConfigError(
                f"{name} has timm_model_name='{image}', which timm does not list", fix="give a name of timm's"
            )
    except (AttributeError, TypeError) as error:
        raise ConfigError(f"{name} has a broken config ({error})") from error
    return deepcopy(model)


def _preprocess(model: Mapping[str, Any], stated: Mapping[str, Any]) -> dict[str, Any]:
    """Every key of ``preprocess_cfg``: as stated, else open_clip's defaults; the size is the tower's."""
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    size = model.get("vision_cfg", {}).get("image_size", 224)  # a text tower's config has none
    whole: dict[str, Any] = merge_preprocess_dict(
        merge_preprocess_dict(asdict(PreprocessCfg()), dict(stated)), {"size": size}
    )
    return {key: list(value) if isinstance(value, tuple) else value for key, value in whole.items()}


def half_config(model: Mapping[str, Any], tower: str) -> dict[str, Any]:
    """What one tower, ``vision_cfg`` or ``text_cfg``, needs of a model config."""
    return {key: model[key] for key in ("embed_dim", tower, "quick_gelu") if key in model}


def image_tower(model: Mapping[str, Any]) -> nn.Module:
    """The image tower of a model config, with random weights: pixels to ``[B, embed_dim]``."""
    from open_clip.model import _build_vision_tower  # public constructors build both towers, which may be gigabytes

    vision = {**model["vision_cfg"], "timm_model_pretrained": False}
    tower: nn.Module = _build_vision_tower(model["embed_dim"], vision, model.get("quick_gelu", False))
    return tower


def text_tower(model: Mapping[str, Any], files: Mapping[str, str]) -> nn.Module:
    """The text tower of a model config, with random weights: tokens ``[B, L]`` to ``[B, embed_dim]``.

    Args:
        model: The config.
        files: What `text_files` gave: a tower of Hugging Face's is built from the ``config.json`` in it.
    """
    from open_clip.model import _build_text_tower

    text = dict(model["text_cfg"])
    with folder_of(files) as folder:
        if text.get("hf_model_name"):
            text |= {"hf_model_name": folder, "hf_model_pretrained": False}
        tower: nn.Module = _build_text_tower(model["embed_dim"], text, model.get("quick_gelu", False))
    return tower


def text_files(source: OpenClipSource) -> dict[str, str]:
    """The files of a text tower of Hugging Face's, that is tokenizer and ``config.json``; none for open_clip's own.

    Raises:
        CheckpointError: If they are neither in the source's folder nor to be had from the hub.
    """
    text = source.model["text_cfg"]
    if not text.get("hf_tokenizer_name") and not text.get("hf_model_name"):
        return {}
    try:
        from transformers import AutoConfig, AutoTokenizer
    except ImportError as error:
        raise ConfigError(f"{source.name} needs transformers", fix="pip install 'mmrep[hf]'") from error
    options = {"trust_remote_code": False}
    try:
        with tempfile.TemporaryDirectory() as made, without_waiting():
            if text.get("hf_tokenizer_name"):
                place = source.folder or text["hf_tokenizer_name"]
                AutoTokenizer.from_pretrained(place, **options).save_pretrained(made)
            files = {path.name: _without_code(path) for path in sorted(Path(made).iterdir())}
        if text.get("hf_model_name"):
            with without_waiting():
                config = AutoConfig.from_pretrained(text["hf_model_name"], **options).to_dict()
            # Weights are fp32 here, whatever they are stored as.
            kept = {name: value for name, value in config.items() if name not in (OF_CODE, "dtype", "torch_dtype")}
            files["config.json"] = json.dumps(kept)
    except (OSError, ValueError, KeyError, UnicodeDecodeError) as error:
        raise CheckpointError(
            "the text tower's tokenizer or config cannot be had",
            where=source.name,
            fix="put tokenizer.json into the model's folder, and let hf_model_name be a folder with config.json",
        ) from error
    return files


def load_pretrained(
    tower: nn.Module, source: OpenClipSource, which: str, weights: Mapping[str, Tensor] | None = None
) -> None:
    """Load the source's weights into one of its towers.

    Names, old layouts and the sizes of position embeddings are brought to those of the config, as open_clip does.

    Args:
        tower: As `image_tower` or `text_tower` made it.
        source: Where the weights are.
        which: ``visual`` or ``text``.
        weights: What `pretrained_weights` gave, if they were read already.

    Raises:
        CheckpointError: If the file is broken or unsafe, or does not fit the config.
    """
    from open_clip.model import resize_pos_embed, resize_text_pos_embed

    own = dict(weights or pretrained_weights(source))
    with suppress(AssertionError):  # of another width: reported below, with all that does not fit
        (resize_pos_embed if which == "visual" else resize_text_pos_embed)(own, SimpleNamespace(**{which: tower}))
    own = {name.removeprefix(f"{which}."): t for name, t in own.items() if name.startswith(f"{which}.")}
    own.pop("transformer.embeddings.position_ids", None)  # a buffer of older transformers
    load_weights(tower, own, where=source.weights)


def pretrained_weights(source: OpenClipSource) -> dict[str, Tensor]:
    """The weights of both towers and the logit scale, named as in open_clip's ``CustomTextCLIP``."""
    from open_clip.convert import convert_state_dict, load_big_vision_weights
    from open_clip.model import convert_to_custom_text_state_dict

    assert source.weights is not None, "random weights are not loaded"
    if source.weights.suffix in (".npz", ".npy"):  # big_vision's, whose names depend on both towers
        whole = nn.Module()
        whole.visual, whole.text = image_tower(source.model), text_tower(source.model, {})
        for name, value in initial_scalars(source.model).items():
            whole.register_parameter(name, nn.Parameter(value))
        load_big_vision_weights(whole, str(source.weights))
        return dict(whole.state_dict())
    weights = read_weights(source.weights)
    apple = any(name.startswith("image_encoder.") for name in weights)  # MobileCLIP's names depend on the image tower
    weights = convert_state_dict(SimpleNamespace(visual=image_tower(source.model)) if apple else None, weights)
    if "positional_embedding" in weights:  # the plain layout of CLIP: the text tower has no prefix
        weights = convert_to_custom_text_state_dict(weights)
    weights = {name: tensor for name, tensor in weights.items() if name not in NO_WEIGHTS}
    if foreign := [name for name in weights if not name.startswith(("visual.", "text.")) and name not in SCALARS]:
        raise CheckpointError(
            f"{len(foreign)} weights are of neither tower ({foreign[0]}, ...)",
            where=source.weights,
            fix="likely another kind of model: only pairs of an image and a text tower are taken",
        )
    return weights


def initial_scalars(model: Mapping[str, Any]) -> dict[str, Tensor]:
    """``logit_scale``, and ``logit_bias`` where the config has one, as it starts them."""
    scalars = {"logit_scale": torch.tensor(float(model.get("init_logit_scale", math.log(1 / 0.07))))}
    if model.get("init_logit_bias") is not None:
        scalars["logit_bias"] = torch.tensor(float(model["init_logit_bias"]))
    return scalars


def _without_code(path: Path) -> str:
    content = path.read_text(encoding="utf-8")
    if OF_CODE not in content:
        return content
    return json.dumps({name: value for name, value in json.loads(content).items() if name != OF_CODE}, indent=2)


@contextmanager
def folder_of(files: Mapping[str, str]) -> Iterator[str]:
    """A folder with these files, for as long as a library reads it.

    Raises:
        CheckpointError: If one of them names code, which the library might run.
    """
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            if f'"{OF_CODE}"' in content and _names_code(content):
                raise CheckpointError(f"{name} names code of its own ({OF_CODE})", fix="remove it")
            (Path(folder) / Path(name).name).write_text(content, encoding="utf-8")
        yield folder


def _names_code(content: str) -> bool:
    """Whether JSON has the key at the top, where transformers looks; what is no JSON has none."""
    try:
        return OF_CODE in json.loads(content)
    except (ValueError, TypeError, RecursionError):
        return False


@dataclass(frozen=True)
class OpenClipTokenizer:
    """Text to the token numbers ``[context_length]`` of a text tower.

    Holds text only, so that it travels to workers. open_clip's own tokenizer, whose time grows with the square of a word's
    length, gets the first ``32 * context_length`` characters of a text, runs of whitespace counted as one: what comes after
    them has no place among the tokens. Only a text that cleaning shortens (HTML entities, say) or a word of many hundred
    characters can lose a token by that.

    Args:
        text_config: The JSON of ``text_cfg``.
        files: The tokenizer's own files, names and contents.
    """

    text_config: str
    files: tuple[tuple[str, str], ...] = ()

    def __call__(self, text: str) -> Tensor:
        from open_clip.tokenizer import SimpleTokenizer

        tokenizer = _tokenizer(self)
        if isinstance(tokenizer, SimpleTokenizer) and len(text) > (most := MOST_CHARACTERS * tokenizer.context_length):
            text = " ".join(text.split())[:most]
        tokens: Tensor = tokenizer(text)[0]
        return tokens


@lru_cache(maxsize=8)
def _tokenizer(recipe: OpenClipTokenizer) -> Any:
    """open_clip's tokenizer, made once per process: its vocabulary takes a second to unpack."""
    import open_clip

    text = json.loads(recipe.text_config)
    config = {"model_cfg": {"text_cfg": text}}
    options = {"trust_remote_code": False} if text.get("hf_tokenizer_name") else {}  # open_clip's own takes none
    with folder_of({**dict(recipe.files), CONFIG_FILE: json.dumps(config)}) as folder:
        return open_clip.get_tokenizer(f"{LOCAL}{folder}", **options)
