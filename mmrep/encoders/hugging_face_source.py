"""Models of Hugging Face's transformers: where they come from, and what of them travels with our weights.

A source is a folder, or the id of a repository at the hub. Nothing of it is run: no code of the repository's, no pickle.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mmrep.encoders.hub import offline, without_waiting
from mmrep.errors import CheckpointError, ConfigError
from mmrep.weights import CONVERT

TOKENIZER = "tokenizer.json"
NOT_KEPT = (
    "_name_or_path",
    "transformers_version",
    "architectures",
    "id2label",
    "label2id",
    "problem_type",
    "auto_map",
    "dtype",  # weights are fp32 here, whatever they are stored as
    "torch_dtype",
    "quantization_config",
    "attn_implementation",  # may name code at the hub
    "_attn_implementation",
    "_attn_implementation_internal",
    "experts_implementation",
    "_experts_implementation",
    "_experts_implementation_internal",
)
"""Of a config: what says nothing about the network, or names code."""
SPEC_AUGMENT = "masked_spec_embed"
"""The parameter that `plain_config` makes needless."""
Loaded = TypeVar("Loaded")


def read_config(source: str) -> dict[str, Any]:
    """The architecture's config as plain JSON.

    Raises:
        CheckpointError: If it cannot be had.
    """
    from transformers import AutoConfig

    return plain_config(fetch("config", source, lambda: AutoConfig.from_pretrained(source, trust_remote_code=False)))


def plain_config(config: Any) -> dict[str, Any]:
    """A config without what is random in training by default and needs care on many ranks, as plain JSON.

    SpecAugment is left to our own augmentation. Dropped layers would leave parameters without gradient on some ranks.
    """
    values = {name: value for name, value in config.to_dict().items() if name not in NOT_KEPT}
    for name in values:
        if name.endswith("layerdrop") or (name.startswith("mask_") and name.endswith("_prob")):
            values[name] = 0.0
        elif name == "apply_spec_augment":
            values[name] = False
    plain: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return plain


def build_network(config: Mapping[str, Any]) -> nn.Module:
    """The encoder of an architecture with random weights, without the parts that no pooling of ours uses.

    Raises:
        ConfigError: If transformers has no such architecture, or it is no encoder of one modality.
    """
    transformers = require_transformers()
    if "model_type" not in config or config.get("text_config"):
        raise ConfigError(
            f"'{config.get('model_type')}' is no encoder of a single modality", fix="CLIP models load through open_clip"
        )
    try:
        with quiet(), offline():
            kept = transformers.AutoConfig.for_model(**{n: v for n, v in config.items() if n not in NOT_KEPT})
            whole = transformers.AutoModel.from_config(kept, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"transformers cannot build '{config['model_type']}' ({reason[:160]})") from error
    return _encoder_of(whole)


def _encoder_of(whole: Any) -> nn.Module:
    network = whole.get_encoder() if whole.config.is_encoder_decoder else whole
    if getattr(network, "pooler", None) is not None:
        network.pooler = None  # never used here, and a parameter without gradient stops DDP
    encoder: nn.Module = network
    return encoder


def read_network_weights(source: str) -> dict[str, Tensor]:
    """The weights of what `build_network` builds, by transformers' own loader.

    Raises:
        CheckpointError: If they cannot be had, are unsafe, or are not all there.
    """
    transformers = require_transformers()
    options: dict[str, Any] = {"trust_remote_code": False, "output_loading_info": True, "dtype": torch.float32}
    options["ignore_mismatched_sizes"] = True  # they are refused below, in one line
    whole, info = fetch("weights", source, lambda: transformers.AutoModel.from_pretrained(source, **options))
    weights = dict(_encoder_of(whole).state_dict())
    names = tuple(weights)
    lacking = [name for name in info["missing_keys"] if name.endswith(names)]
    lacking += [f"{name} of shape {list(theirs)}" for name, theirs, _ in info["mismatched_keys"]]
    if lacking:
        raise CheckpointError(
            f"{len(lacking)} of {len(weights)} weights are missing or of another shape ({min(lacking)}, ...)",
            where=source,
            fix="likely its config.json is of another model; pretrained: false takes random weights",
        )
    return weights


def read_tokenizer(source: str) -> tuple[str, int, int]:
    """A fast tokenizer as JSON, the number of its padding token, and the longest text it is meant for.

    Raises:
        CheckpointError: If it cannot be had.
    """
    transformers = require_transformers()
    tokenizer = fetch(
        "tokenizer", source, lambda: transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    )
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise CheckpointError(
            "its tokenizer has no fast version", where=source, fix=f"put a {TOKENIZER} into the folder"
        )
    backend.no_padding()
    backend.no_truncation()
    return backend.to_str(), tokenizer.pad_token_id or 0, int(min(tokenizer.model_max_length, 1 << 30))


def read_extractor(source: str) -> dict[str, Any]:
    """An audio feature extractor's settings as plain JSON.

    Raises:
        CheckpointError: If they cannot be had.
    """
    transformers = require_transformers()
    extractor = fetch(
        "feature extractor",
        source,
        lambda: transformers.AutoFeatureExtractor.from_pretrained(source, trust_remote_code=False),
    )
    values: dict[str, Any] = json.loads(extractor.to_json_string())
    return {
        "feature_extractor_type": type(extractor).__name__,
        **{k: v for k, v in values.items() if k != "processor_class"},
    }


def fetch(what: str, source: str, load: Callable[[], Loaded]) -> Loaded:
    """What ``load`` gives, or one line that says why not.

    Raises:
        CheckpointError: If the source is neither a folder nor a repository that can be had, or its files are unsafe.
    """
    require_transformers()
    try:
        with quiet(), without_waiting():
            return load()
    except (pickle.UnpicklingError, OSError, ValueError, KeyError, RuntimeError, TypeError, ImportError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, pickle.UnpicklingError) or "Weights only load failed" in reason:
            raise CheckpointError(
                "the weights are pickled with objects that could run code", where=source, fix=CONVERT
            ) from error
        if Path(source).is_dir():
            fix = "give a folder with config.json, model.safetensors, and tokenizer.json or preprocessor_config.json"
        elif source.count("/") > 1 or source.startswith((".", "/", "~")):
            reason, fix = "no such folder", "give a folder in transformers' format, or a hub id as ORG/NAME"
        else:
            fix = "check the name and the network, or download the repository's files by hand and give their folder"
        raise CheckpointError(f"the {what} cannot be had ({reason[:160]})", where=source, fix=fix) from error
    except Exception as error:  # safetensors' and the hub client's own types
        raise CheckpointError(
            f"the {what} cannot be had ({type(error).__name__}: {str(error)[:120]})", where=source, fix="copy it again"
        ) from error


def require_transformers() -> Any:
    """The package, or a line that says how to install it.

    Raises:
        ConfigError: If it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise ConfigError("this encoder needs transformers", fix="pip install 'mmrep[hf]'") from error
    return transformers


@contextmanager
def quiet() -> Iterator[None]:
    """Without the reports and bars that transformers prints while it loads: errors say it in one line."""
    logging = require_transformers().logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
