"""The README's page "your own data": from a CSV of paths to a trained model that answers."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

import mmrep
from data_prep.table import main as table
from mmrep.cli import main
from tests.tiny import CLASSES, COLOURS, png

CONFIG = Path(__file__).parents[1] / "configs" / "own_data.yaml"


def write_table(folder: Path, rows: int) -> Path:
    """Pictures of one colour, captions that name it, and three values that measure it; some cells are empty."""
    with (folder / "photos.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "caption", "r", "g", "b", "thing"])
        for n in range(rows):
            kind = n % len(CLASSES)
            (folder / f"{n}.png").write_bytes(png(COLOURS[kind], 20, noise=n))
            caption = "" if n % 9 == 4 else f"a {CLASSES[kind]} square"
            writer.writerow([f"{n}.png", caption, *(c / 255 for c in COLOURS[kind]), CLASSES[kind]])
    return folder / "photos.csv"


def test_from_a_csv_to_a_trained_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, shards, runs = write_table(tmp_path, 240), tmp_path / "own", tmp_path / "runs"
    columns = ["--image", "path", "--text", "caption", "--values", "labs=r,g,b", "--label-key", "thing"]
    assert (
        table(["--csv", str(source), "--out", str(shards), *columns, "--val-fraction", "0.1", "--test-fraction", "0.2"])
        == 0
    )
    assert main(["data", "stats", str(shards)]) == 0
    assert "labs" in capsys.readouterr().out
    words = ["fit", "--config", str(CONFIG), "--data.path", str(shards), "--runs", str(runs), "--name", "my_first"]
    encoders = "--model.init_args.encoders"
    small = [f"{encoders}.image.init_args.image_size", "16", f"{encoders}.image.init_args.augment", "false"]
    labs = [f"{encoders}.labs", "mmrep.encoders.FeaturesEncoder", f"{encoders}.labs.init_args.size", "3"]
    trained = ["--data.num_workers", "0", "--data.global_batch_size", "32", "--trainer.max_epochs", "12"]
    assert (
        main([*words, *small, *labs, *trained, "--trainer.accelerator", "cpu", "--model.init_args.warmup_steps", "5"])
        == 0
    )
    out = tmp_path / "result.json"
    assert (
        main(["eval", "retrieval", "--checkpoint", str(runs / "my_first"), "--data", str(shards), "--out", str(out)])
        == 0
    )
    directions = json.loads(out.read_text())["directions"]
    assert set(directions) >= {"image->text", "labs->image", "image+labs->text"}
    assert directions["image->text"]["queries"] < directions["image->labs"]["queries"], "empty captions ask nothing"
    model = mmrep.load(runs / "my_first")
    (tmp_path / "new.png").write_bytes(png((215, 35, 25), 50))
    captions = [f"a {name} square" for name in CLASSES]
    rows = model.encode(image=[tmp_path / "new.png"], text=captions)
    scores = model.score(target="text", candidates=rows["text"], given={"image": rows["image"]})
    assert captions[int(scores.argmax())] == "a red square"
