"""Views: several draws of a transform, multi-crop, and what the encoder does with them."""

from __future__ import annotations

import json
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from mmrep.batch import Input
from mmrep.data.collate import Collate, Sample
from mmrep.encoders import ConvImageEncoder, Encoder, FeaturesEncoder, MelAudioEncoder, NgramTextEncoder
from mmrep.encoders.batch_norm import GatheredBatchNorm
from mmrep.encoders.crops import Crop
from mmrep.errors import ConfigError
from mmrep.losses import ClusterSwapLoss
from mmrep.model import MultimodalModel

PICTURE = Image.fromarray((np.random.default_rng(0).random((40, 30, 3)) * 255).astype(np.uint8))
CROPS = [Crop(2, 16, (0.5, 1.0)), Crop(3, 8, (0.1, 0.5))]


def multi_crop(**options: Any) -> ConvImageEncoder:
    return ConvImageEncoder(6, image_size=16, width=8, crops=CROPS, **options)


def as_list(value: Input) -> list[Tensor]:
    assert isinstance(value, list)
    return value


def test_multi_crop_gives_a_tensor_per_resolution_in_training_and_one_picture_in_evaluation() -> None:
    encoder = multi_crop()
    views = as_list(pickle.loads(pickle.dumps(encoder.preprocess(True)))(PICTURE))
    assert [tuple(v.shape) for v in views] == [(2, 3, 16, 16), (3, 3, 8, 8)] and views[0].dtype == torch.uint8
    assert not torch.equal(views[0][0], views[0][1])  # random
    blanks = as_list(encoder.blank(True))
    assert [b.shape for b in blanks] == [v.shape for v in views] and not any(bool(b.any()) for b in blanks)
    assert encoder.preprocess(False)(PICTURE).shape == (3, 16, 16)  # type: ignore[union-attr]  # a tensor there
    assert encoder.blank(False).shape == (3, 16, 16)  # type: ignore[union-attr]  # a tensor there


def test_a_batch_of_crops_with_an_absent_picture() -> None:
    encoder = multi_crop()
    whole = Sample("a", {"image": encoder.preprocess(True)(PICTURE)})
    batch = Collate({"image": encoder.blank(True)}, [])([whole, Sample("b"), whole])
    assert [tuple(v.shape) for v in as_list(batch.inputs["image"])] == [(3, 2, 3, 16, 16), (3, 3, 3, 8, 8)]
    assert batch.present["image"].tolist() == [True, False, True]
    loss = ClusterSwapLoss(modalities=["image"], embed_dim=6, num_prototypes=4)
    rows = MultimodalModel({"image": encoder}, loss)(batch.inputs)["image"]
    assert rows.shape == (3, 5, 6) and torch.allclose(rows.norm(dim=2), torch.ones(3, 5))


def test_the_backbone_runs_once_per_resolution_and_the_head_once() -> None:
    encoder = multi_crop(head_width=10, batch_norm=True)
    calls: list[tuple[str, int]] = []
    encoder.backbone.register_forward_hook(lambda _m, inputs, _o: calls.append(("backbone", len(inputs[0]))))
    encoder.head.register_forward_hook(lambda _m, inputs, _o: calls.append(("head", len(inputs[0]))))
    views = [torch.stack([view] * 4) for view in as_list(encoder.preprocess(True)(PICTURE))]
    assert encoder(views).shape == (4, 5, 6)
    assert calls == [("backbone", 8), ("backbone", 12), ("head", 20)]


def test_views_equal_the_same_pictures_one_by_one() -> None:
    encoder = multi_crop(head_width=10).eval()
    views = [torch.stack([view, view.flip(0)]) for view in as_list(encoder.preprocess(True)(PICTURE))]
    together = encoder(views)
    for sample in range(2):
        singles = [encoder(view[sample]) for view in views]
        assert torch.allclose(together[sample], torch.cat(singles), atol=1e-6)


ENCODERS: dict[str, tuple[Any, Any]] = {
    "image": (lambda **o: ConvImageEncoder(6, image_size=16, width=8, **o), PICTURE),
    "text": (lambda **o: NgramTextEncoder(6, width=8, buckets=99, length=40, drop=0.3, **o), "a grinning cat face"),
    "audio": (
        lambda **o: MelAudioEncoder(6, seconds=0.2, width=8, random_window=True, **o),
        (np.sin(np.arange(9000) ** 1.5).astype(np.float32), 16000),
    ),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_views_of_any_encoder_are_independent_draws(name: str) -> None:
    make, raw = ENCODERS[name]
    encoder: Encoder = make(views=3)
    (views,) = as_list(encoder.preprocess(True)(raw))
    (blank,) = as_list(encoder.blank(True))
    assert views.shape == blank.shape and len(views) == 3
    assert not torch.equal(views[0], views[1]) and not torch.equal(views[1], views[2])
    assert encoder([views[None]]).shape == (1, 3, 6)
    assert torch.equal(make().preprocess(False)(raw), encoder.preprocess(False)(raw))  # evaluation is as ever


@pytest.mark.parametrize(
    "encoder",
    [
        multi_crop(head_width=7, batch_norm=True),
        NgramTextEncoder(6, width=8, buckets=99, drop=0.2, views=2),
        MelAudioEncoder(6, seconds=0.2, width=8, random_window=True, head_width=5),
        FeaturesEncoder(6, size=3, views=2),
    ],
    ids=lambda encoder: type(encoder).__name__,
)
def test_settings_are_plain_and_rebuild_it(encoder: Encoder) -> None:
    again = type(encoder)(6, **json.loads(json.dumps(encoder.settings)))
    again.load_state_dict(encoder.state_dict())
    assert again.settings == encoder.settings and again.views == encoder.views
    if isinstance(encoder, ConvImageEncoder) and isinstance(again, ConvImageEncoder):
        assert again.crops == CROPS


def test_a_head_with_a_hidden_layer() -> None:
    plain, normed = FeaturesEncoder(6, size=3, head_width=9), FeaturesEncoder(6, size=3, head_width=9, batch_norm=True)
    assert [type(layer) for layer in plain.head] == [nn.Linear, nn.LayerNorm, nn.ReLU, nn.Linear]  # type: ignore[arg-type]  # a Sequential
    assert [type(layer) for layer in normed.head] == [nn.Linear, GatheredBatchNorm, nn.ReLU, nn.Linear]  # type: ignore[arg-type]  # a Sequential


def test_a_random_window_stays_inside_the_clip() -> None:
    ramp = np.linspace(0, 0.5, 16000, dtype=np.float32)
    transform = MelAudioEncoder(4, seconds=0.25, augment=False, random_window=True).transform(True)
    starts = {int(transform((ramp, 16000))[0]) for _ in range(40)}
    assert len(starts) > 20 and min(starts) < 3000 and max(starts) > 9000
    fixed = MelAudioEncoder(4, seconds=0.25, augment=False, random_window=True).transform(False)
    assert int(fixed((ramp, 16000))[0]) == 0


def test_dropping_ngrams_keeps_the_share_and_never_all() -> None:
    text = "a grinning face with big eyes and a very wide smile"
    whole = int((NgramTextEncoder(4).transform(False)(text) > 0).sum())
    dropping = NgramTextEncoder(4, drop=0.25).transform(True)
    kept = [int((dropping(text) > 0).sum()) for _ in range(60)]
    assert 0.7 < np.mean(kept) / whole < 0.8
    assert all(int((NgramTextEncoder(4, drop=0.99).transform(True)("x") > 0).sum()) >= 1 for _ in range(20))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Crop(0, 16), "count and size"),
        (lambda: Crop(2, 16, (0.9, 0.3)), "the smaller first"),
        (lambda: ConvImageEncoder(6, crops=[Crop(2, 16)], views=2), "give one of them"),
        (lambda: FeaturesEncoder(6, views=0), "views=0"),
        (lambda: NgramTextEncoder(6, drop=1.0), "drop=1.0"),
    ],
)
def test_impossible_settings_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_misspelt_setting_is_not_swallowed() -> None:
    with pytest.raises(TypeError, match="imagesize"):
        ConvImageEncoder(6, imagesize=16)
