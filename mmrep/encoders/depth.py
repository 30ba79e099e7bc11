"""A tower's parameters by depth, from its input to its output, for learning rates that decay towards the input."""

from __future__ import annotations

import re
from itertools import groupby
from typing import Any

from torch import nn

STEM = re.compile(r"embed|conv1|patch|cls_token|class|stem|ln_pre|norm_pre|bn1|bn2|bn3|conv2|conv3")
"""In the names of what stands before the blocks: embeddings and first convolutions."""


def tower_layers(tower: nn.Module) -> list[list[nn.Parameter]]:
    """A transformer's embeddings, each of its blocks, and what follows them; timm's towers as timm groups them.

    Args:
        tower: Of open_clip, timm or Hugging Face. One whose blocks are not found is one group.
    """
    trunk = getattr(tower, "trunk", tower)
    if hasattr(trunk, "group_matcher"):
        return _timm_layers(tower, trunk)
    blocks = _blocks(tower)
    if blocks is None:
        return [list(tower.parameters())]
    prefix, stack = blocks
    outside = [(name, p) for name, p in tower.named_parameters() if not name.startswith(f"{prefix}.")]
    before = [p for name, p in outside if STEM.search(name)]
    after = [p for name, p in outside if not STEM.search(name)]
    return [group for group in (before, *(list(block.parameters()) for block in stack), after) if group]


def _blocks(tower: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """The list of blocks, if one holds most parameters outside the embeddings."""
    lists = [
        (name, module)
        for name, module in tower.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 1
    ]
    if not lists:
        return None
    return max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))


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
