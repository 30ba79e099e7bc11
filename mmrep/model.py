"""`MultimodalModel`: encoders and the loss they were trained with, as one thing that embeds, scores, saves and loads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import mmrep.encoders
import mmrep.losses
from mmrep.batch import Input
from mmrep.data.decode import decode_file
from mmrep.encoders import Encoder
from mmrep.errors import CheckpointError, ConfigError, MmrepError, did_you_mean
from mmrep.losses import Loss

FORMAT = "mmrep-model-1"
NORMALIZATIONS = ("l2", "layernorm")


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
        if bad := [name for name in encoders if not name.isidentifier()]:
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

    @property
    def by_modality(self) -> dict[str, Encoder]:
        """Modality -> its encoder, its own or a shared one."""
        own: dict[str, Any] = dict(self.encoders.items())
        return own | {name: own[lender] for name, lender in self.share.items()}

    @property
    def modalities(self) -> tuple[str, ...]:
        """All modalities, in the order of the config."""
        return tuple(self.by_modality)

    def forward(self, inputs: Mapping[str, Input]) -> dict[str, Tensor]:
        """Inputs of a `Batch` to normalised rows ``[B, D]``; ``[B, V, D]`` where an input is a list of views."""
        return {
            name: self._normalize(encoder(inputs[name])) for name, encoder in self.by_modality.items() if name in inputs
        }

    def _normalize(self, rows: Tensor) -> Tensor:
        rows = rows if rows.dtype == torch.float64 else rows.float()
        return F.normalize(rows, dim=-1) if self.normalize == "l2" else F.layer_norm(rows, rows.shape[-1:])

    @torch.inference_mode()
    def encode(self, *, batch_size: int = 256, **items: Sequence[Any]) -> dict[str, Tensor]:
        """Embed items of the user's own.

        Args:
            batch_size: How many go through an encoder at once.
            **items: Per modality a list. Text: the texts. Images: paths or PIL images. Audio: paths or (mono float
                samples, rate in Hz). Arrays: paths of .npy files or arrays.

        Returns:
            Per modality normalised fp32 rows ``[N, D]`` on the CPU.

        Raises:
            MmrepError: On an unknown modality, or a file that cannot be read.

        Example:
            >>> rows = model.encode(image=["cat.png", "dog.png"], text=["a dog"])
            >>> model.score(target="image", candidates=rows["image"], given={"text": rows["text"]}).argmax()
        """
        was_training = self.training
        self.eval()
        try:
            return {name: self._encode(name, list(values), batch_size) for name, values in items.items()}
        finally:
            self.train(was_training)

    def _encode(self, name: str, values: list[Any], batch_size: int) -> Tensor:
        if name not in self.by_modality:
            raise MmrepError(f"the model has no modality '{name}'", fix=did_you_mean(name, self.modalities))
        encoder = self.by_modality[name]
        transform, device = encoder.transform(train=False), next(self.parameters()).device
        rows = [torch.zeros(0, self.embed_dim)]
        for start in range(0, len(values), batch_size):
            inputs = torch.stack([transform(_raw(encoder.kind, value)) for value in values[start : start + batch_size]])
            rows.append(self._normalize(encoder(inputs.to(device))).float().cpu())
        return torch.cat(rows)

    def score(
        self,
        *,
        target: str,
        candidates: Tensor,
        given: Mapping[str, Tensor],
        present: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """How well each candidate fits what is given, by the rule that the model was trained with: see `Loss.score`."""
        for name in (target, *given):
            if name not in self.by_modality:
                raise MmrepError(f"the model has no modality '{name}'", fix=did_you_mean(name, self.modalities))
        return self.loss.score(target=target, candidates=candidates, given=given, present=present)

    def config(self) -> dict[str, Any]:
        """Plain data from which `from_config` builds the same model, weights aside."""
        own = {name: encoder for name, encoder in self.by_modality.items() if name not in self.share}
        return {
            "format": FORMAT,
            "embed_dim": self.embed_dim,
            "normalize": self.normalize,
            "share": self.share,
            "encoders": {name: _describe(encoder) for name, encoder in own.items()},
            "loss": _describe(self.loss),
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any], classes: Mapping[str, type] | None = None) -> MultimodalModel:
        """Build a model from what `config` gave.

        Only classes of ``mmrep.encoders`` and ``mmrep.losses`` are built, and those in ``classes`` ({name: class}): a
        config cannot name code to import.

        Raises:
            CheckpointError: On another format, an unknown class, or settings that it does not take.
        """
        try:
            if config["format"] != FORMAT:
                raise CheckpointError(f"a model of format {config['format']!r}", fix=f"this version reads {FORMAT}")
            encoders = {
                name: _find(item["class"], Encoder, classes)(config["embed_dim"], **item["settings"])
                for name, item in config["encoders"].items()
            }
            loss = _find(config["loss"]["class"], Loss, classes)(**config["loss"]["settings"])
            return cls(encoders, loss, normalize=config["normalize"], share=config["share"])
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"broken model config ({type(error).__name__}: {error})") from error

    def save_pretrained(self, folder: Path | str) -> Path:
        """Write ``config.json`` and ``model.safetensors``, each beside and renamed."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json.part").write_text(json.dumps(self.config(), indent=1) + "\n")
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        save_file(weights, folder / "model.safetensors.part")
        for name in ("model.safetensors", "config.json"):
            (folder / f"{name}.part").replace(folder / name)
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
        try:
            config = json.loads((folder / "config.json").read_text())
            weights = load_file(folder / "model.safetensors")
        except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise CheckpointError(f"broken file ({error})", where=folder) from error
        model = cls.from_config(config, classes)
        load_weights(model, weights, where=folder)
        return model.eval()


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], *, where: object) -> None:
    """Load weights that must fit exactly.

    Raises:
        CheckpointError: With the first few differences, if they do not.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    differences = [
        f"{name}: {found.get(name, 'missing')} instead of {expected.get(name, 'nothing')}"
        for name in sorted(expected.keys() | found.keys())
        if expected.get(name) != found.get(name)
    ]
    if differences:
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise CheckpointError(f"the weights belong to another config: {'; '.join(differences[:3])}{more}", where=where)
    model.load_state_dict(dict(weights))


def _raw(kind: str, value: Any) -> Any:
    """What an encoder's transform takes: a path is read and decoded; text is always the text itself."""
    if value is None:
        raise MmrepError(f"an item of kind {kind} is None", fix="leave it out")
    if kind != "text" and isinstance(value, str | Path):
        return decode_file(kind, value)
    return value.convert("RGB") if kind == "image" else value


def _describe(part: Encoder | Loss) -> dict[str, Any]:
    return {"class": type(part).__name__, "settings": part.settings}


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
