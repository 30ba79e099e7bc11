"""A network's parameters by depth, from its input to its output, for learning rates that decay towards the input."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

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


def layers_by_blocks(network: nn.Module) -> list[list[nn.Parameter]]:
    """A network's parameters in groups from input to output, as its modules are registered.

    Each entry of the outermost sequences (``nn.Sequential``, ``nn.ModuleList``) is a block and a group of its own; what lies
    before, between or behind them is a group each.

    Args:
        network: Of any library, as long as it registers its modules in the order of use, as all common ones do.

    Returns:
        Groups that together hold each parameter once.
    """
    groups = [list(network.parameters(recurse=False))]  # positions and class tokens belong to the input
    after_block = False
    for part, is_block in _parts(network):
        if is_block or after_block:
            groups.append([])
        groups[-1] += part.parameters()
        after_block = is_block
    return _each_once(groups)


def _parts(module: nn.Module) -> Iterator[tuple[nn.Module, bool]]:
    """The blocks of a module, and what is not in one, in order."""
    for child in module.children():
        if is_sequence(child):
            yield from ((block, True) for block in child.children() if any(True for _ in block.parameters()))
        elif any(is_sequence(inner) for inner in child.modules()):
            yield nn.ParameterList(child.parameters(recurse=False)), False
            yield from _parts(child)
        else:
            yield child, False


def is_sequence(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential | nn.ModuleList) and not isinstance(module, ParametrizationList)


def _each_once(groups: list[list[nn.Parameter]]) -> list[list[nn.Parameter]]:
    """Without empty groups, and a tied parameter only where it comes first."""
    seen: set[int] = set()
    result = []
    for group in groups:
        fresh = [parameter for parameter in group if id(parameter) not in seen]
        seen.update(map(id, fresh))
        result += [fresh] if fresh else []
    return result
