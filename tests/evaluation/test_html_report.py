"""The page of `mmrep eval report`: its charts say what the figures are, its markup is whole, nothing of the data gets out."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch

from mmrep.cli.evaluate import run as run_eval
from mmrep.data.build import build_index
from mmrep.data.index import Label
from mmrep.data.writer import write_shard
from mmrep.errors import DataError, MmrepError
from mmrep.evaluation import examples_page
from mmrep.evaluation.curves import read_curves
from mmrep.evaluation.html_report import recall_curve
from mmrep.evaluation.projection import project
from mmrep.evaluation.svg import COLOURS, DASHES, Axis, line_chart, nice_ticks, scatter, style
from tests.data.test_contact_sheet import EVIL, TAGS, Page
from tests.search.conftest import small
from tests.tiny import CLASSES, MODALITIES, sample

METRICS = """\
epoch,step,train/loss,val/loss,val/text->image/recall@1,val/modality_gap/image-text,train/logit_scale
0,4,5.5,,,,14.0
0,9,4.5,,,,14.5
0,9,,4.9,0.25,1.25,
1,14,nan,,,,15.0
1,19,3.25,4.0,0.5,0.75,15.5
"""


def run_folder(folder: Path) -> Path:
    small().save_pretrained(folder / "model")
    (folder / "metrics.csv").write_text(METRICS)
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("<b>data")
    samples = [sample(f'"><script>k{number:02d}', number) for number in range(24)]
    samples[0]["txt"] = EVIL
    write_shard(folder / "test-000000.tar", samples)
    build_index(folder, MODALITIES, group_key="label", labels={"label": Label(CLASSES)}).save()
    return folder


def report(*words: str) -> None:
    assert run_eval(["eval", "report", "--device", "cpu", *words]) == 0


def as_xml(chart: str) -> ElementTree.Element:
    return ElementTree.fromstring(chart)


def test_the_page_of_a_run(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_folder(tmp_path / "<i>run")
    out = tmp_path / "new" / "report.html"
    words = ["--checkpoint", str(run), "--data", str(shards), "--out", str(out)]
    report(*words)
    assert "audio+text->image" in capsys.readouterr().out
    text, page = out.read_text(), Page(out)
    for tag, attributes in page.tags:
        assert tag in TAGS | {"svg", "g", "path", "circle", "text", "title", "details", "summary", "polyline"}, tag
        assert not any(name.startswith("on") or name in ("href", "xlink:href") for name in attributes)
        assert attributes.get("src", "data:").startswith("data:")
    assert "<script" not in text and "http://" not in text and "https://" not in text
    assert EVIL in page.words and "Report of <i>run" in page.words
    retrieval = ["--checkpoint", str(run), "--data", str(shards), "--device", "cpu", "--out", str(tmp_path / "r.json")]
    assert run_eval(["eval", "retrieval", *retrieval]) == 0
    figures = json.loads((tmp_path / "r.json").read_text())["directions"]
    assert len(figures) == 9
    for direction, line in figures.items():
        assert direction in page.words and f"{100 * line['recall@1']:.1f}" in page.words
    for words_of_section in ("Model and data", "Retrieval", "Recall over k", "Training", "Examples"):
        assert words_of_section in page.words
    assert any("ConvImageEncoder(image_size=16" in words for words in page.words)
    assert any("PairwiseCLIPLoss(" in words for words in page.words)
    charts = [attributes["aria-label"] for attributes in page.all("svg") if attributes.get("class") == "chart"]
    assert charts == [
        *("Finding image", "Finding text", "Finding audio"),
        *("Loss", "Recall@1 on the validation split", "Modality gap", "Logit scale", "All modalities, projected"),
    ]
    assert len(page.all("details")) == 9 and len(page.all("summary")) == 9
    cards = [attributes["class"] for attributes in page.all("div") if attributes.get("class", "").startswith("card ")]
    assert cards.count("card query") == 9 * 4 and cards.count("card right") + cards.count("card wrong") == 9 * 4 * 5
    assert sum("right" in words and "\N{CHECK MARK}" in words for words in page.words) == cards.count("card right") > 0
    with pytest.raises(MmrepError, match="--overwrite"):
        report(*words)
    before = out.read_bytes()
    report(*words, "--overwrite")
    assert out.read_bytes() == before, "the same run gives the same page"


def test_a_model_folder_has_no_training_and_a_page_has_a_bound(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small().save_pretrained(tmp_path / "model")
    monkeypatch.setattr(examples_page, "MAX_BYTES", 1000)
    words = ["--checkpoint", str(tmp_path / "model"), "--data", str(shards), "--out", str(tmp_path / "r.html")]
    report(*words)
    page = Page(tmp_path / "r.html")
    assert "Training" not in page.words and len(page.all("details")) == 1
    assert any("8 more directions are not shown" in words for words in page.words)
    with pytest.raises(MmrepError, match=r"no metrics.csv"):
        report(*words, "--overwrite", "--run", str(tmp_path))
    report(*words, "--overwrite", "--run", str(run_folder(tmp_path / "run")), "--queries", "1")
    assert "Training" in Page(tmp_path / "r.html").words


def test_recall_over_k_counts_ranks() -> None:
    curve = recall_curve(np.array([1, 3, 3, 8]), 4)
    assert curve == [(1.0, 25.0), (2.0, 25.0), (3.0, 75.0), (4.0, 75.0)]


def test_curves_of_a_run_that_was_resumed(tmp_path: Path) -> None:
    (tmp_path / "metrics.before-resume-1.csv").write_text("step,train/loss\n1,9\n2,8\n3,7\n")
    (tmp_path / "metrics.before-resume-10.csv").write_text("step,train/loss\n4,5\n")
    (tmp_path / "metrics.before-resume-2.csv").write_text("step,train/loss\n3,6\n4,6\n")
    (tmp_path / "metrics.csv").write_text("epoch,step,train/loss\n0,5,inf\n0,6,1.5\n0,,3\nx,y,z\n")
    assert read_curves(tmp_path) == {"train/loss": [(1.0, 9.0), (2.0, 8.0), (3.0, 6.0), (4.0, 5.0), (6.0, 1.5)]}
    (tmp_path / "metrics.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="no column 'step'"):
        read_curves(tmp_path)


def test_a_line_chart_says_its_figures() -> None:
    series = {"one <&>": [(0.0, 0.0), (50.0, 0.5), (100.0, 1.0)], "dot": [(50.0, 0.25)], "none": []}
    chart = as_xml(line_chart("A <title>", series, Axis("steps", 0, 100), Axis("share", 0, 1)))
    assert chart.get("aria-label") == "A <title>" and chart.get("role") == "img"
    words = [element.text for element in chart.iter("text")]
    assert words[0] == "A <title>" and words[-3:] == ["one <&>", "dot", "none"]
    for tick in ("0", "20", "100", "0.2", "1", "steps", "share"):
        assert tick in words
    line = chart.find(".//polyline")
    assert line is not None
    points = [tuple(map(float, point.split(","))) for point in str(line.get("points")).split()]
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and y0 - y1 == pytest.approx(y1 - y2, abs=0.2) and y0 > y2
    dot = chart.find(".//circle")
    assert dot is not None and float(str(dot.get("cx"))) == pytest.approx(x1, abs=0.1)
    assert float(str(dot.get("cy"))) == pytest.approx((y0 + y1) / 2, abs=0.1)


def test_a_log_axis_has_equal_steps_for_equal_ratios() -> None:
    axis = Axis("k", 1, 100, log=True)
    assert [axis.place(value) for value in (1, 10, 100)] == pytest.approx([0, 0.5, 1])
    assert Axis("flat", 3, 3).place(3) == 0.5
    around = Axis.around("x", [2.0, 4.0])
    assert around.low < 2 and around.high > 4 and Axis.around("x", [0.0]).low < 0


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0, 100, [0, 20, 40, 60, 80, 100]),
        (-1.2, 3.1, [-1, 0, 1, 2, 3]),
        (5, 5, [5]),
    ],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert nice_ticks(low, high) == expected


def test_a_scatter_has_a_shape_for_each_series() -> None:
    points = [(float(n), float(n)) for n in range(3)]
    chart = as_xml(scatter("S", {f"m{n}": points for n in range(5)}, Axis("x", 0, 2), Axis("y", 0, 2)))
    drawn = [group for group in chart.iter("g") if group.find("title") is not None]
    assert [str(group[0].text) for group in drawn] == [f"m{n}" for n in range(5)]
    shapes = {mark.get("d", "circle").partition("m")[2] for group in drawn for mark in group[1]}
    assert len(shapes) == 5 and all(len(group[1]) == 3 for group in drawn)


def test_colours_stand_out_from_white_and_black_and_pairs_do_not_repeat() -> None:
    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for colour in COLOURS:
        assert 1.05 / (luminance(colour) + 0.05) >= 3 and (luminance(colour) + 0.05) / 0.056 >= 3, colour
    assert len({style(number) for number in range(len(COLOURS) * len(DASHES))}) == len(COLOURS) * len(DASHES)


def test_the_projection_keeps_the_plane_of_most_variance() -> None:
    plane = torch.linalg.qr(torch.randn(16, 2)).Q
    spread = torch.randn(300, 2) * torch.tensor([3.0, 1.0])
    rows = {"a": spread @ plane.T + 5, "b": -spread @ plane.T + 5}
    present = {"a": torch.ones(300, dtype=torch.bool), "b": torch.arange(300) % 2 == 0}
    projection = project(rows, present)
    assert sum(projection.shares) == pytest.approx(1, abs=1e-5) and projection.shares[0] > 0.8
    assert projection.points["a"].shape == (300, 2) and projection.points["b"].shape == (150, 2)
    found, expected = (torch.pdist(points.double()) for points in (projection.points["a"], spread))
    assert torch.allclose(found, expected, atol=1e-4), "distances in the plane are those of the rows"
    again = project({name: r.flip(0) for name, r in rows.items()}, {name: p.flip(0) for name, p in present.items()})
    assert torch.allclose(again.points["a"].flip(0), projection.points["a"], atol=1e-6)
    same = project({"a": torch.ones(4, 8)}, {"a": torch.ones(4, dtype=torch.bool)})
    assert same.shares == (0.0, 0.0) and not same.points["a"].any()
