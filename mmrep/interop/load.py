"""`mmrep.load`: from a path or a name to a model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mmrep.encoders.hub import fetch_from_hub
from mmrep.encoders.open_clip import CONFIG_FILE, HUB, LOCAL, find_source, read_config
from mmrep.errors import CheckpointError
from mmrep.files import read_json
from mmrep.interop.open_clip import from_open_clip
from mmrep.model import MultimodalModel, build_bounded
from mmrep.weights import load_weights, read_torch_file

CONFIG_KEY = "mmrep_model"
"""Where a Lightning checkpoint of mmrep keeps the model's config."""
FILES_KEY = "mmrep_files"
"""Where it keeps the files of the encoders."""
WEIGHTS_PREFIX = "model."
OPEN_CLIP = "open_clip:"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def load(
    source: str | Path,
    *,
    classes: Mapping[str, type] | None = None,
    config: str | Path | Mapping[str, Any] | None = None,
) -> MultimodalModel:
    """Load a trained model, ready to encode. Nothing in it is run: weights come from safetensors or are read as weights only.

    Args:
        source: One of

            - a run folder (its ``model/``), a model folder, or a Lightning ``.ckpt`` that mmrep wrote;
            - ``open_clip:ARCH/TAG``, a pretrained model that open_clip lists, from its cache or the network;
            - ``open_clip:local-dir:DIR`` or ``open_clip:hf-hub:ORG/REPO``, a folder with ``open_clip_config.json`` and weights;
            - ``ORG/REPO`` at the Hugging Face hub, with a model folder of mmrep's or of open_clip's;
            - a bare weights file of an open_clip model, with ``config``.
        classes: Encoders and losses of your own that the model uses, by name.
        config: Of a bare weights file, the content or the path of its ``open_clip_config.json``: architecture, activation and
            preprocessing, which the weights do not tell.

    Raises:
        CheckpointError: If there is no such model, or it is broken, or unsafe.
        ConfigError: On an unknown architecture or tag of open_clip's.
    """
    text = str(source)
    if text.startswith(OPEN_CLIP):
        return _load_open_clip(text.removeprefix(OPEN_CLIP))
    path = Path(source)
    if path.is_file():
        return _load_file(path, classes, config)
    if path.is_dir():
        return _load_folder(path, classes)
    if HUB_ID.fullmatch(text) and not path.parent.is_dir():
        return _load_folder(fetch_from_hub(text), classes)
    raise CheckpointError(
        "no model", where=source, fix="give a run folder, a model folder, a .ckpt file, ORG/REPO, or open_clip:ARCH/TAG"
    )


def _load_open_clip(name: str) -> MultimodalModel:
    if name.startswith((LOCAL, HUB)):
        return from_open_clip(find_source(None, name))
    architecture, slash, tag = name.partition("/")
    if not slash or not tag:
        raise CheckpointError(
            "weights are not named",
            where=f"{OPEN_CLIP}{name}",
            fix="write open_clip:ARCH/TAG or open_clip:local-dir:DIR",
        )
    return from_open_clip(find_source(architecture, tag))


def _load_folder(path: Path, classes: Mapping[str, type] | None) -> MultimodalModel:
    for folder in (path / "model", path):
        if (folder / "config.json").is_file() and _is_ours(folder / "config.json"):
            return MultimodalModel.from_pretrained(folder, classes)
    if (path / CONFIG_FILE).is_file():
        return from_open_clip(find_source(None, f"{LOCAL}{path}"))
    if (path / "config.json").is_file():
        return MultimodalModel.from_pretrained(path, classes)  # says what is wrong with it
    if (path / "config.yaml").is_file():
        raise CheckpointError(
            "the run has no model yet", where=path, fix="give one of its checkpoints/*.ckpt, or let it finish"
        )
    raise CheckpointError("no model", where=path, fix="give a run folder, a model folder, or a .ckpt file")


def _is_ours(path: Path) -> bool:
    """Whether a config.json is of a model folder, and not of Hugging Face's transformers, say."""
    try:
        content = read_json(path)
    except CheckpointError:
        return True  # broken: reported as such
    return isinstance(content, dict) and ("format" in content or "encoders" in content)


def _load_file(
    path: Path, classes: Mapping[str, type] | None, config: str | Path | Mapping[str, Any] | None
) -> MultimodalModel:
    if config is not None:
        return from_open_clip(_stated(path, config))
    if path.suffix in (".safetensors", ".npz", ".npy"):
        raise CheckpointError(
            "bare weights do not say their architecture, activation and preprocessing",
            where=path,
            fix=f"give their folder, or state them: mmrep.load(FILE, config='{CONFIG_FILE}')",
        )
    return _load_lightning(path, classes)


def _stated(path: Path, config: str | Path | Mapping[str, Any]) -> Any:
    content = dict(config) if isinstance(config, Mapping) else read_config(Path(config))
    if "model_cfg" not in content or "preprocess_cfg" not in content:
        raise CheckpointError(
            "the config states no model_cfg or no preprocess_cfg",
            where=path,
            fix="state both: see open_clip_config.json",
        )
    return find_source(content["model_cfg"], str(path), content["preprocess_cfg"])


def read_checkpoint(path: Path | str, *, mapped: bool = False) -> dict[str, Any]:
    """Read a Lightning checkpoint without running anything in it; ``mapped`` is `read_torch_file`'s.

    Raises:
        CheckpointError: If it is damaged, holds more than tensors and plain data, or is not mmrep's.
    """
    checkpoint = read_torch_file(path, mapped=mapped)
    if not isinstance(checkpoint, dict) or CONFIG_KEY not in checkpoint or "state_dict" not in checkpoint:
        bare = isinstance(checkpoint, dict) and "state_dict" not in checkpoint and len(checkpoint) > 0
        fix = f"bare weights need their config: mmrep.load(FILE, config='{CONFIG_FILE}')" if bare else None
        raise CheckpointError("not a checkpoint of mmrep", where=path, fix=fix or "give a file that `mmrep fit` wrote")
    return checkpoint


def _load_lightning(path: Path, classes: Mapping[str, type] | None) -> MultimodalModel:
    checkpoint = read_checkpoint(path)
    if not isinstance(checkpoint["state_dict"], dict) or not _are_texts(checkpoint.get(FILES_KEY) or {}):
        raise CheckpointError("not a checkpoint of mmrep", where=path, fix="give a file that `mmrep fit` wrote")
    model = build_bounded(checkpoint[CONFIG_KEY], path, classes, checkpoint.get(FILES_KEY))
    weights = {
        name.removeprefix(WEIGHTS_PREFIX): tensor
        for name, tensor in checkpoint["state_dict"].items()
        if name.startswith(WEIGHTS_PREFIX) and isinstance(tensor, Tensor)
    }
    load_weights(model, weights, where=path)
    return model.eval()


def _are_texts(files: Any) -> bool:
    """Whether it is what `MultimodalModel.files` gives."""
    return isinstance(files, dict) and all(
        isinstance(kept, dict) and all(isinstance(part, str) for pair in kept.items() for part in pair)
        for kept in files.values()
    )
