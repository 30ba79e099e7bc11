"""Weights in files: read without running anything in them, and matched to a module with a short answer if they do not fit."""

from __future__ import annotations

import pickle
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mmrep.errors import CheckpointError

WRAPPERS = ("module.", "_orig_mod.")
"""What DDP and torch.compile put before every name."""
CONVERT = (
    "convert it where it was made, or where you trust it: save the weights alone, "
    "safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')"
)
FACTORIES = frozenset({torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.randint})
FACTORIES |= {torch.arange, torch.linspace, torch.eye, torch.empty_strided}
OF_NO_SIZE = ("out", "pin_memory", "generator", "names")
"""Arguments of theirs that a tensor without memory does not take."""
BYTES_BESIDE_WEIGHTS = 1 << 30
"""What a network may take beside its weights: filter banks, masks, blank inputs."""


class BoundedBuilding(TorchFunctionMode):
    """Within it a network takes no more memory than goes with the file of its weights; before it is taken.

    A config of few bytes can ask for more than there is, and a process that asks for it is killed without a word. Eight
    times the file leaves room for weights kept in half precision and for parts that are built and dropped, a decoder say.

    Args:
        weights: The file.
    """

    def __init__(self, weights: Path) -> None:
        super().__init__()
        self.file, self.left = weights, 8 * weights.stat().st_size + BYTES_BESIDE_WEIGHTS

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if func in FACTORIES and given.get("layout", torch.strided) is torch.strided:
            plain = {name: value for name, value in given.items() if name not in OF_NO_SIZE}
            made = func(*args, **{**plain, "device": "meta"})
            if str(given.get("device")) != "meta":
                self.left -= made.numel() * made.element_size()
            if self.left < 0:
                raise CheckpointError(
                    "the config asks for a network much larger than the weights",
                    where=self.file,
                    fix="use the config that the weights were saved with",
                )
        return func(*args, **given)


def read_torch_file(path: Path | str, *, mapped: bool = False) -> Any:
    """What ``torch.save`` wrote: tensors and plain data.

    Args:
        path: Of the file.
        mapped: Whether tensors stay on the disk until they are used: for a look at the rest.

    Raises:
        CheckpointError: If it is damaged, or holds other objects: unpickling those would run code of the file's choice.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except FileNotFoundError as error:
        raise CheckpointError("no such file", where=path) from error
    except pickle.UnpicklingError as error:
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        if foreign is None:
            raise CheckpointError("not a whole checkpoint", where=path, fix="copy it again") from error
        raise CheckpointError(
            f"a pickled object in the file ({foreign[1]}) could run code, so it is not a safe, whole checkpoint",
            where=path,
            fix=CONVERT,
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"not a safe, whole checkpoint ({reason[:100]})", where=path) from error


def read_weights(path: Path | str) -> dict[str, Tensor]:
    """Name -> tensor of a ``.safetensors`` file or a ``torch.save`` of a state dict, wrappers' prefixes taken off.

    Raises:
        CheckpointError: If it is broken, unsafe, or holds no weights.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError("no such weights file", where=path)
    if path.suffix == ".safetensors":
        try:
            weights: Any = load_file(path)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"broken file ({error})", where=path, fix="copy it again") from error
    else:
        weights = read_torch_file(path)
        weights = weights.get("state_dict", weights) if isinstance(weights, dict) else weights
    if not isinstance(weights, dict) or not weights or not all(isinstance(v, Tensor) for v in weights.values()):
        raise CheckpointError("the file holds no state dict", where=path, fix="give a file of name -> tensor")
    for wrapper in WRAPPERS:
        if all(name.startswith(wrapper) for name in weights):
            weights = {name.removeprefix(wrapper): tensor for name, tensor in weights.items()}
    return dict(weights)


def save_weights(weights: Mapping[str, Tensor], path: Path) -> None:
    """Write a ``.safetensors`` file.

    Args:
        weights: Name -> tensor; no two share memory.
        path: Of the file.

    Raises:
        CheckpointError: If there is no room for it.
    """
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, path)
    except SafetensorError as error:
        raise CheckpointError(
            f"the model could not be written ({error})", where=path.parent, fix="make room, or give another place"
        ) from error


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], *, where: object) -> None:
    """Load weights that must fit exactly.

    Args:
        module: Gets them.
        weights: Name -> tensor.
        where: Where they come from, for the message.

    Raises:
        CheckpointError: If they do not: a line that counts the differences by tower, and names the likely cause.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if expected != found:
        raise CheckpointError(
            f"the weights belong to another config: {describe_differences(expected, found)}",
            where=where,
            fix=_likely_cause(expected, found),
        )
    module.load_state_dict(dict(weights))


def describe_differences(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> str:
    """By tower, what is missing, too many, or of another shape, each with its first name.

    Args:
        expected: Name -> shape that the module has.
        found: Name -> shape that came.
    """
    towers: dict[str, list[str]] = defaultdict(list)
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            towers[_tower(name)].append(name)
    return "; ".join(f"{tower}: {_count(names, expected, found)}" for tower, names in towers.items())


def _count(names: Iterable[str], expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> str:
    groups: dict[str, list[str]] = {"missing": [], "too many": [], "of another shape": []}
    for name in names:
        groups["missing" if name not in found else "too many" if name not in expected else "of another shape"].append(
            name
        )
    parts = []
    for kind, members in groups.items():
        if members:
            first = members[0]
            shapes = f" {list(found[first])} instead of {list(expected[first])}" if kind == "of another shape" else ""
            parts.append(f"{len(members)} {kind} ({first}{shapes}{', ...' if len(members) > 1 else ''})")
    return ", ".join(parts)


def _tower(name: str) -> str:
    """``encoders.image`` of a model of mmrep's, the first part of another's name."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] == "encoders" and len(parts) > 2 else parts[0]


def _likely_cause(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> str:
    """What mostly is behind such differences."""
    missing, extra = expected.keys() - found.keys(), found.keys() - expected.keys()
    shapes = {name for name in expected.keys() & found.keys() if expected[name] != found[name]}
    if not expected.keys() & found.keys():
        ends = {name.split(".", 1)[-1] for name in extra}
        if ends & missing:
            prefix = next(name.split(".", 1)[0] for name in sorted(extra) if name.split(".", 1)[-1] in missing)
            return f"likely every name has '{prefix}.' before it: take it off"
        return "likely another architecture altogether"
    if any("lora_" in name for name in missing | extra):
        return "likely one of the two has adapters (lora) and the other has none"
    if shapes and all("pos" in name for name in shapes) and not missing | extra:
        return "likely another image size or context length"
    if whole := [t for t in {_tower(n) for n in missing} if all(n in missing for n in expected if _tower(n) == t)]:
        return f"likely a file without {' and '.join(sorted(whole))}"
    if shapes:
        return "likely another width: state the architecture that the weights were trained with"
    if any(re.search(r"\.\d+\.", name) for name in missing | extra):
        return "likely another depth: state the architecture that the weights were trained with"
    return "use the config that the weights were saved with"
