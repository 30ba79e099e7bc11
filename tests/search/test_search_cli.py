"""`mmrep embed` and `mmrep search` as a user types them: the table, the JSON, the page, and every mistake in one line."""

from __future__ import annotations

import argparse
import io
import json
import shutil
from pathlib import Path

import pytest
import soundfile
from PIL import Image

from mmrep.cli import embed as embed_command
from mmrep.cli import search as search_command
from mmrep.data.build import build_index
from mmrep.data.writer import write_shard
from mmrep.errors import MmrepError
from mmrep.search import page as page_module
from tests.data.test_contact_sheet import EVIL, Page
from tests.search.conftest import embed, small
from tests.tiny import MODALITIES, flac, png, sample

ESCAPES = "orange \x1b]52;c;cHduZWQ=\x07\x9b2J[31m[/b] ball"
"""A caption that writes into the clipboard and clears the screen of a terminal that obeys it."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards, a model, their embeddings, a picture and a sound."""
    folder = tmp_path_factory.mktemp("home")
    shards = folder / "shards"
    shards.mkdir()
    samples = [sample(f"k{number:02d}", number) for number in range(12)]
    samples[4]["txt"] = EVIL
    samples[5]["txt"] = ESCAPES
    write_shard(shards / "train-000000.tar", samples)
    build_index(shards, MODALITIES).save()
    small().save_pretrained(folder / "model")
    words = ["--checkpoint", str(folder / "model"), "--data", str(shards), "--out", str(folder / "index")]
    assert embed_command.run(["embed", *words, "--device", "cpu"]) == 0
    Image.open(io.BytesIO(png((200, 20, 20)))).save(folder / "red.png")
    (folder / "tone.flac").write_bytes(flac(400))
    soundfile.write(folder / "long.wav", [0.0] * 400_000, 16000)
    return folder


def search(home: Path, *words: str) -> int:
    return search_command.run(["search", "--index", str(home / "index"), *words])


def test_table_json_and_page(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, html = tmp_path / "new" / "found.json", tmp_path / "new" / "found.html"
    words = ["--text", EVIL, "--audio", str(home / "tone.flac"), "-k", "20", "--out", str(out), "--html", str(html)]
    assert search(home, *words) == 0
    printed = capsys.readouterr().out
    assert "audio+text->image" in printed and "PairwiseCLIPLoss, exact" in printed and "k00" in printed
    result = json.loads(out.read_text())
    assert set(result) == {"task", "index", "given", "target", "method", "note", "results"}
    assert result["target"] == "image" and result["given"]["text"] == EVIL
    assert [line["rank"] for line in result["results"]] == list(range(1, 11)), (
        "12 samples, of which two have no picture"
    )
    model = small()
    given = model.encode(text=[EVIL], audio=[home / "tone.flac"])
    best = result["results"][0]
    picture = Image.open(io.BytesIO(sample(best["key"], int(best["key"][1:]))["png"]))
    score = model.score(target="image", candidates=model.encode(image=[picture])["image"], given=given)
    assert best["score"] == pytest.approx(float(score.detach()), abs=1e-3)
    page, text = Page(html), html.read_text()
    page.check_safe()
    assert "<script" not in text and "http://" not in text and "https://" not in text
    assert page.words.count(EVIL) == 2, "the query, and the caption of a hit"
    assert len(page.all("img")) == 10 and len(page.all("audio")) >= 8
    assert [w for w in page.words if w.startswith("1. ")] == [f"1. {best['key']} "]


def test_what_a_terminal_would_obey_is_not_printed(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert search(home, "--text", "orange", "-k", "12", "--out", str(tmp_path / "found.json")) == 0
    printed = capsys.readouterr().out
    assert "orange ]52;c;cHduZWQ=2J[31m[/b] ball" in " ".join(printed.split()).replace(" │ ", " ")
    assert not set(printed) & {"\x1b", "\x07", "\x9b"}
    assert ESCAPES in [
        line["texts"].get("text") for line in json.loads((tmp_path / "found.json").read_text())["results"]
    ]


def test_a_page_has_a_bound(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_module, "MAX_PAGE_BYTES", 20_000)
    assert search(home, "--text", "red", "--html", str(tmp_path / "page.html")) == 0
    page = Page(tmp_path / "page.html")
    assert any("more are not shown" in text for text in page.words) and len(page.all("img")) < 10
    assert (tmp_path / "page.html").stat().st_size < 25_000


def test_a_picture_and_a_sound_as_the_query_are_shown(home: Path, tmp_path: Path) -> None:
    words = ["--image", str(home / "red.png"), "--audio", str(home / "long.wav"), "-k", "1"]
    assert search(home, *words, "--html", str(tmp_path / "page.html")) == 0  # the target is the only one that is left
    page = Page(tmp_path / "page.html")
    assert page.words.count("image") >= 1 and len(page.all("img")) >= 1
    assert any(text.startswith("25.00 s") for text in page.words), "too long to be put into the page"
    assert any("text by image and audio" in text for text in page.words)


def test_data_that_was_moved(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = Path(shutil.copytree(home, tmp_path / "both"))
    assert search(both, "--text", "red", "--html", str(both / "a.html")) == 0  # moved together
    shutil.move(both / "shards", both / "elsewhere")
    capsys.readouterr()
    assert search(both, "--text", "red") == 0
    output = capsys.readouterr()
    assert "k00" in output.out and "no captions" in output.err and "--data DIR" in output.err
    with pytest.raises(MmrepError, match="--data DIR"):
        search(both, "--text", "red", "--html", str(both / "b.html"))
    assert search(both, "--text", "red", "--data", str(both / "elsewhere"), "--html", str(both / "b.html")) == 0
    assert (both / "a.html").read_bytes() == (both / "b.html").read_bytes()
    write_shard(both / "elsewhere" / "train-000000.tar", [sample("k", 1)])
    build_index(both / "elsewhere", MODALITIES).save()
    with pytest.raises(MmrepError, match="not the data that was embedded"):
        search(both, "--text", "red", "--data", str(both / "elsewhere"))


def test_wrong_use_is_one_line(home: Path, tmp_path: Path) -> None:
    there = tmp_path / "there.html"
    there.write_text("mine")
    for words, message in (
        ([], "nothing is given"),
        (["--image", "no.png", "--target", "text"], "no such image file .*no.png"),
        (["--audio", str(home / "red.png")], "audio .png"),
        (["--array", "x=a.npy"], "no modality 'x'"),
        (["--array", "text=a.npy"], "--query text=VALUE"),
        (["--query", "txet=red"], "did you mean 'text'"),
        (["--query", "text"], "NAME=VALUE"),
        (["--text", "a", "--query", "text=b"], "given twice"),
        (["--text", "a", "--target", "video"], "choose from: image, text, audio"),
        (["--text", "a", "--target", "text"], "both given and asked for"),
        (["--text", "a", "-k", "0"], "k=0"),
        (["--text", "a", "--html", str(there)], "--overwrite"),
        (["--text", "a", "--out", str(there)], "--overwrite"),
        (["--text", "a", "--image", str(home / "red.png"), "--audio", str(home / "tone.flac")], "which modality"),
        (["--text", "a", "--data", str(tmp_path)], "embedded data is not there"),
    ):
        with pytest.raises(MmrepError, match=message) as caught:
            search(home, *words)
        assert "\n" not in str(caught.value), words
    assert there.read_text() == "mine"
    with pytest.raises(MmrepError, match=r"no manifest.json .*mmrep embed"):
        search_command.run(["search", "--index", str(tmp_path), "--text", "a"])


def test_names_of_modalities_are_found_by_kind() -> None:
    options = argparse.Namespace(text="a", image=None, audio=None, array=["ecg=x.npy"], query=["caption_de=b"])
    kinds = {"photo": "image", "caption_en": "text", "caption_de": "text", "ecg": "array"}
    with pytest.raises(MmrepError, match=r"--text could be any of caption_en, caption_de.*--query caption_en=VALUE"):
        search_command.parse_query(options, kinds)
    options.text = None
    assert search_command.parse_query(options, kinds) == {"ecg": "x.npy", "caption_de": "b"}
    options.audio = "x.flac"
    with pytest.raises(MmrepError, match=r"no modality of that kind; it has photo \(image\), caption_en"):
        search_command.parse_query(options, kinds)
    assert search_command.default_target(kinds, {"ecg": "", "caption_de": ""}) == "photo"
    assert search_command.default_target(kinds, dict.fromkeys(("photo", "ecg", "caption_en"), "")) == "caption_de"
    with pytest.raises(MmrepError, match=r"--target caption_en\|caption_de"):
        search_command.default_target(kinds, dict.fromkeys(("photo", "ecg"), ""))


def test_keys_with_markup_stay_text(tmp_path: Path) -> None:
    evil = '"><script>x<b>'
    members = [{**sample(f"k{n}", n), "__key__": f"{evil}{n}"} for n in range(3)]
    (tmp_path / "data").mkdir()
    write_shard(tmp_path / "data" / "test-000000.tar", members)
    build_index(tmp_path / "data", MODALITIES).save()
    embed(small(), tmp_path / "data", tmp_path / "index")
    assert search(tmp_path, "--text", "red", "--html", str(tmp_path / "page.html")) == 0
    Page(tmp_path / "page.html").check_safe()
    assert "<script" not in (tmp_path / "page.html").read_text()


def test_a_device_that_is_not_there_is_one_line(home: Path) -> None:
    with pytest.raises(MmrepError, match=r"--device nonsense: there is none here"):
        search(home, "--text", "red", "--device", "nonsense")
