"""Text and audio encoders over the networks of Hugging Face's transformers, pretrained or not."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from mmrep.data.decode import Waveform
from mmrep.encoders.audio import FixedWaveform
from mmrep.encoders.base import Encoder
from mmrep.encoders.hugging_face_source import (
    SPEC_AUGMENT,
    TOKENIZER,
    build_network,
    read_config,
    read_extractor,
    read_network_weights,
    read_tokenizer,
    require_transformers,
)
from mmrep.encoders.layers import layers_by_blocks
from mmrep.encoders.reach import freeze_unreached
from mmrep.errors import CheckpointError, ConfigError, check_choice
from mmrep.weights import load_weights

POOLINGS = ("mean", "cls", "last")
RAW_EXTRACTOR = "Wav2Vec2FeatureExtractor"
"""Of the networks that take waveforms: it does no more than standardise them."""
FULL_SCALE = 32767
POSITIONS = "embed_positions.weight"
"""Whisper's: a shorter clip uses the first."""


def pool(rows: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """One vector of a sequence.

    Args:
        rows: ``[B, L, width]``.
        mask: bool ``[B, L]``: which positions count; at least the first does.
        pooling: ``mean`` over those, ``cls`` for the first, ``last`` for the last of them.
    """
    if pooling == "cls":
        return rows[:, 0]
    if pooling == "last":
        return rows[torch.arange(len(rows), device=rows.device), mask.sum(dim=1) - 1]
    weights = mask.to(rows.dtype).unsqueeze(2)
    return (rows * weights).sum(dim=1) / weights.sum(dim=1)


@dataclass(frozen=True)
class HFTokenizer:
    """Text to int32 ``[2, length]``: token numbers, and 1 where there is a token. Cut, or padded at the end.

    Args:
        content: Of a ``tokenizer.json``.
        length: Tokens of the result, special ones included.
        pad: The number of the padding token.
    """

    content: str
    length: int
    pad: int

    def __call__(self, text: str) -> Tensor:
        numbers = _tokenizer(self.content, self.length).encode(text).ids
        spare = self.length - len(numbers)
        rows = [numbers + [self.pad] * spare, [1] * len(numbers) + [0] * spare]
        return torch.tensor(rows, dtype=torch.int32)


@lru_cache(maxsize=8)
def _tokenizer(content: str, length: int) -> Any:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(content)
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length=length)
    return tokenizer


class HFEncoder(Encoder):
    """Base of the encoders over a network of transformers.

    Args:
        embed_dim: Width of the embedding space.
        network: Gives an output with ``last_hidden_state [B, L, width]``.
        config: Of the network.
        pooling: See `pool`.
        settings: The subclass's own arguments, ``config`` and ``pooling`` apart.
        **head: See `mmrep.encoders.base.Encoder`.
    """

    def __init__(
        self,
        embed_dim: int,
        network: nn.Module,
        config: dict[str, Any],
        pooling: str,
        settings: dict[str, Any],
        **head: Any,
    ) -> None:
        check_choice("pooling", pooling, POOLINGS)
        width = int(network.config.hidden_size)  # type: ignore[union-attr,arg-type]  # of a transformers network
        super().__init__(embed_dim, width, {"config": config, "pooling": pooling, **settings}, **head)
        self.pooling, self.network = pooling, network

    def layers(self) -> list[list[nn.Parameter]]:
        return layers_by_blocks(self.network)


class HFTextEncoder(HFEncoder):
    """A text network of transformers with its tokenizer: BERT, MPNet, XLM-R, ModernBERT, T5's encoder, GPT-2, ...

    The config and the tokenizer travel with the weights: a model folder needs neither the source nor the hub.

    Args:
        embed_dim: Width of the embedding space.
        model: A folder in transformers' format, or a repository's id at the hub.
        pretrained: Whether its weights are taken too, or only its config and tokenizer.
        pooling: ``mean`` over the tokens (sentence transformers), ``cls`` for the first, ``last`` for the last one
            (decoders).
        length: Tokens of a text; longer ones are cut.
        config: As a model folder stores it, in place of ``model``.
        pad: Likewise: the number of the padding token.
        files: Likewise: ``tokenizer.json``.
        **head: ``projection``, ``batch_norm``, ``head_width``, ``lora``, ``views``: see `mmrep.encoders.base.Encoder`.

    Raises:
        ConfigError: If transformers is not installed, or has no such architecture.
        CheckpointError: If the source cannot be had, is unsafe, or is not whole.
    """

    kind = "text"

    def __init__(
        self,
        embed_dim: int,
        model: str | None = None,
        pretrained: bool = True,
        pooling: str = "mean",
        length: int = 64,
        config: dict[str, Any] | None = None,
        pad: int = 0,
        files: Mapping[str, str] | None = None,
        **head: Any,
    ) -> None:
        if model is not None:
            config = read_config(model)
            tokenizer, pad, longest = read_tokenizer(model)
            if not 1 < length <= longest:
                raise ConfigError(f"length={length} where texts have 2 to {longest} tokens", where=model)
            files = {TOKENIZER: tokenizer}
        if config is None or files is None or TOKENIZER not in files:
            raise ConfigError("a text encoder of transformers without model", fix="give a folder or a hub id as model")
        network = build_network(config)
        if model is not None and pretrained:
            load_weights(network, read_network_weights(model), where=model)
        super().__init__(embed_dim, network, config, pooling, {"length": length, "pad": pad}, **head)
        self.files = dict(files)
        self.length, self.pad = length, pad
        freeze_unreached(self)

    def transform(self, train: bool) -> Callable[[Any], Any]:
        return HFTokenizer(self.files[TOKENIZER], self.length, self.pad)

    def empty(self, n: int) -> Tensor:
        return torch.zeros(n, 2, self.length, dtype=torch.int32)

    def features(self, inputs: Tensor) -> Tensor:
        numbers, mask = inputs[:, 0], inputs[:, 1].bool()
        # Attention over nothing is NaN, and a row that stands for an absent text has no token.
        mask = mask | (torch.arange(mask.shape[1], device=mask.device) == 0)
        rows: Tensor = self.network(input_ids=numbers, attention_mask=mask.long()).last_hidden_state
        return pool(rows, mask, self.pooling)


@dataclass(frozen=True)
class HFSpectrogram:
    """A waveform to the float32 input of a network that takes spectrograms, by transformers' own feature extractor.

    Args:
        waveform: Makes it one of fixed rate and length.
        extractor: Settings, as JSON.
    """

    waveform: FixedWaveform
    extractor: str

    def __call__(self, waveform: Waveform) -> Tensor:
        samples = self.waveform(waveform).float() / FULL_SCALE
        extractor = _extractor(self.extractor)
        made = extractor(samples.numpy(), sampling_rate=self.waveform.rate, return_tensors="pt")
        spectrogram: Tensor = made[extractor.model_input_names[0]][0]
        return spectrogram.float().contiguous()


@lru_cache(maxsize=8)
def _extractor(content: str) -> Any:
    values = json.loads(content)
    name = values.pop("feature_extractor_type")
    kind = getattr(require_transformers(), str(name), None)
    if not isinstance(kind, type) or not name.endswith("FeatureExtractor"):
        raise CheckpointError(f"transformers has no feature extractor '{name}'", fix="update transformers")
    return kind(**values)


class HFAudioEncoder(HFEncoder):
    """An audio network of transformers: wav2vec 2.0, HuBERT, WavLM, Whisper's encoder, or AST.

    Clips are cut or padded with silence to ``seconds``, and silence counts like sound. Networks that take waveforms are fed on
    the device; for those that take spectrograms the loader's workers run the feature extractor. The config and the extractor
    travel with the weights.

    Args:
        embed_dim: Width of the embedding space.
        model: A folder in transformers' format, or a repository's id at the hub.
        pretrained: Whether its weights are taken too, or only its config and feature extractor.
        pooling: ``mean`` over time, ``cls`` for the first row (AST), ``last``.
        seconds: Of a clip. Whisper is cut to it, where it would take 30 otherwise: a whole number there.
        augment: Whether training varies speed, loudness and start.
        random_window: Whether training takes a random window of a longer clip, and not its start.
        config: As a model folder stores it, in place of ``model``.
        extractor: Likewise: the feature extractor's settings.
        **head: ``projection``, ``batch_norm``, ``head_width``, ``lora``, ``views``: see `mmrep.encoders.base.Encoder`.

    Raises:
        ConfigError: If transformers is not installed, has no such architecture, or ``seconds`` does not suit it.
        CheckpointError: If the source cannot be had, is unsafe, or is not whole.
    """

    kind = "audio"

    def __init__(
        self,
        embed_dim: int,
        model: str | None = None,
        pretrained: bool = True,
        pooling: str = "mean",
        seconds: float = 5.0,
        augment: bool = False,
        random_window: bool = False,
        config: dict[str, Any] | None = None,
        extractor: dict[str, Any] | None = None,
        **head: Any,
    ) -> None:
        if model is not None:
            config, extractor = _fitted(read_config(model), read_extractor(model), seconds)
        if config is None or extractor is None:
            raise ConfigError(
                "an audio encoder of transformers without model", fix="give a folder or a hub id as model"
            )
        network = build_network(config)
        if model is not None and pretrained:
            load_weights(network, _fitted_weights(network, read_network_weights(model)), where=model)
        settings = {"seconds": seconds, "augment": augment, "random_window": random_window, "extractor": extractor}
        super().__init__(embed_dim, network, config, pooling, settings, **head)
        self.rate, self.augment, self.random_window = int(extractor["sampling_rate"]), augment, random_window
        self.length = round(seconds * self.rate)
        self.raw, self.standardize = extractor["feature_extractor_type"] == RAW_EXTRACTOR, extractor.get("do_normalize")
        self._content = json.dumps(extractor)
        self._shape = None if self.raw else self.transform(False)((torch.zeros(1).numpy(), self.rate)).shape
        freeze_unreached(self)

    def transform(self, train: bool) -> Callable[[Any], Any]:
        waveform = FixedWaveform(self.rate, self.length, train and self.augment, train and self.random_window)
        return waveform if self.raw else HFSpectrogram(waveform, self._content)

    def empty(self, n: int) -> Tensor:
        return torch.zeros(n, self.length, dtype=torch.int16) if self._shape is None else torch.zeros(n, *self._shape)

    def features(self, inputs: Tensor) -> Tensor:
        if self.raw:
            inputs = inputs.float() / FULL_SCALE
            if self.standardize:
                variance, mean = torch.var_mean(inputs, dim=1, keepdim=True, correction=0)
                inputs = (inputs - mean) * (variance + 1e-7).rsqrt()
            inputs = inputs.to(next(self.parameters()).dtype)
        rows: Tensor = self.network(inputs).last_hidden_state
        return pool(rows, torch.ones(rows.shape[:2], dtype=torch.bool, device=rows.device), self.pooling)


def _fitted(config: dict[str, Any], extractor: dict[str, Any], seconds: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """Config and feature extractor of a network for clips of ``seconds``: only Whisper's know a length."""
    if config.get("model_type") != "whisper":
        return config, extractor
    longest, whole = extractor["chunk_length"], int(seconds)
    if whole != seconds or not 1 <= whole <= longest:
        raise ConfigError(f"seconds={seconds} for Whisper", fix=f"give a whole number from 1 to {longest}")
    positions = config["max_source_positions"] * whole // longest
    derived = {"chunk_length": whole, "n_samples": whole * extractor["sampling_rate"], "nb_max_frames": 2 * positions}
    return {**config, "max_source_positions": positions}, {**extractor, **derived}


def _fitted_weights(network: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without SpecAugment's vector, which most networks do not have here; of Whisper's positions, sines, the first."""
    own = network.state_dict()
    fitted = {name: tensor for name, tensor in weights.items() if name in own or name != SPEC_AUGMENT}
    if POSITIONS in own and POSITIONS in weights:
        fitted[POSITIONS] = weights[POSITIONS][: len(own[POSITIONS])]
    return fitted
