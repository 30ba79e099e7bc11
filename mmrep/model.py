"""`MultimodalModel`: encoders and the loss they were trained with, as one thing that embeds, scores, saves and loads."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mmrep.encoders
import mmrep.losses
from mmrep.batch import Input
from mmrep.data.items import raw_item
from mmrep.encoders import Encoder
from mmrep.encoders.base import placed
from mmrep.errors import CheckpointError, ConfigError, MmrepError, did_you_mean
from mmrep.files import read_json, read_text, replacing
from mmrep.losses import Loss
from mmrep.weights import BoundedBuilding, load_weights, read_weights, save_weights

FORMAT = "mmrep-model-1"
NORMALIZATIONS = ("l2", "layernorm")
SOURCES = frozenset({"pretrained", "model"})
"""Arguments of our encoders that name weights elsewhere: their settings never hold one."""
CODE_ENDINGS = (".py", ".pyc", ".pyd", ".pyi", ".so", ".sh")
"""A file that an encoder keeps is a tokenizer's, and has none of them."""
MOST_INPUT_BYTES = 256 << 20
"""Of one item as an encoder of a model folder takes it: as of an array in a shard."""


class Encoded(dict[str, Tensor]):
    """What `MultimodalModel.encode` gives: modality -> rows ``[N, D]``.

    Attributes:
        present: Modality -> bool ``[N]``: which items were there. The others' rows are zeros.
    """

    def __init__(self, rows: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> None:
        super().__init__(rows)
        self.present = dict(present)


class MultimodalModel(nn.Module):
    """One embedding space for any number of modalities.

    Args:
        encoders: Modality -> encoder, all of one ``embed_dim``.
        loss: The objective. It belongs to the model because it says how to score.
        normalize: What becomes of embeddings: ``l2`` scales them to length 1, ``layernorm`` to mean 0 and variance 1 (length
            about ``sqrt(embed_dim)``, as Symile's large experiments).
        share: Modality -> the modality whose encoder it uses too.
    """

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        loss: Loss,
        *,
        normalize: str = "l2",
        share: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        widths = {name: encoder.embed_dim for name, encoder in encoders.items()}
        if not encoders or len(set(widths.values())) > 1:
            raise ConfigError(f"encoders need one common embed_dim, they have {widths}")
        if normalize not in NORMALIZATIONS:
            raise ConfigError(f"normalize={normalize!r}", fix=did_you_mean(normalize, NORMALIZATIONS))
        if bad := [name for name in (*encoders, *(share or {})) if not name.isidentifier()]:
            raise ConfigError(f"modalities must be plain names (letters, digits, _), not {bad}")
        self.encoders, self.loss, self.normalize, self.share = (
            nn.ModuleDict(encoders),
            loss,
            normalize,
            dict(share or {}),
        )
        for name, lender in self.share.items():
            if lender not in encoders or name in encoders:
                raise ConfigError(
                    f"share: '{name}' cannot use the encoder of '{lender}'", fix=did_you_mean(lender, encoders)
                )
        self.embed_dim = next(iter(widths.values()))
        for encoder in encoders.values():
            encoder.adapt()

    @property
    def by_modality(self) -> dict[str, Encoder]:
        """Modality -> its encoder, its own or a shared one."""
        own: dict[str, Any] = dict(self.encoders.items())
        return own | {name: own[lender] for name, lender in self.share.items()}

    @property
    def modalities(self) -> tuple[str, ...]:
        """All modalities, in the order of the config."""
        return tuple(self.by_modality)

    def forward(
        self, inputs: Mapping[str, Input], run: Callable[[Encoder, Input], Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Inputs of a `Batch` to normalised rows ``[B, D]``; ``[B, V, D]`` where an input is a list of views.

        Args:
            inputs: Of the modalities that the batch has.
            run: How an encoder is applied to its input, where not simply called: in parts, say.
        """
        return {
            name: self._normalize(encoder(inputs[name]) if run is None else run(encoder, inputs[name]))
            for name, encoder in self.by_modality.items()
            if name in inputs
        }

    def _normalize(self, rows: Tensor) -> Tensor:
        rows = rows if rows.dtype == torch.float64 else rows.float()
        return F.normalize(rows, dim=-1) if self.normalize == "l2" else F.layer_norm(rows, rows.shape[-1:])

    @torch.inference_mode()
    def encode(
        self, *, batch_size: int = 256, device: torch.device | str | None = None, **items: Sequence[Any]
    ) -> Encoded:
        """Embed items of the user's own. The same items give the same rows: nothing is drawn at random.

        Args:
            batch_size: How many go through an encoder at once.
            device: Where the encoders run, and where they stay; by default where they are.
            **items: Per modality a list. Text: the texts. Images: paths, PIL images, or uint8 arrays ``[H, W, 3]`` or
                ``[H, W]``. Audio: paths or (samples, rate in Hz), floats in [-1, 1], ``[N]`` or ``[channels, N]``. Arrays:
                paths of .npy files or arrays. None anywhere stands for an item that is not there.

        Returns:
            Per modality normalised fp32 rows ``[N, D]`` on the CPU; zeros where an item is None, see `Encoded`.

        Raises:
            MmrepError: On an unknown modality, an item of the wrong kind, or a file that cannot be read.

        Example:
            >>> rows = model.encode(image=["cat.png", "dog.png"], text=["a dog"])
            >>> model.score(target="image", candidates=rows["image"], given={"text": rows["text"]}).argmax()
        """
        if batch_size < 1:
            raise MmrepError(f"batch_size={batch_size} must be at least 1")
        for name, values in items.items():
            self._check_known(name)
            if isinstance(values, str | bytes) or not isinstance(values, Sequence):
                raise MmrepError(f"'{name}' is {type(values).__name__}, and no list", fix=f"write {name}=[...]")
        if device is not None:
            self.to(device)
        was_training = self.training
        self.eval()
        try:
            rows = {name: self._encode(name, values, batch_size) for name, values in items.items()}
        finally:
            self.train(was_training)
        return Encoded(rows, {name: torch.tensor([v is not None for v in values]) for name, values in items.items()})

    def _encode(self, name: str, values: Sequence[Any], batch_size: int) -> Tensor:
        encoder = self.by_modality[name]
        transform, device = encoder.transform(train=False), next(self.parameters()).device
        rows = torch.zeros(len(values), self.embed_dim)
        there = [number for number, value in enumerate(values) if value is not None]
        for start in range(0, len(there), batch_size):
            numbers = there[start : start + batch_size]
            inputs = torch.stack([transform(raw_item(encoder.kind, values[n], f"{name}[{n}]")) for n in numbers])
            rows[numbers] = self._normalize(encoder(placed(inputs, encoder, device))).float().cpu()
        return rows

    def _check_known(self, name: str) -> None:
        if name not in self.by_modality:
            raise MmrepError(f"the model has no modality '{name}'", fix=did_you_mean(name, self.modalities))

    def score(
        self,
        *,
        target: str,
        candidates: Tensor,
        given: Mapping[str, Tensor],
        present: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """How well each candidate fits what is given, by the rule that the model was trained with: see `Loss.score`.

        Where ``given`` is what `encode` returned, its absent items say nothing.
        """
        for name in (target, *given):
            self._check_known(name)
        if present is None and isinstance(given, Encoded):
            present = given.present
        return self.loss.score(target=target, candidates=candidates, given=given, present=present)

    def config(self) -> dict[str, Any]:
        """Plain data from which `from_config` builds the same model, weights aside."""
        own = self._own()
        return {
            "format": FORMAT,
            "embed_dim": self.embed_dim,
            "normalize": self.normalize,
            "share": self.share,
            "encoders": {name: _describe(encoder) for name, encoder in own.items()},
            "loss": _describe(self.loss),
        }

    def files(self) -> dict[str, dict[str, str]]:
        """Modality -> the text files that belong to its encoder's weights: see `mmrep.encoders.Encoder.files`."""
        return {name: dict(encoder.files) for name, encoder in self._own().items() if encoder.files}

    def _own(self) -> dict[str, Encoder]:
        return {name: encoder for name, encoder in self.by_modality.items() if name not in self.share}

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        classes: Mapping[str, type] | None = None,
        files: Mapping[str, Mapping[str, str]] | None = None,
    ) -> MultimodalModel:
        """Build a model from what `config` and `files` gave.

        Only classes of ``mmrep.encoders`` and ``mmrep.losses`` are built, and those in ``classes`` ({name: class}): a
        config cannot name code to import.

        Raises:
            CheckpointError: On another format, an unknown class, or settings that it does not take.
        """
        try:
            if config["format"] != FORMAT:
                raise CheckpointError(f"a model of format {config['format']!r}", fix=f"this version reads {FORMAT}")
            encoders = {
                name: _build_encoder(config["embed_dim"], item, (files or {}).get(name), classes)
                for name, item in config["encoders"].items()
            }
            loss = _find(config["loss"]["class"], Loss, classes)(**config["loss"]["settings"])
            return cls(encoders, loss, normalize=config["normalize"], share=config["share"])
        except MmrepError:
            raise
        except Exception as error:  # whatever torch and the libraries raise on sizes that make no network
            reason = " ".join(str(error).split())[:160]
            raise CheckpointError(f"broken model config ({type(error).__name__}: {reason})") from error

    def save_pretrained(self, folder: Path | str) -> Path:
        """Write ``config.json``, ``model.safetensors`` and ``files/MODALITY/NAME``, each beside and renamed.

        Raises:
            OSError: If they cannot be written.
            CheckpointError: The same, of the weights.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        kept = self.files()
        for name, contents in kept.items():
            for file, content in contents.items():
                with replacing(folder / "files" / name / file) as part:
                    part.write_text(content, encoding="utf-8")
        config = self.config() | (
            {"files": {name: sorted(contents) for name, contents in kept.items()}} if kept else {}
        )
        with replacing(folder / "model.safetensors") as part:
            save_weights(self.state_dict(), part)
        with replacing(folder / "config.json") as part:
            part.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        return folder

    @classmethod
    def from_pretrained(cls, folder: Path | str, classes: Mapping[str, type] | None = None) -> MultimodalModel:
        """Read a folder that `save_pretrained` wrote. Runs no code of the folder's.

        Raises:
            CheckpointError: If a file is missing or broken, or weights and config do not belong together.
        """
        folder = Path(folder)
        for name in ("config.json", "model.safetensors"):
            if not (folder / name).is_file():
                raise CheckpointError(
                    f"no {name}", where=folder, fix="give a model folder, or a run folder with model/"
                )
        config = read_json(folder / "config.json")
        try:
            files = {
                name: {file: _read_file(folder, name, file) for file in kept}
                for name, kept in config.get("files", {}).items()
            }
        except (AttributeError, TypeError) as error:
            raise CheckpointError(f"broken file ({error})", where=folder) from error
        model = build_bounded(config, folder / "model.safetensors", classes, files)
        load_weights(model, read_weights(folder / "model.safetensors"), where=folder)
        return model.eval()


def build_bounded(
    config: Mapping[str, Any],
    weights: Path,
    classes: Mapping[str, type] | None = None,
    files: Mapping[str, Mapping[str, str]] | None = None,
) -> MultimodalModel:
    """`MultimodalModel.from_config` of a config that came with weights: it takes no more memory than goes with them.

    Raises:
        CheckpointError: The same, and if the network or one of its inputs would be too large.
    """
    with BoundedBuilding(weights):
        model = MultimodalModel.from_config(config, classes, files)
        for name, encoder in model.by_modality.items():
            if (size := encoder.empty(1).nbytes) > MOST_INPUT_BYTES:
                raise CheckpointError(
                    f"an input of '{name}' has {size:,} bytes, more than {MOST_INPUT_BYTES:,}", where=weights.parent
                )
    return model


def _read_file(folder: Path, modality: str, name: str) -> str:
    """A file that the config lists; never one outside its folder, by a link either.

    Raises:
        CheckpointError: If it is not there, too large, or elsewhere.
    """
    path = folder / "files" / modality / name
    # A snapshot in the hub's cache is links to the blobs beside it.
    root = folder.parent.parent if folder.parent.name == "snapshots" else folder
    if not (modality.isidentifier() and _is_text_name(name)):
        raise CheckpointError(
            f"the config names the file {name!r} of {modality!r}, which is no text of a model's", where=folder
        )
    if not path.is_file():
        raise CheckpointError("no such file of the model's", where=path, fix="copy the whole model folder")
    if not path.resolve().is_relative_to(root.resolve()):
        raise CheckpointError("a file of the model's is a link to another place", where=path)
    return read_text(path)


def _is_text_name(name: str) -> bool:
    """Whether it is a plain file name, of no code."""
    return re.fullmatch(r"\w[\w.+-]*", name) is not None and not name.lower().endswith(CODE_ENDINGS)


def _build_encoder(
    embed_dim: int, item: Mapping[str, Any], files: Mapping[str, str] | None, classes: Mapping[str, type] | None
) -> Encoder:
    """An encoder of a model folder: from its own settings and files, never from a source elsewhere."""
    kind = _find(item["class"], Encoder, classes)
    settings = copy.deepcopy(dict(item["settings"]))
    if kind.__module__.startswith("mmrep.") and (named := SOURCES & settings.keys()):
        raise CheckpointError(
            f"the config names another source of weights: {', '.join(sorted(named))}", fix="remove it"
        )
    if bad := [name for name in files or {} if not _is_text_name(name)]:
        raise CheckpointError(f"files of an encoder have plain names and are no code, not {bad}")
    encoder: Encoder = kind(embed_dim, **settings, **({"files": dict(files)} if files else {}))
    return encoder


def _describe(part: Encoder | Loss) -> dict[str, Any]:
    return {"class": type(part).__name__, "settings": copy.deepcopy(dict(part.settings))}


def _find(name: str, base: type, classes: Mapping[str, type] | None) -> type:
    known: dict[str, Any] = {**vars(mmrep.encoders), **vars(mmrep.losses), **(classes or {})}
    known = {key: value for key, value in known.items() if isinstance(value, type) and issubclass(value, base)}
    if name not in known or name == base.__name__:
        raise CheckpointError(
            f"the config names the class '{name}', which mmrep does not have",
            fix="pass your own classes: classes={'NAME': CLASS}",
        )
    found: type = known[name]
    return found
