"""Models of open_clip as models of mmrep, and back, with nothing lost: weights, activation, preprocessing, tokenizer, scale."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmrep.encoders import OpenClipImageEncoder, OpenClipTextEncoder
from mmrep.encoders.open_clip import (
    CONFIG_FILE,
    SCALARS,
    WEIGHT_FILES,
    OpenClipSource,
    half_config,
    initial_scalars,
    load_pretrained,
    pretrained_weights,
    text_files,
)
from mmrep.errors import ConfigError, did_you_mean
from mmrep.files import replacing
from mmrep.losses import PairwiseCLIPLoss
from mmrep.model import MultimodalModel
from mmrep.weights import BoundedBuilding, save_weights

LAYOUTS = ("custom-text", "clip")
MOST_CLIP_SCALE = 100.0


def from_open_clip(source: OpenClipSource) -> MultimodalModel:
    """A model with the modalities ``image`` and ``text``, whose embeddings are the towers' outputs.

    Its loss is `PairwiseCLIPLoss` with the learned scale; in the sigmoid form, with its bias, where the config has one.

    Raises:
        CheckpointError: If the weights are broken, unsafe, or belong to another config.
    """
    config, files = source.model, text_files(source)
    width = config["embed_dim"]
    with nullcontext() if source.weights is None else BoundedBuilding(source.weights):
        image = OpenClipImageEncoder(
            width, half_config(config, "vision_cfg"), preprocess=source.preprocess, projection=False
        )
        text = OpenClipTextEncoder(width, half_config(config, "text_cfg"), files=files, projection=False)
    weights = pretrained_weights(source)
    load_pretrained(image.tower, source, "visual", weights)
    load_pretrained(text.tower, source, "text", weights)
    return MultimodalModel({"image": image, "text": text}, _loss(source, weights)).eval()


def _loss(source: OpenClipSource, weights: Mapping[str, Tensor]) -> PairwiseCLIPLoss:
    scalars = initial_scalars(source.model)
    for name in SCALARS:  # a scalar in some releases, one number in others; a CLIP checkpoint has no bias
        if name in weights:
            scalars[name] = weights[name].float().reshape(())
    sigmoid = "logit_bias" in scalars
    bound = MOST_CLIP_SCALE if float(scalars["logit_scale"]) <= math.log(MOST_CLIP_SCALE) + 1e-4 else None
    loss = PairwiseCLIPLoss(
        form="sigmoid" if sigmoid else "softmax", max_logit_scale=bound, modalities=["image", "text"]
    )
    with torch.no_grad():
        loss.logit_scale.copy_(scalars["logit_scale"])
        if sigmoid:
            loss.logit_bias.copy_(scalars["logit_bias"])
    return loss


def export_open_clip(
    model: MultimodalModel,
    folder: Path | str,
    *,
    image: str = "image",
    text: str = "text",
    layout: str = "custom-text",
) -> Path:
    """Write a folder that open_clip 3.3 loads as ``local-dir:``, and CLIP_benchmark with it.

    Args:
        model: Two of its encoders are towers of open_clip without a projection head.
        folder: Gets ``open_clip_config.json``, weights as safetensors, and the tokenizer's files where the text tower is
            Hugging Face's.
        image: Modality of the image tower.
        text: Modality of the text tower.
        layout: ``custom-text``: the towers apart, which every architecture has. ``clip``: as OpenAI's checkpoints, the text
            tower without a prefix; only for open_clip's own text towers.

    Returns:
        The folder.

    Raises:
        ConfigError: If the encoders are others, have a head or adapters, or the layout cannot hold them.
        CheckpointError: If there is no room for the weights.
    """
    if layout not in LAYOUTS:
        raise ConfigError(f"layout={layout!r}", fix=did_you_mean(layout, LAYOUTS))
    if model.normalize != "l2":
        raise ConfigError(
            f"the model has normalize: {model.normalize}, and open_clip scales embeddings to length 1",
            fix="use format mmrep",
        )
    pictures, texts = _tower(model, image, OpenClipImageEncoder), _tower(model, text, OpenClipTextEncoder)
    config = _config(pictures, texts, model, layout)
    weights = {f"visual.{name}": tensor for name, tensor in pictures.tower.state_dict().items()}
    prefix = "text." if layout == "custom-text" else ""
    weights |= {f"{prefix}{name}": tensor for name, tensor in texts.tower.state_dict().items()}
    weights |= _scalars(model, image, text)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in texts.files.items():
        (folder / name).write_text(content, encoding="utf-8")
    with replacing(folder / WEIGHT_FILES[0]) as part:
        save_weights({name: tensor.clone() for name, tensor in weights.items()}, part)
    with replacing(folder / CONFIG_FILE) as part:
        part.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return folder


def _tower(model: MultimodalModel, modality: str, kind: type) -> Any:
    if modality not in model.by_modality:
        raise ConfigError(f"the model has no modality '{modality}'", fix=did_you_mean(modality, model.modalities))
    encoder = model.by_modality[modality]
    if not isinstance(encoder, kind):
        raise ConfigError(
            f"'{modality}' is a {type(encoder).__name__}, which open_clip does not have", fix=f"train a {kind.__name__}"
        )
    if encoder.settings.get("projection", True):
        raise ConfigError(
            f"the encoder of '{modality}' has a projection head, which open_clip does not have",
            fix=f"train it with projection: false and embed_dim: {encoder.feature_dim}",
        )
    if "lora" in encoder.settings:
        raise ConfigError(
            f"the encoder of '{modality}' has adapters", fix="merge them first: mmrep.interop.export.merge"
        )
    return encoder


def _config(
    pictures: OpenClipImageEncoder, texts: OpenClipTextEncoder, model: MultimodalModel, layout: str
) -> dict[str, Any]:
    one, other = pictures.model_config, texts.model_config
    if (a := one.get("quick_gelu", False)) != (b := other.get("quick_gelu", False)):
        raise ConfigError(
            f"the image tower has quick_gelu={a}, the text tower {b}: open_clip has one activation for both",
            fix="take both towers from one model",
        )
    text = dict(other["text_cfg"])
    if layout == "clip" and (text.get("hf_model_name") or not _plain(text)):
        raise ConfigError("a text tower of this kind does not fit the plain CLIP layout", fix="use layout custom-text")
    vision = {**one["vision_cfg"]}
    config = {"embed_dim": model.embed_dim, "vision_cfg": vision, "text_cfg": text, "quick_gelu": a}
    config |= {"custom_text": True} if layout == "custom-text" else {}
    loss = model.loss
    if isinstance(loss, PairwiseCLIPLoss) and loss.form == "sigmoid":
        config["init_logit_bias"] = float(loss.settings["init_bias"])
    return {"model_cfg": config, "preprocess_cfg": {k: v for k, v in pictures.preprocessing.items() if k != "size"}}


def _plain(text: Mapping[str, Any]) -> bool:
    """Whether open_clip's ``CLIP`` can hold the text tower: it has neither a class token nor other blocks."""
    return (
        not any(text.get(key) for key in ("embed_cls", "hf_tokenizer_name"))
        and text.get("proj_type", "linear") == "linear"
    )


def _scalars(model: MultimodalModel, image: str, text: str) -> dict[str, Tensor]:
    """The scale of the pair, and its bias in the sigmoid form; of a loss without a scale, open_clip's start."""
    loss = model.loss
    if isinstance(loss, PairwiseCLIPLoss):
        scale, bias = loss.pair_scalars(image, text)
        return {"logit_scale": scale} | ({} if bias is None else {"logit_bias": bias})
    scale_of_loss = getattr(loss, "logit_scale", None)
    if isinstance(scale_of_loss, Tensor) and scale_of_loss.ndim == 0:
        return {"logit_scale": scale_of_loss}
    return {"logit_scale": torch.tensor(math.log(1 / 0.07))}
