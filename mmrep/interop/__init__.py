"""Models in and out: run folders, model folders, Lightning checkpoints."""

from mmrep.interop.load import load

__all__ = ["load"]
