"""Towers by depth: embeddings first, each block for itself, the projection last, every parameter once."""

from __future__ import annotations

import re

import pytest
from torch import nn

from mmrep.encoders.layers import tower_layers
from mmrep.encoders.open_clip import image_tower, text_tower
from tests.interop.open_clip_models import NATIVE, TIMM


def names_by_layer(tower: nn.Module) -> list[set[str]]:
    names = {id(parameter): name for name, parameter in tower.named_parameters()}
    layers = tower_layers(tower)
    assert sum(map(len, layers)) == len(names), "each once"
    return [{names[id(parameter)] for parameter in layer} for layer in layers]


@pytest.mark.parametrize(
    ("tower", "blocks", "first", "last"),
    [
        (lambda: image_tower(NATIVE), 2, {"conv1.weight", "class_embedding", "positional_embedding"}, {"proj"}),
        (lambda: text_tower(NATIVE, {}), 2, {"token_embedding.weight"}, {"text_projection"}),
        (lambda: image_tower(TIMM), 6, {"trunk.pos_embed", "trunk.cls_token"}, {"head.proj.weight"}),
    ],
)
def test_blocks_are_layers_between_embeddings_and_projection(
    tower: object, blocks: int, first: set[str], last: set[str]
) -> None:
    layers = names_by_layer(tower())  # type: ignore[operator]  # a parametrised constructor
    assert first <= layers[0] and last <= layers[-1]
    numbered = [{m[1] for name in layer if (m := re.search(r"blocks\.(\d+)\.", name))} for layer in layers]
    inner = [numbers for numbers in numbered if numbers]
    assert inner == [{str(number)} for number in range(blocks)], "one block a layer, in order"
