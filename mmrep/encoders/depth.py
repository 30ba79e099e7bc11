"""A tower's parameters by depth, from its input to its output, for learning rates that decay towards the input."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from torch import nn

from mmrep.encoders.layers import layers_by_blocks

PROJECTIONS = ("proj", "text_projection")
"""Parameters that open_clip's towers hold themselves, beside those of their input, and that belong to the output."""


def tower_layers(tower: nn.Module) -> list[list[nn.Parameter]]:
    """A transformer's embeddings, each of its blocks, and what follows them; timm's networks as timm groups them.

    Args:
        tower: Of open_clip or timm.
    """
    trunk = getattr(tower, "trunk", tower)
    if hasattr(trunk, "group_matcher"):
        return _timm_layers(tower, trunk)
    last = [parameter for name, parameter in tower.named_parameters(recurse=False) if name in PROJECTIONS]
    moved = {id(parameter) for parameter in last}
    groups = [[p for p in group if id(p) not in moved] for group in layers_by_blocks(tower)]
    groups[-1] += last
    return [group for group in groups if group]


def _timm_layers(tower: nn.Module, trunk: nn.Module) -> list[list[nn.Parameter]]:
    from timm.models import group_parameters

    matcher: Any = trunk.group_matcher  # a method of timm's models
    depth = group_parameters(trunk, matcher(coarse=False), reverse=True)
    own = dict(trunk.named_parameters())
    ordered = sorted((name for name in own if name in depth), key=lambda name: depth[name])
    groups = [[own[name] for name in names] for _, names in groupby(ordered, key=lambda name: depth[name])]
    inside = {id(parameter) for group in groups for parameter in group}
    rest = [parameter for parameter in tower.parameters() if id(parameter) not in inside]
    return [*groups, rest] if rest else groups
