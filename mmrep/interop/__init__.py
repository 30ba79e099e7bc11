"""Models in and out: run folders, model folders, Lightning checkpoints, the hub, open_clip."""

from mmrep.interop.load import load
from mmrep.interop.open_clip import export_open_clip, from_open_clip

__all__ = ["export_open_clip", "from_open_clip", "load"]
