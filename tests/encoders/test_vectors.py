"""Series, tables and precomputed features: arithmetic by hand, values that are missing, sizes that do not fit."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mmrep.encoders import Encoder, FeaturesEncoder, SeriesEncoder, TabularEncoder
from mmrep.encoders.tabular import column_quantiles, column_statistics
from mmrep.errors import ConfigError, DataError
from mmrep.losses import PairwiseCLIPLoss
from mmrep.model import MultimodalModel

ROWS = np.array([[1.0, 10.0, 5.0], [3.0, np.nan, 5.0], [5.0, 30.0, 5.0]])
ECG = np.random.default_rng(0).normal(size=(2, 120)).cumsum(axis=1)

MAKE: dict[str, tuple[Callable[[], Encoder], np.ndarray]] = {
    "series": (lambda: SeriesEncoder(6, channels=2, length=100, width=8, stages=2), ECG),
    "given": (lambda: SeriesEncoder(6, 2, 150, width=8, stages=2, mean=[0.0, 1.0], std=[1.0, 2.0]), ECG),
    "tabular": (lambda: TabularEncoder(6, size=3, width=8, **column_statistics(ROWS)), ROWS[1]),
    "quantiles": (lambda: TabularEncoder(6, size=3, width=8, **column_quantiles(ROWS, 4)), ROWS[1]),
    "features": (lambda: FeaturesEncoder(6, size=3, layers=2, width=8), ROWS[0]),
    "vectors": (lambda: FeaturesEncoder(6, size=3, layers=0, unit_length=True), ROWS[0]),
}


@pytest.mark.parametrize("name", MAKE)
def test_contract(name: str) -> None:
    make, raw = MAKE[name]
    encoder = make().eval()
    row, blank = pickle.loads(pickle.dumps(encoder.transform(True)))(raw), encoder.empty(2)
    assert blank.shape == (2, *row.shape) and blank.dtype == row.dtype and not blank.any()
    assert encoder.features(row[None]).shape == (1, encoder.feature_dim)
    rows = encoder(torch.stack([row, blank[0], torch.full_like(row, torch.nan)]))
    assert rows.shape == (3, 6) and bool(rows.isfinite().all())
    assert torch.allclose(rows[:1], encoder(row[None]), atol=1e-6)
    rows.sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in encoder.parameters())
    again = type(encoder)(6, **json.loads(json.dumps(encoder.settings))).eval()
    again.load_state_dict(encoder.state_dict())
    assert again.settings == encoder.settings and torch.equal(again(row[None]), encoder(row[None]))
    layers = {id(parameter) for layer in encoder.layers() for parameter in layer}
    assert layers == {id(p) for key, p in encoder.named_parameters() if not key.startswith("head.")}


def test_columns_by_hand() -> None:
    statistics = column_statistics(ROWS)
    assert statistics["mean"] == [3.0, 20.0, 5.0]
    assert statistics["std"] == [pytest.approx((8 / 3) ** 0.5), 10.0, 1.0]  # a constant column keeps its place
    scaled = TabularEncoder(6, size=3, **statistics).scale(torch.tensor([[3.0, 40.0, 6.0]]))
    assert torch.allclose(scaled, torch.tensor([[0.0, 2.0, 1.0]]))
    quantiles = column_quantiles(np.arange(101.0)[:, None], 100)["quantiles"]
    percentiles = TabularEncoder(6, size=1, quantiles=quantiles).scale(torch.tensor([[-5.0], [50.0], [25.0], [999.0]]))
    assert torch.allclose(percentiles[:, 0], torch.tensor([-0.5, 0.0, -0.25, 0.5]), atol=0.011)
    assert column_quantiles(np.full((3, 1), np.nan), 2) == {"quantiles": [[0.0, 0.0]]}


def test_missing_is_the_mean_with_a_bit() -> None:
    encoder = TabularEncoder(6, size=2, width=8, mean=[4.0, 4.0], std=[2.0, 2.0]).eval()
    seen: list[torch.Tensor] = []
    encoder.backbone.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    for value in (torch.nan, torch.inf, 4.0):
        encoder(torch.tensor([[6.0, value]]))
    assert seen[0].tolist() == seen[1].tolist() == [[1.0, 0.0, 1.0, 0.0]] and seen[2].tolist() == [[1.0, 0.0, 1.0, 1.0]]


def test_precomputed_vectors_may_be_the_embedding_itself() -> None:
    encoder = FeaturesEncoder(3, size=3, layers=0, projection=False)
    assert not list(encoder.parameters())
    assert encoder(torch.tensor([[3.0, 4.0, torch.nan]])).tolist() == [[3.0, 4.0, 0.0]]
    unit = FeaturesEncoder(3, size=3, layers=0, unit_length=True, projection=False)
    assert torch.allclose(unit(torch.tensor([[3.0, 4.0, 0.0]])), torch.tensor([[0.6, 0.8, 0.0]]))
    assert encoder.settings == {
        "size": 3, "width": 128, "layers": 0, "batch_norm": False, "head_width": 0, "views": 1, "projection": False,
    }  # fmt: skip


def test_features_of_older_models_keep_their_settings_and_names() -> None:
    encoder = FeaturesEncoder(6, size=4, width=8)
    assert encoder.settings == {"size": 4, "width": 8, "batch_norm": False, "head_width": 0, "views": 1}
    assert set(encoder.state_dict()) == {
        *(f"backbone.{layer}.{kind}" for layer in (0, 1, 3) for kind in ("weight", "bias")), "head.weight",
    }  # fmt: skip


def test_offset_and_amplitude_of_a_series_do_not_matter_unless_they_are_given() -> None:
    raw = torch.from_numpy(ECG[:, :100]).float()[None]
    free = SeriesEncoder(6, 2, 100, width=8, stages=2).eval()
    assert torch.allclose(free(raw), free(raw * 1e-3), atol=5e-3)  # millivolts or volts
    assert torch.allclose(free(raw), free(raw * 40 + 300), atol=5e-3)
    fixed = SeriesEncoder(6, 2, 100, width=8, stages=2, mean=[0.0, 0.0], std=[1.0, 1.0]).eval()
    assert not torch.allclose(fixed(raw), fixed(raw * 2), atol=5e-2)


def test_standardisation_by_hand_leaves_gaps_out() -> None:
    encoder = SeriesEncoder(6, 1, 5, width=8, stages=1)
    rows = encoder.standardize(torch.tensor([[[1.0, torch.nan, 3.0, torch.inf, torch.nan]], [[5.0] * 5]]))
    assert torch.allclose(rows[0, 0], torch.tensor([-1.0, 0.0, 1.0, 0.0, 0.0]), atol=1e-3)
    assert not rows[1].any()  # a flat line
    long = SeriesEncoder(6, 1, 1000, width=8, stages=1).standardize(torch.full((1, 1, 1000), 0.1))
    assert float(long.abs().max()) < 0.2  # rounding is not made into a signal


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_statistics_stay_in_fp32_in_a_model_of_any_type(dtype: torch.dtype) -> None:
    """250000 is infinite in fp16, and the sum of a thousand values may be."""
    table = TabularEncoder(4, size=1, width=8, mean=[250000.0], std=[80000.0])
    steps = TabularEncoder(4, size=1, width=8, quantiles=[[10.0, 250000.0]])
    given = SeriesEncoder(4, 1, 3, width=8, stages=1, mean=[250000.0], std=[80000.0])
    free = SeriesEncoder(4, 1, 1000, width=8, stages=1)
    row, series = torch.tensor([[50000.0]]), torch.linspace(0, 60000, 1000)[None, None]
    before = table.scale(row), steps.scale(row), given.standardize(row[None]), free.standardize(series)
    for encoder in (table, steps, given, free):
        encoder.to(dtype)
        assert {buffer.dtype for buffer in encoder.statistics.buffers()} == {torch.float32}
        assert {parameter.dtype for parameter in encoder.parameters()} == {dtype}
    row, series = row.to(dtype), series.to(dtype)
    after = table.scale(row), steps.scale(row), given.standardize(row[None]), free.standardize(series)
    for one, other in zip(before, after, strict=True):
        assert other.dtype == dtype and torch.allclose(other.float(), one, atol=0.02)
    assert float(before[0]) == pytest.approx(-2.5) and bool(table(row).isfinite().all())


def test_a_series_is_cut_or_filled_up() -> None:
    transform = SeriesEncoder(6, 2, 150, width=8).transform(False)
    fitted = transform(ECG)
    assert torch.equal(fitted[:, :120], torch.from_numpy(ECG).float()) and bool(fitted[:, 120:].isnan().all())
    assert torch.equal(SeriesEncoder(6, 2, 50, width=8).transform(True)(ECG), torch.from_numpy(ECG[:, :50]).float())
    window = SeriesEncoder(6, 2, 50, width=8, random_window=True)
    starts = {float(window.transform(True)(ECG)[0, 0]) for _ in range(30)}
    assert len(starts) > 10 and float(window.transform(False)(ECG)[0, 0]) == pytest.approx(ECG[0, 0])


def test_whole_numbers_and_empty_series() -> None:
    transform = SeriesEncoder(6, 2, 4, width=8).transform(False)
    assert transform(np.ones((2, 3), np.int16)).dtype == torch.float32
    assert bool(transform(np.zeros((2, 0))).isnan().all())


REFUSED: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "channels": (lambda: SeriesEncoder(6, 12, 50).transform(False)(ECG), DataError, r"\[2, 120\] where \[12, time\]"),
    "flat": (lambda: SeriesEncoder(6, 2, 50).transform(False)(ECG[0]), DataError, "channels first"),
    "kernel": (lambda: SeriesEncoder(6, kernel=4), ConfigError, "kernel odd"),
    "width": (lambda: SeriesEncoder(6, width=12), ConfigError, "multiple of 8"),
    "series mean": (lambda: SeriesEncoder(6, 2, mean=[1.0, 2.0]), ConfigError, "both have 2 entries"),
    "series std": (lambda: SeriesEncoder(6, 2, mean=[1.0, 2.0], std=[1.0, 0.0]), ConfigError, "std of channel 1"),
    "row": (lambda: TabularEncoder(6, size=3).transform(False)(ECG), DataError, "240 numbers where 3"),
    "columns": (lambda: TabularEncoder(6, size=3, mean=[1.0], std=[1.0]), ConfigError, "size=3"),
    "half": (lambda: TabularEncoder(6, size=1, mean=[1.0]), ConfigError, "mean and std together"),
    "both": (
        lambda: TabularEncoder(6, size=1, mean=[1.0], std=[1.0], quantiles=[[1.0]]), ConfigError, "or by quantiles",
    ),
    "std": (lambda: TabularEncoder(6, size=1, mean=[1.0], std=[0.0]), ConfigError, "std of column 0"),
    "order": (lambda: TabularEncoder(6, size=1, quantiles=[[2.0, 1.0]]), ConfigError, "ascending"),
    "layers": (lambda: TabularEncoder(6, size=1, layers=0), ConfigError, "layers=0"),
    "size": (lambda: FeaturesEncoder(6, size=0), ConfigError, "size=0"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_use(name: str) -> None:
    make, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message):
        make()


def test_arrays_go_through_a_model(tmp_path: object) -> None:
    encoders = {"ecg": MAKE["series"][0](), "labs": MAKE["quantiles"][0](), "vector": MAKE["vectors"][0]()}
    model = MultimodalModel(encoders, PairwiseCLIPLoss()).eval()
    model.save_pretrained(f"{tmp_path}/model")
    again = MultimodalModel.from_pretrained(f"{tmp_path}/model")
    items = {"ecg": [ECG, ECG * 2 + 1], "labs": list(ROWS), "vector": list(ROWS[[0, 2]])}
    one, other = model.encode(**items), again.encode(**items)
    assert all(torch.equal(one[name], other[name]) for name in items)
    assert torch.allclose(one["ecg"].norm(dim=1), torch.ones(2)) and F.cosine_similarity(*one["ecg"][:, None]) > 0.999
