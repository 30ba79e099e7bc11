"""`Position`: the place of a training run in its stream, small enough for every checkpoint."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from mmrep.data.plan import PLAN_VERSION
from mmrep.errors import CheckpointError


@dataclass(frozen=True)
class Position:
    """The batch that comes next, and everything that its contents depend on.

    Attributes:
        epoch, batch: Of the next global batch.
        settings: What decides on the order: setting -> plain value. Ranks and workers are not among them.
        plan_version: Of the rule that makes the order.
    """

    epoch: int
    batch: int
    settings: dict[str, Any] = field(default_factory=dict)
    plan_version: int = PLAN_VERSION

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> Position:
        """What `to_dict` gave.

        Raises:
            CheckpointError: If it is something else.
        """
        try:
            return cls(int(state["epoch"]), int(state["batch"]), dict(state["settings"]), int(state["plan_version"]))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                "the checkpoint has no place in the stream", fix="it is of another version"
            ) from error

    def check(self, now: Position) -> None:
        """Refuse to go on under settings that give another order.

        Raises:
            CheckpointError: That names the settings.
        """
        if self.plan_version != now.plan_version:
            raise CheckpointError(
                f"the checkpoint's order is of rule {self.plan_version}, this version has {now.plan_version}",
                fix="go on with the version of mmrep that wrote it",
            )
        different = [name for name, value in now.settings.items() if self.settings.get(name) != value]
        if different:
            lines = "; ".join(
                f"{name} was {_short(self.settings.get(name))}, is {_short(now.settings[name])}" for name in different
            )
            raise CheckpointError(
                f"the run cannot go on where it stood: {lines}",
                fix="give the run's own values (its config.yaml), or train anew under another --name",
            )


def _short(value: Any) -> str:
    """A setting in a message: of datasets the beginnings of their fingerprints."""
    if isinstance(value, list):
        return ", ".join(f"shards {entry[0][:12]} with weight {entry[1]:g}" for entry in value)
    return str(value)
