"""What losses refuse, and in which words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from mmrep.errors import ConfigError, LossError, did_you_mean
from mmrep.ops.gather import Gathered

Embeddings = Mapping[str, Tensor]
Presence = Mapping[str, Tensor]


def check_modalities(modalities: Sequence[str] | None, *, at_least: int) -> None:
    """Refuse at construction what no batch could mend.

    Raises:
        ConfigError: On too few modalities, or one that is named twice.
    """
    if modalities is None:
        return
    if len(modalities) < at_least:
        raise ConfigError(f"the loss needs at least {at_least} modalities, it has {list(modalities)}")
    if len(set(modalities)) < len(modalities):
        raise ConfigError(f"a modality is named twice in {list(modalities)}")


def check_name(name: str, modalities: Iterable[str] | None, what: str) -> None:
    """Refuse a setting that names an unknown modality.

    Raises:
        ConfigError: With the nearest known name.
    """
    if modalities is not None and name not in list(modalities):
        raise ConfigError(f"{what}: no modality '{name}'", fix=did_you_mean(name, modalities))


def check_shapes(embeddings: Embeddings, present: Presence | None, embed_dim: int | None) -> None:
    """Refuse embeddings that are not ``[B, D]`` or ``[B, V, D]`` of one B and D.

    Raises:
        LossError: Naming the modality, or the shapes.
    """
    shapes = {name: tuple(rows.shape) for name, rows in embeddings.items()}
    fits = all(len(shape) in (2, 3) and 0 not in shape[1:] for shape in shapes.values())
    if not fits or len({(shape[0], shape[-1]) for shape in shapes.values()}) > 1:
        raise LossError(
            f"embeddings must be [B, D] or [B, V, D] of one B and D, they are {shapes}",
            fix="give all encoders one embed_dim",
        )
    for name, shape in shapes.items():
        if embed_dim is not None and shape[-1] != embed_dim:
            raise LossError(f"embeddings of '{name}' are {shape[-1]} wide, the loss was made for {embed_dim}")
        if present is not None and (name not in present or tuple(present[name].shape) != shape[:1]):
            raise LossError(f"presence of '{name}' is missing or not of shape ({shape[0]},)")


def check_views(embeddings: Embeddings) -> int:
    """How many views there are, where some modalities may have one that they lend to all.

    Raises:
        LossError: If modalities have unequal numbers of them.
    """
    counts = {name: rows.shape[1] if rows.ndim == 3 else 1 for name, rows in embeddings.items()}
    views = max(counts.values())
    if set(counts.values()) - {1, views}:
        raise LossError(f"unequal numbers of views: {counts}", fix="give all modalities the same number, or one")
    return views


def check_finite(gathered: Gathered, names: Sequence[str]) -> None:
    """Refuse NaN and infinity in the rows of any rank, on every rank, so that none waits for another.

    Rows of absent samples too: they are in no term, but a zero gradient times infinity would be NaN in their encoder.

    Args:
        gathered: What the ranks know of each other's rows.
        names: The modalities that came, of which a message speaks first; others were made from them.

    Raises:
        LossError: Naming the modalities.
    """
    refuse_not_finite({name: gathered.not_finite[name] for name in names})
    refuse_not_finite(gathered.not_finite)


def refuse_not_finite(bad: Mapping[str, int]) -> None:
    """Refuse a batch with so many bad rows per modality, if there are any.

    Raises:
        LossError: Naming the modalities.
    """
    if found := [f"'{name}' in {count} samples" for name, count in bad.items() if count]:
        raise LossError(
            f"embeddings hold NaN or infinity: {', '.join(found)}",
            fix="look for bad values in the data, or lower the learning rate",
        )
