"""In parts a batch has the gradient of the whole batch: for every loss, with dropout, holes and several ranks."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import spectral_norm

from mmrep.batch import Batch, Input
from mmrep.data.dataset import ShardDataset, make_loader
from mmrep.data.index import Index
from mmrep.data.reader import Samples
from mmrep.encoders import (
    ConvImageEncoder,
    Encoder,
    FeaturesEncoder,
    MelAudioEncoder,
    NgramTextEncoder,
    OpenClipImageEncoder,
    TorchvisionImageEncoder,
)
from mmrep.errors import ConfigError
from mmrep.losses import Loss, PairwiseCLIPLoss
from mmrep.model import MultimodalModel
from mmrep.modules import ContrastiveModule, PairwiseCLIP, SwAV
from mmrep.modules.gradient_caching import GradientCaching, refuse_changing_state, split
from tests.gloo_pool import GlooPool
from tests.interop.open_clip_models import NATIVE
from tests.losses.cases import DIM, LOSSES, NAMES, VIEWS, WITH_VIEWS, N
from tests.memory import peak_allocated
from tests.modules.test_modules import ENCODERS, MODULES

SIZES = (16, 4, 3, 7)  # one part, two, three of which the last is short, two with a single sample
Run = Callable[[Encoder, Input], Tensor]


class Dropping(FeaturesEncoder):
    """A perceptron with dropout, so that a sample's row depends on the random numbers of its part."""

    def features(self, inputs: Tensor) -> Tensor:
        return F.dropout(super().features(inputs), 0.3, self.training)


DROPPING: dict[str, Any] = {
    "image": lambda d: OpenClipImageEncoder(
        d, {**NATIVE, "vision_cfg": {**NATIVE["vision_cfg"], "patch_dropout": 0.5}}
    ),
    "text": lambda d: NgramTextEncoder(d, width=16, buckets=99, length=32),
    "audio": lambda d: MelAudioEncoder(d, seconds=0.2, width=8, augment=True),
}
CASES = {**MODULES, "patch dropout": (PairwiseCLIP, DROPPING, {})}


@functools.cache
def batches(name: str, shards: Path) -> list[Batch]:
    """Two training batches of the tiny shards, with their holes, as the module's encoders take them."""
    encoders = {modality: make(8) for modality, make in CASES[name][1].items()}
    dataset = ShardDataset(Samples(Index.load(shards), "train"), encoders, global_batch_size=N, train=True)
    return list(itertools.islice(iter(make_loader(dataset, encoders)), 2))


def module(name: str, dtype: torch.dtype = torch.float64) -> ContrastiveModule:
    torch.manual_seed(2)
    module_class, encoders, options = CASES[name]
    made: ContrastiveModule = module_class(encoders, embed_dim=8, **options)
    return made.to(dtype)


def plain_parts(size: int) -> Run:
    """One ordinary graph over the same parts."""

    def run(encoder: Encoder, inputs: Input) -> Tensor:
        starts = range(0, len(inputs if isinstance(inputs, Tensor) else inputs[0]), size)

        def part(start: int) -> Input:
            if isinstance(inputs, Tensor):
                return inputs[start : start + size]
            return [views[start : start + size] for views in inputs]

        return torch.cat([encoder(part(start)) for start in starts])

    return run


def gradients(trained: ContrastiveModule, steps: list[Batch], run: Run | None) -> dict[str, Tensor]:
    """After several steps, so that queues fill: all gradients, buffers, the loss, and the state of the random numbers."""
    trained = copy.deepcopy(trained)
    torch.manual_seed(7)
    for batch in steps:
        trained.zero_grad()
        rows = trained.model(batch.inputs, run)
        loss = trained.model.loss(rows, {name: batch.present[name] for name in rows}).loss
        loss.backward()
    found = {name: weight.grad for name, weight in trained.named_parameters() if weight.grad is not None}
    buffers = {f"buffer {name}": buffer.double() for name, buffer in trained.named_buffers()}
    return {**found, **buffers, "loss": loss.detach(), "next random numbers": torch.rand(3)}


def assert_equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor], tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        error = float((tensor - other[name]).norm() / tensor.norm().clamp(min=1e-3))
        assert error <= tolerance, f"{name} is off by {error:.1e}"


@pytest.mark.parametrize("name", CASES)
def test_equals_one_graph_over_the_same_parts(name: str, tiny_shards: Path) -> None:
    """Masks and dropped patches are drawn once, and replayed."""
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        trained, steps = module(name, dtype), batches(name, tiny_shards)
        for size in SIZES if dtype == torch.float64 else (4,):
            expected = gradients(trained, steps, plain_parts(size))
            assert_equal(expected, gradients(trained, steps, GradientCaching(size)), tolerance)
        for kept in (1, 99):
            assert_equal(expected, gradients(trained, steps, GradientCaching(size, kept)), tolerance)


def accumulated(trained: ContrastiveModule, batch: Batch, size: int) -> dict[str, Tensor]:
    """As open_clip's ``--accum-freq k``: the loss is evaluated for each part, with gradients to its rows alone, and all k
    losses are added up."""
    trained.zero_grad()
    present = {name: batch.present[name] for name in trained.model.modalities}
    with torch.no_grad():
        cached = trained.model(batch.inputs, plain_parts(size))
    for start in range(0, N, size):
        inputs = {name: split(value, size)[start // size] for name, value in batch.inputs.items()}
        own = trained.model(inputs)
        rows = {name: torch.cat([r[:start], own[name], r[start + size :]]) for name, r in cached.items()}
        trained.model.loss(rows, present).loss.backward()
    return {name: weight.grad for name, weight in trained.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize(("name", "own"), [("clip", "model.loss.logit_scale"), ("cross-modal swav", "model.loss.bank")])
def test_adding_up_the_loss_of_each_part_multiplies_the_gradients_of_its_parameters(
    name: str, own: str, tiny_shards: Path
) -> None:
    """The encoders' are right there, and the scale's and the prototypes' k times too large; here both are right."""
    trained, (batch, _) = module(name), batches(name, tiny_shards)
    for encoder in trained.model.encoders.values():
        encoder.augment = False
    expected = gradients(trained, [batch], None)
    ours, theirs = gradients(trained, [batch], GradientCaching(2)), accumulated(trained, batch, 2)
    of_loss = [key for key in theirs if key.startswith(own)]
    assert of_loss and len(of_loss) < len(theirs)
    for key, gradient in theirs.items():
        factor = N / 2 if key in of_loss else 1
        assert torch.allclose(gradient, factor * expected[key], rtol=1e-9, atol=1e-12), key
        assert torch.allclose(ours[key], expected[key], rtol=1e-9, atol=1e-12), key


class Objective(nn.Module):
    """A model and its loss, as DDP wraps a LightningModule; in parts, or not."""

    def __init__(self, loss: Loss, size: int | None) -> None:
        super().__init__()
        encoders = {name: FeaturesEncoder(DIM, size=5, width=8) for name in loss.modalities or NAMES}
        self.model = MultimodalModel(encoders, loss)
        self.caching = None if size is None else GradientCaching(size)

    def forward(self, inputs: dict[str, Input], present: dict[str, Tensor]) -> Tensor:
        rows = self.model(inputs, self.caching)
        found: Tensor = self.model.loss(rows, {name: present[name] for name in rows}).loss
        return found


def objective_gradients(
    name: str, size: int | None, inputs: dict[str, Tensor], present: dict[str, Tensor], distributed: bool
) -> tuple[dict[str, Tensor], int]:
    """Gradients in float64 after two steps, and how often DDP reduced a bucket of them in the last."""
    torch.manual_seed(3)
    objective = Objective(LOSSES[name](), size).double()
    reductions: list[int] = []
    wrapped: Any = objective
    if distributed:
        wrapped = DistributedDataParallel(objective, broadcast_buffers=False)
        # DDP reads annotations, and knows none that are text.
        wrapped.register_comm_hook(None, lambda _, bucket: reductions.append(1) or allreduce_hook(None, bucket))
    views: dict[str, Input] = {
        key: [value.double()] if name.startswith(WITH_VIEWS) else value[:, 0].double() for key, value in inputs.items()
    }
    for _ in range(2):
        objective.zero_grad()
        reductions.clear()
        loss = wrapped(views, present)
        loss.backward()
    found = {key: weight.grad for key, weight in objective.named_parameters() if weight.grad is not None}
    return {**found, "loss": loss.detach()}, len(reductions)


def samples() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    present = {name: torch.ones(N, dtype=torch.bool) for name in NAMES}
    present["c"][:2] = present["a"][5] = False  # a whole part of one modality, a sample of another
    return {name: torch.randn(N, VIEWS, 5, generator=generator) for name in NAMES}, present


@pytest.mark.parametrize("name", LOSSES)
def test_equals_the_whole_batch(name: str) -> None:
    inputs, present = samples()
    expected, _ = objective_gradients(name, None, inputs, present, False)
    for size in SIZES:
        assert_equal(expected, objective_gradients(name, size, inputs, present, False)[0], 1e-12)


@pytest.mark.parametrize("sizes", [(4, 4), (6, 2), (8, 0), (2, 5, 1)])
def test_on_several_ranks_equals_one_process_and_reduces_once(
    sizes: tuple[int, ...], request: pytest.FixtureRequest
) -> None:
    """Ranks of other sizes have other numbers of parts; the last that has samples lacks a modality."""
    pool: GlooPool = request.getfixturevalue(f"pool{len(sizes)}")
    inputs, present = samples()
    present["b"][N - [size for size in sizes if size][-1] : N if sizes[-1] else 0] = False
    shares = [
        [{k: v.split(list(sizes))[r] for k, v in t.items()} for t in (inputs, present)] for r in range(len(sizes))
    ]
    for name in LOSSES:
        expected, _ = objective_gradients(name, None, inputs, present, False)
        results = pool.run(objective_gradients, [(name, 2, *share, True) for share in shares])
        mean = torch.stack([found.pop("loss") for found, _ in results]).mean()
        assert float(mean) == pytest.approx(float(expected.pop("loss")), rel=1e-5)
        for found, reductions in results:
            assert_equal(expected, found, 1e-9)
            assert reductions == 1, "one bucket, once"


def test_parts_that_are_all_absent_change_nothing(tiny_shards: Path) -> None:
    trained, (batch, _) = module("clip"), batches("clip", tiny_shards)
    batch = copy.deepcopy(batch)
    batch.present["text"][4:8] = False
    for absent in ("text", None):
        if absent is None:
            batch.present["audio"][:] = False  # on all of this process's samples
        expected = gradients(trained, [batch], plain_parts(4))
        assert_equal(expected, gradients(trained, [batch], GradientCaching(4)), 1e-12)


def test_a_shared_encoder_adds_up_both_uses() -> None:
    torch.manual_seed(0)
    model = MultimodalModel({"a": Dropping(4, size=3)}, PairwiseCLIPLoss(), share={"b": "a"}).double()
    inputs: dict[str, Input] = {"a": torch.randn(7, 3).double(), "b": torch.randn(7, 3).double()}
    found = []
    for run in (plain_parts(3), GradientCaching(3)):
        model.zero_grad()
        torch.manual_seed(1)
        model.loss(model(inputs, run)).loss.backward()
        found.append(
            {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
        )
    assert_equal(found[0], found[1], 1e-12)


def test_memory_is_that_of_one_part() -> None:
    encoder = FeaturesEncoder(8, size=64, width=64, layers=12)
    inputs = torch.randn(2048, 64)

    def peak(run: Run) -> int:
        return peak_allocated(lambda: run(encoder, inputs).square().mean().backward())

    whole = peak(plain_parts(2048))
    activations = 2048 * 64 * 4 * (12 * 3)  # each layer keeps what the next three operations read
    assert whole > 0.9 * activations
    weights = sum(weight.numel() * 4 for weight in encoder.parameters())
    assert peak(plain_parts(256)) > 0.9 * activations, "parts alone save nothing"
    eighth = peak(GradientCaching(256))
    assert eighth < 0.16 * whole + 2 * weights
    assert eighth < peak(GradientCaching(256, kept=4)) < 0.7 * whole


def passes(encoder: Encoder, run: Run, inputs: Tensor) -> int:
    """How many samples its backbone sees in a step."""
    seen: list[int] = []
    hook = encoder.backbone.register_forward_pre_hook(lambda _m, arguments: seen.append(len(arguments[0])))
    run(encoder, inputs).sum().backward()
    hook.remove()
    return sum(seen)


def test_only_what_saves_memory_is_computed_again() -> None:
    encoder, inputs = FeaturesEncoder(8, size=6), torch.randn(10, 6)
    assert passes(encoder, GradientCaching(3), inputs) == 20 and passes(encoder, GradientCaching(10), inputs) == 10
    assert passes(encoder, GradientCaching(3, kept=2), inputs) == 16  # the parts of 3 and 1 at the end are kept
    encoder.backbone.requires_grad_(False)
    assert passes(encoder, GradientCaching(3), inputs) == 10, "a frozen backbone keeps nothing"
    with torch.no_grad():
        assert GradientCaching(3)(encoder, inputs).shape == (10, 8)
    assert GradientCaching(3)(encoder, inputs[:0]).shape == (0, 8)


class Odd(FeaturesEncoder):
    """A perceptron with one more layer."""

    def __init__(self, embed_dim: int, layer: Callable[[], nn.Module]) -> None:
        super().__init__(embed_dim, size=4, width=8)
        self.backbone.append(layer())


class Pool(nn.Module):
    """A layer of a user's own that takes the mean of the batch away."""

    mixes_samples = True

    def forward(self, rows: Tensor) -> Tensor:
        return rows - rows.mean(dim=0)


class Queue(nn.Module):
    """A layer that remembers what it saw."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(8))

    def forward(self, rows: Tensor) -> Tensor:
        if self.training:
            self.seen += rows.detach().mean(dim=0)
        return rows


def with_layer(layer: Callable[[], nn.Module], **options: Any) -> PairwiseCLIP:
    encoders: dict[str, Any] = {"ecg": lambda d: Odd(d, layer), "labs": lambda d: FeaturesEncoder(d, size=4)}
    return PairwiseCLIP(encoders, embed_dim=8, micro_batch_size=4, **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: with_layer(lambda: nn.BatchNorm1d(8)), r"BatchNorm1d mixes.*\[ecg\.backbone\.4\]; freeze it"),
        (lambda: with_layer(lambda: nn.SyncBatchNorm(8)), r"SyncBatchNorm mixes .*ecg\.backbone\.4"),
        (lambda: with_layer(lambda: nn.InstanceNorm1d(8, track_running_stats=True)), "InstanceNorm1d mixes"),
        (lambda: with_layer(lambda: nn.BatchNorm1d(8, track_running_stats=False, affine=False)), "BatchNorm1d mixes"),
        (lambda: with_layer(Pool), r"Pool mixes the samples of a batch.*\[ecg\.backbone\.4\]"),
        (
            lambda: PairwiseCLIP(
                {**ENCODERS, "image": lambda d: ConvImageEncoder(d, 16, 8, batch_norm=True)}, micro_batch_size=2
            ),
            r"GatheredBatchNorm mixes.*\[image\.head\.0\]; leave batch_norm of the encoder 'image' out",
        ),
        (
            lambda: PairwiseCLIP({**ENCODERS, "image": TorchvisionImageEncoder}, micro_batch_size=2),
            r"BatchNorm2d mixes.*\[image\.backbone\.bn1\].*freeze: \['image\.backbone\.bn1'\]",
        ),
        (lambda: PairwiseCLIP(ENCODERS, micro_batch_size=0), "micro_batch_size=0 must be at least 1"),
        (lambda: PairwiseCLIP(ENCODERS, micro_batch_size=2, kept_micro_batches=-1), "kept_micro_batches=-1"),
        (lambda: PairwiseCLIP(ENCODERS, kept_micro_batches=1), "without parts; set model.init_args.micro_batch_size"),
    ],
)
def test_what_cannot_go_in_parts_is_refused_at_construction(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_frozen_batch_norm_goes_in_parts(tiny_shards: Path) -> None:
    encoders: dict[str, Any] = {**ENCODERS, "image": TorchvisionImageEncoder}
    locked = PairwiseCLIP(encoders, embed_dim=8, freeze=["image.backbone"], micro_batch_size=2)
    refuse_changing_state(locked.model)
    with_layer(lambda: nn.BatchNorm1d(8), freeze=["ecg.backbone"])
    with_layer(lambda: nn.InstanceNorm1d(8))


@pytest.mark.parametrize(
    ("layer", "buffer"), [(Queue, "seen"), (lambda: spectral_norm(nn.Linear(8, 8)), "parametrizations.weight.0._u")]
)
def test_what_a_pass_changes_is_refused_before_the_first_step(layer: Callable[[], nn.Module], buffer: str) -> None:
    """And is left as it was."""
    trained = with_layer(layer)
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    random = torch.get_rng_state()
    with pytest.raises(ConfigError, match=rf"a forward pass changes this buffer.*\[ecg\.backbone\.4\.{buffer}\]"):
        refuse_changing_state(trained.model)
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())


def test_all_modules_of_the_tests_go_in_parts() -> None:
    for name in MODULES:
        refuse_changing_state(module(name, torch.float32).model)
    refuse_changing_state(MultimodalModel({"a": FeaturesEncoder(4, size=3)}, PairwiseCLIPLoss()).bfloat16())


@contextmanager
def shared_casts() -> Iterator[None]:
    """As it would be if autocast's copies of weights lived on from part to part."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "clear_autocast_cache", lambda: None)
        yield


def test_gradients_of_parts_add_up_in_fp32_under_bf16() -> None:
    torch.manual_seed(0)
    encoder, inputs = FeaturesEncoder(16, size=32, width=64), torch.randn(256, 32)
    weights = [weight for weight in encoder.parameters() if weight.ndim > 1]

    def found(run: Run) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            rows = run(encoder, inputs).float()
        return list(torch.autograd.grad(rows.square().sum(), weights))

    each = [found(lambda e, x, n=n: e(x[4 * n : 4 * n + 4])) for n in range(64)]  # type: ignore[misc]
    expected = [
        torch.stack([gradient.double() for gradient in of_weight]).sum(0) for of_weight in zip(*each, strict=True)
    ]

    def error(gradients: list[Tensor]) -> float:
        return max(float((g - e).norm() / e.norm()) for g, e in zip(gradients, expected, strict=True))

    assert error(found(GradientCaching(4))) < 1e-6
    with shared_casts():
        assert error(found(GradientCaching(4))) > 1e-3, "the check can fail"


def test_validation_goes_in_parts(tiny_shards: Path) -> None:
    trained, (batch, _) = PairwiseCLIP(ENCODERS, embed_dim=8, micro_batch_size=3).eval(), batches("clip", tiny_shards)
    sizes: list[int] = []
    trained.model.encoders["text"].register_forward_pre_hook(lambda _m, arguments: sizes.append(len(arguments[0])))
    with torch.no_grad():
        rows = trained(batch)
        assert sizes == [3, 3, 2]
        for name, expected in trained.model(batch.inputs).items():
            assert torch.allclose(rows[name], expected, atol=1e-5), name


def test_swav_of_multi_crop_goes_in_parts_of_samples() -> None:
    views: Input = [torch.arange(5)[:, None].expand(5, 2), torch.arange(5)[:, None].expand(5, 3)]
    parts = split(views, 2)
    assert [[tuple(view.shape) for view in part] for part in parts] == [
        [(2, 2), (2, 3)],
        [(2, 2), (2, 3)],
        [(1, 2), (1, 3)],
    ]
    assert SwAV(MODULES["swav"][1], num_prototypes=12, embed_dim=8, micro_batch_size=2).caching == GradientCaching(2)
