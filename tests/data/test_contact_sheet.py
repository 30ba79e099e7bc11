"""The page of `mmrep data stats --html`: figures and samples, nothing of the data taken for markup, nothing that crashes."""

from __future__ import annotations

import base64
import io
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from mmrep.data.build import build_index
from mmrep.data.contact_sheet import write_contact_sheet
from mmrep.data.html_members import MAX_AUDIO_BYTES
from mmrep.data.index import Index, Label, Modality
from mmrep.data.stats import split_stats
from mmrep.data.writer import npy_bytes, write_shard
from mmrep.errors import DataError
from tests.tiny import flac, png

TAGS = {
    *("html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "div", "table", "tr", "th", "td"),
    *("header", "br", "small", "span", "img", "audio", "svg", "polyline"),
}
EVIL = '</p><script>alert(1)</script><img src=x onerror="alert(2)">&amp;'
EVIL_KEY = "k\"'><b onclick=x>"
MODALITIES = {
    "image": Modality(("png", "jpg"), "image"),
    "text": Modality(("txt",), "text"),
    "audio": Modality(("flac", "wav"), "audio"),
    "<i>signal": Modality(("npy",), "array"),
}


class Page(HTMLParser):
    """Tags, attributes and text of a page, and what lies in its data: URIs."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def data(self, tag: str) -> list[bytes]:
        return [
            base64.b64decode(attributes["src"].partition(",")[2]) for attributes in self.all(tag) if "src" in attributes
        ]

    def check_safe(self) -> None:
        for tag, attributes in self.tags:
            assert tag in TAGS and not any(name.startswith("on") or name == "href" for name in attributes)
            assert attributes.get("src", "data:image/jpeg;audio").startswith(("data:image/jpeg;", "data:audio/"))


def wav(seconds: float, rate: int = 16000) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros(round(seconds * rate)), rate, format="WAV", subtype="PCM_16")
    return buffer.getvalue()


def write_odd_shards(folder: Path) -> Path:
    folder.mkdir()
    ramp = np.arange(900.0).reshape(3, 300)
    samples = [
        {
            "__key__": EVIL_KEY,
            "png": png((9, 99, 199), 400),
            "txt": EVIL,
            "flac": flac(440, 0.5),
            "npy": npy_bytes(ramp),
        },
        {"__key__": "broken", "png": b"\x89PNG no picture", "txt": b"\xff\xfe", "npy": b"\x93NUMPY", "wav": b"RIFF"},
        {"__key__": "bare", "txt": "x" * 5000},
        {"__key__": "long", "wav": wav(12), "txt": ""},
        {"__key__": "wide", "png": png((1, 2, 3), 2), "npy": npy_bytes(np.float32([[np.nan, np.inf, 1, -3]]))},
        {"__key__": "scalar", "npy": npy_bytes(np.int64(-7))},
        {"__key__": "empty", "npy": npy_bytes(np.zeros((0, 4)))},
        {"__key__": "bools", "npy": npy_bytes(np.array([True, False, True]))},
        {"__key__": "extreme", "npy": npy_bytes(np.array([-1e308, 0, 1e308], dtype=">f8"))},
        {"__key__": "flat", "npy": npy_bytes(np.full(7, 3, np.uint8))},
        {"__key__": "nan", "npy": npy_bytes(np.full(7, np.nan, np.float16))},
        {"__key__": "nothing", "json": {"a": 1}},
    ]
    write_shard(folder / "train-0.tar", samples)
    write_shard(folder / "a&b-0.tar", [{"__key__": f"{n:03d}", "txt": f"caption {n}"} for n in range(100)])
    build_index(folder, MODALITIES, group_key="<u>", labels={"<s>": Label(["a"])}).save()
    return folder


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_odd_shards(tmp_path_factory.mktemp("page") / "<h1>&shards")


@pytest.fixture(scope="module")
def page(odd: Path, tmp_path_factory: pytest.TempPathFactory) -> Page:
    return Page(write_contact_sheet(Index.load(odd), tmp_path_factory.mktemp("out") / "new" / "page.html"))


def test_nothing_of_the_data_becomes_markup(page: Page) -> None:
    page.check_safe()
    for text in (EVIL, EVIL_KEY, "<i>signal", "Shards of <h1>&shards", "a&b-0.tar"):
        assert text in page.words
    assert any("group key: <u>   labels: <s>" in text for text in page.words)
    policy = next(attributes for attributes in page.all("meta") if "http-equiv" in attributes)
    assert policy["content"].startswith("default-src 'none';")


def test_pictures_are_small_and_sounds_are_whole(page: Page) -> None:
    pictures = [Image.open(io.BytesIO(data)) for data in page.data("img")]
    assert [picture.size for picture in pictures] == [(160, 160), (2, 2)]
    assert "400 \N{MULTIPLICATION SIGN} 400" in page.words
    assert np.abs(np.asarray(pictures[0].convert("RGB")).mean((0, 1)) - [9, 99, 199]).max() < 4
    assert page.data("audio") == [flac(440, 0.5)]
    assert "0.50 s, 16000 Hz" in page.words and "12.00 s, 16000 Hz" in page.words
    assert len(wav(12)) > MAX_AUDIO_BYTES


def test_arrays_are_described_and_drawn(page: Page) -> None:
    times = "\N{MULTIPLICATION SIGN}"
    for words in (
        f"3 {times} 300 float64, 0 to 899",
        f"1 {times} 4 float32, -3 to 1, 2 not finite",
        "scalar int64, -7 to -7",
        f"0 {times} 4 float64, no number",
        "3 bool, 0 to 1",
        "3 >f8, -1e+308 to 1e+308",
        "7 uint8, 3 to 3",
        "7 float16, no number",
    ):
        assert words in page.words
    lines = [attributes["points"] for attributes in page.all("polyline")]
    assert len(lines) == 5 and "nan" not in " ".join(lines)
    assert lines[0].startswith("0.0,19.0 ") and lines[0].endswith(" 120.0,1.0")
    assert all(1 <= float(point.split(",")[1]) <= 19 for line in lines for point in line.split())


def test_what_cannot_be_decoded_says_why(page: Page) -> None:
    bad = [attributes for attributes in page.all("div") if attributes.get("class") == "card bad"]
    why = [attributes for attributes in page.all("span") if attributes.get("class") == "why"]
    assert len(bad) == 1 and len(why) == 4
    assert sum("cannot be decoded" in text for text in page.words) == 4
    assert page.words.count("\N{EN DASH}") > 10
    assert max(len(text) for text in page.words if text.startswith("xxx")) == 241


def test_figures_and_evenly_spaced_samples(odd: Path, page: Page) -> None:
    stats = split_stats(Index.load(odd), "train")
    assert stats["sets"][("<i>signal",)] == 6 and stats["sets"][()] == 1 and sum(stats["sets"].values()) == 12
    assert stats["modalities"]["text"] == {"present": 4, "mean": pytest.approx((len(EVIL) + 5002) / 4), "largest": 5000}
    assert stats["modalities"]["audio"]["present"] == 3
    assert "100 (100%)" in page.words and "6 (50%)" in page.words and "<i>signal + audio + image + text" in page.words
    assert "24 of 100 samples" in page.words and "12 of 12 samples" in page.words
    shown = [int(text.removeprefix("caption ")) for text in page.words if text.startswith("caption ")]
    assert shown == [n * 100 // 24 for n in range(24)]


def test_the_same_shards_give_the_same_page(odd: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(odd, tmp_path / odd.name))
    one = write_contact_sheet(Index.load(odd), tmp_path / "one.html", per_split=5)
    other = write_contact_sheet(Index.load(copy), tmp_path / "other.html", per_split=5)
    assert one.read_bytes() == other.read_bytes() and "5 of 12 samples" in Page(one).words
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([odd.name, "one.html", "other.html"])


def test_damage_after_indexing_is_a_card_and_a_lost_shard_an_error(odd: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(odd, tmp_path / "copy"))
    shard = copy / "a&b-0.tar"
    shard.write_bytes(shard.read_bytes().replace(b"caption 0", b"captiom 0", 1))
    page = Page(write_contact_sheet(Index.load(copy), tmp_path / "page.html"))
    assert any("its checksum differs" in text for text in page.words) and "captiom 0" not in page.words
    (copy / "train-0.tar").unlink()
    with pytest.raises(DataError, match=r"not there .*train-0\.tar"):
        write_contact_sheet(Index.load(copy), tmp_path / "other.html")
    assert not (tmp_path / "other.html").exists()
