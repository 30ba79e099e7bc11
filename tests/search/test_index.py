"""Searching: a sample finds itself, several modalities are scored by the loss's rule, streams and cells lose nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmrep.data.decode import decode
from mmrep.data.index import Index
from mmrep.data.reader import Samples
from mmrep.errors import DataError, LossError, MmrepError
from mmrep.losses import ClusterSwapLoss, ConFuLoss, GRAMLoss, ModalityPairwiseLoss, PairwiseCLIPLoss, SymileLoss
from mmrep.search import EmbeddingIndex, faiss_index
from mmrep.search import index as index_module
from mmrep.search.linear_rule import linear_queries
from mmrep.search.top_k import RunningTopK
from tests.search.conftest import embed, small

NAMES = ["image", "text", "audio"]


def stored(index: EmbeddingIndex, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """All numbers, rows and contents of a modality."""
    numbers, rows, contents = zip(*index.tiles(name), strict=True)
    return torch.cat(numbers), torch.cat(rows), torch.cat(contents)


def keys_of(index: EmbeddingIndex) -> list[str]:
    samples = [index._samples(record.name)[0] for record in index.manifest.shards]
    return [key for keys in samples for key in keys]


def brute_force(
    index: EmbeddingIndex, given: Mapping[str, Tensor], target: str, k: int
) -> list[list[tuple[str, float]]]:
    """The best k of all distinct candidates, from the full matrix of scores."""
    numbers, rows, contents = stored(index, target)
    first = np.sort(np.unique(contents.numpy(), return_index=True)[1])
    scores = index.model.score(target=target, candidates=rows[first], given=given).detach()
    keys = keys_of(index)
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
    return [
        [(keys[int(numbers[first][place])], float(line[place])) for place in best]
        for line, best in zip(scores, order, strict=True)
    ]


def test_a_sample_finds_itself_first(embedded: Path, tiny_shards: Path) -> None:
    """Its embedding is given under another modality's name: for pairs a row fits itself best."""
    index, samples = EmbeddingIndex.load(embedded), Samples(Index.load(tiny_shards), "train")
    assert index.folder == embedded
    for number in (0, 7, 41):
        picture = decode("image", "png", samples.read(number, "png"), "here")
        row = index.model.encode(image=[picture])["image"]
        hit = index.search({"text": row}, target="image", k=1).hits[0][0]
        assert (hit.key, hit.shard) == (samples.key(number), samples.shard(number).name)
        assert hit.score == pytest.approx(float(index.model.loss.scale.detach()), rel=1e-5)  # a cosine of 1
        assert samples.key(number).endswith(f"{hit.number:04d}")


@pytest.mark.parametrize(
    "loss",
    [
        PairwiseCLIPLoss(modalities=NAMES),
        SymileLoss(negatives="all", modalities=NAMES),
        GRAMLoss(modalities=NAMES),
        ClusterSwapLoss(embed_dim=16, modalities=NAMES, num_prototypes=24),
        ConFuLoss(embed_dim=16, modalities=NAMES),
    ],
    ids=lambda loss: type(loss).__name__,
)
def test_several_modalities_are_scored_as_the_model_does(
    tiny_shards: Path, tmp_path: Path, loss: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed(small(loss), tiny_shards, tmp_path)
    monkeypatch.setattr(index_module, "QUERIES", 2)
    index = EmbeddingIndex.load(tmp_path)
    given = index.model.encode(
        text=["a red thing 1", "a blue thing", "x"], audio=[(np.sin(np.arange(3200.0) / n), 16000) for n in (3, 4, 5)]
    )
    for names in (["text"], ["audio"], ["text", "audio"]):
        query = {name: given[name] for name in names}
        for k in (1, 5, 500):
            found = index.search(query, target="image", k=k)
            assert found.method == "exact" and not found.note
            expected = brute_force(index, query, "image", k)
            assert [len(hits) for hits in found.hits] == [len(line) for line in expected]
            for hits, line in zip(found.hits, expected, strict=True):
                assert [hit.score for hit in hits] == pytest.approx([score for _, score in line], rel=1e-4, abs=1e-4)
                if type(loss) is not ClusterSwapLoss:  # whose scores of an untrained model nearly tie
                    assert [hit.key for hit in hits] == [key for key, _ in line]


def test_copies_of_one_content_are_one_hit_unless_asked_for(embedded: Path) -> None:
    index = EmbeddingIndex.load(embedded)
    row = index.model.encode(image=[np.zeros((16, 16, 3), np.uint8)])["image"]
    hits = index.search({"image": row}, target="text", k=100).hits[0]
    every = index.search({"image": row}, target="text", k=100, copies=True).hits[0]
    assert len(hits) == 6 and len(every) == index.count("text") == 80  # six texts, again and again
    assert len({round(hit.score, 5) for hit in hits}) == 6
    numbers, _, contents = stored(index, "text")
    first = numbers[np.unique(contents.numpy(), return_index=True)[1]]
    assert {hit.key for hit in hits} == {keys_of(index)[number] for number in first.tolist()}
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    assert [hit.score for hit in every] == sorted((hit.score for hit in every), reverse=True)


def test_a_stream_of_tiles_gives_the_top_of_the_whole_and_ties_go_to_the_first() -> None:
    scores = torch.randint(-9, 9, (7, 400)).float()  # ties without end
    contents = torch.randint(0, 90, (400,))
    for k in (1, 10, 400, 450):
        for copies in (True, False):
            for tile in (1, 7, 64, 400):
                running = RunningTopK(7, k)
                for part in torch.arange(400).split(tile):
                    running.add(scores[:, part], part + 1000, None if copies else contents[part])
                values, numbers = running.result()
                for line, kept, found in zip(scores, values, numbers, strict=True):
                    order = line.argsort(descending=True, stable=True).tolist()
                    if copies:
                        assert found[found >= 0].tolist() == [1000 + n for n in order[:k]]
                        assert kept[found >= 0].tolist() == line[order[:k]].tolist()
    same = scores[:, contents]  # now copies score alike
    for tile in (1, 13, 400):
        running = RunningTopK(7, 20)
        for part in torch.arange(400).split(tile):
            running.add(same[:, part], part, contents[part])
        first = np.sort(np.unique(contents.numpy(), return_index=True)[1])
        order = same[:, first].argsort(dim=1, descending=True, stable=True)[:, :20]
        assert torch.equal(running.result()[1], torch.from_numpy(first)[order])


def test_tiles_do_not_change_what_is_found(embedded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = EmbeddingIndex.load(embedded)
    query = index.model.encode(text=["a green thing", "white"])
    found = []
    for tile in (3, 8192):
        monkeypatch.setattr(index_module, "TILE", tile)
        found.append([[hit.key for hit in hits] for hits in index.search(query, target="audio", k=9).hits])
    assert found[0] == found[1] and len(found[0][0]) == 9


def write_clusters(folder: Path, tiny_shards: Path, loss: Any, rows: int = 4000) -> EmbeddingIndex:
    """An index whose pictures are made-up rows around 40 centres, in the place of real ones."""
    embed(small(loss), tiny_shards, folder, splits=["val"])
    centres = torch.randn(40, 16)
    made = torch.nn.functional.normalize(centres[torch.arange(rows) % 40] + 0.3 * torch.randn(rows, 16), dim=1)
    shard = folder / "rows" / "val-000000"
    for name in NAMES:
        np.save(shard / f"{name}.npy", made.numpy())
        np.save(shard / f"{name}.present.npy", np.arange(rows) % 7 != 3)
        np.save(shard / f"{name}.content.npy", np.arange(rows) // 2 * 2 if name == "audio" else np.arange(rows))
    (shard / "samples.json").write_text(json.dumps({"keys": [f"k{n}" for n in range(rows)], "numbers": [*range(rows)]}))
    content = json.loads((folder / "manifest.json").read_text())
    record = content["shards"][0]
    there = int((np.arange(rows) % 7 != 3).sum())
    record |= {"rows": rows, "present": dict.fromkeys(NAMES, there)}
    record["files"] = {
        name: {**file, "bytes": (folder / name).stat().st_size} for name, file in record["files"].items()
    }
    (folder / "manifest.json").write_text(json.dumps(content))
    return EmbeddingIndex.load(folder)


@pytest.mark.parametrize(
    "loss",
    [PairwiseCLIPLoss(), SymileLoss(negatives="all"), ModalityPairwiseLoss()],
    ids=lambda loss: type(loss).__name__,
)
def test_faiss_finds_what_an_exact_search_finds(
    tiny_shards: Path, tmp_path: Path, loss: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = write_clusters(tmp_path / "out", tiny_shards, loss)
    given = {name: torch.nn.functional.normalize(torch.randn(50, 16), dim=1) for name in ("text", "audio")}
    exact = index.search(given, target="image", k=10).hits
    found = index.search(given, target="image", k=10, method="approximate")
    assert found.method == "faiss" and not found.note
    same = [len({h.key for h in a} & {h.key for h in b}) for a, b in zip(exact, found.hits, strict=True)]
    assert sum(same) / 500 > 0.9
    scores = {hit.key: hit.score for hits in exact for hit in hits[:1]}
    tops = {hit.key: hit.score for hits in found.hits for hit in hits[:1]}
    assert all(tops[key] == pytest.approx(scores[key], rel=1e-4) for key in scores.keys() & tops.keys())
    built = (tmp_path / "out" / "index-image.faiss").stat().st_mtime_ns
    monkeypatch.setattr(index_module, "EXACT_ROWS", 1000)
    again = index.search(given, target="image", k=10)
    assert again == found and (tmp_path / "out" / "index-image.faiss").stat().st_mtime_ns == built
    assert index.search(given, target="image", k=10, method="exact").method == "exact"


def test_faiss_holds_each_content_once_and_k_may_be_large(tiny_shards: Path, tmp_path: Path) -> None:
    index = write_clusters(tmp_path, tiny_shards, PairwiseCLIPLoss(), rows=300)
    given = {"text": torch.nn.functional.normalize(torch.randn(2, 16), dim=1)}
    found = index.search(given, target="audio", k=1000, method="approximate").hits
    numbers, _, contents = stored(index, "audio")
    assert [len(hits) for hits in found] == [len(contents.unique())] * 2
    assert {hit.number for hit in found[0]} <= set(numbers.tolist())
    assert index.search(given, target="audio", k=3, method="approximate", copies=True).method == "exact"


def test_a_stale_or_broken_faiss_index_is_built_again(tiny_shards: Path, tmp_path: Path) -> None:
    index = write_clusters(tmp_path, tiny_shards, PairwiseCLIPLoss(), rows=400)
    given = {"text": torch.nn.functional.normalize(torch.randn(3, 16), dim=1)}
    expected = index.search(given, target="image", method="approximate")
    path, record = tmp_path / "index-image.faiss", tmp_path / "index-image.json"
    for damage in ("cut", "other manifest", "no record"):
        if damage == "cut":
            path.write_bytes(path.read_bytes()[:-20])
        elif damage == "other manifest":
            manifest = tmp_path / "manifest.json"
            manifest.write_text(manifest.read_text() + "\n")
        else:
            record.unlink()
        assert not faiss_index.is_built(tmp_path, "image")
        assert index.search(given, target="image", method="approximate") == expected
        assert faiss_index.is_built(tmp_path, "image")
    path.write_bytes(b"\0" * path.stat().st_size)
    with pytest.raises(DataError, match="delete it"):
        index.search(given, target="image", method="approximate")


def test_a_rule_that_is_not_linear_stays_exact_and_says_so(tiny_shards: Path, tmp_path: Path) -> None:
    embed(small(GRAMLoss()), tiny_shards, tmp_path)
    index = EmbeddingIndex.load(tmp_path)
    query = index.model.encode(text=["a red thing"])
    found = index.search(query, target="image", method="approximate")
    assert found.method == "exact" and "GRAMLoss is not linear" in found.note
    assert found.hits == index.search(query, target="image").hits
    assert not list(tmp_path.glob("*.faiss"))


def test_without_faiss_every_candidate_is_scored(embedded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faiss_index, "faiss_installed", lambda: False)
    index = EmbeddingIndex.load(embedded)
    query = index.model.encode(text=["a red thing"])
    found = index.search(query, target="image", method="approximate")
    assert found.method == "exact" and "faiss is not installed" in found.note
    assert found.hits == index.search(query, target="image").hits


def test_the_vector_of_a_linear_rule() -> None:
    weights, sample = torch.randn(3, 8), torch.randn(50, 8)
    found = linear_queries(lambda candidates: weights @ candidates.T + 5, sample)
    assert found is not None and torch.allclose(found, weights, atol=1e-5)

    def refuses(candidates: Tensor) -> Tensor:
        raise LossError("not these")

    for rule in (
        lambda c: (weights @ c.T).square(),
        lambda c: -torch.cdist(weights, c),
        lambda c: weights @ c.T / 0,
        refuses,
    ):
        assert linear_queries(rule, sample) is None


def test_queries_that_cannot_be_answered(embedded: Path) -> None:
    index = EmbeddingIndex.load(embedded)
    row = torch.ones(1, 16)
    for given, settings, message in (
        ({"text": row}, {"target": "imgae"}, "did you mean 'image'"),
        ({"txt": row}, {"target": "image"}, "did you mean 'text'"),
        ({}, {"target": "image"}, "nothing is given"),
        ({"image": row}, {"target": "image"}, "both given and asked for"),
        ({"text": row}, {"target": "image", "k": 0}, "k=0"),
        ({"text": torch.ones(1, 8)}, {"target": "image"}, r"\[Q, 16\]"),
        ({"text": row, "audio": torch.ones(2, 16)}, {"target": "image"}, "shapes"),
        ({"text": row * torch.nan}, {"target": "image"}, "NaN"),
        ({"text": row}, {"target": "image", "method": "fast"}, "choose from: auto"),
    ):
        with pytest.raises(MmrepError, match=message) as caught:
            index.search(given, **settings)
        assert "\n" not in str(caught.value)


def load_and_search(folder: Path) -> None:
    EmbeddingIndex.load(folder).search({"text": torch.ones(1, 16)}, target="image")


def test_broken_folders_are_refused_in_one_line(embedded: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(embedded, tmp_path / "copy"))
    rows = sorted((*copy.glob("rows/*/image.npy"), *copy.glob("rows/*.parquet")))[0]
    manifest, whole, good = copy / "manifest.json", rows.read_bytes(), (copy / "manifest.json").read_text()

    def refused(error: type[MmrepError], message: str) -> None:
        with pytest.raises(error, match=message) as caught:
            load_and_search(copy)
        assert "\n" not in str(caught.value)

    rows.write_bytes(whole[:-5])
    refused(DataError, "cut short")
    rows.write_bytes(b"\0" * len(whole))
    refused(DataError, "broken embeddings")
    first_row = stored(EmbeddingIndex.load(embedded), "image")[1][0].numpy().tobytes()
    if rows.suffix == ".parquet":  # whose checksum finds one flipped bit
        rows.write_bytes(whole.replace(first_row, bytes([first_row[0] ^ 1]) + first_row[1:]))
        refused(DataError, "broken embeddings .*CRC")
    else:
        rows.write_bytes(whole.replace(first_row, b"\xff" * len(first_row)))
        refused(DataError, "NaN or infinite")
    rows.write_bytes(whole)
    for content, message in (
        ("{", "broken JSON"),
        ("[]", "no object"),
        ('{"format": "mmrep-embeddings-9"}', "this version reads mmrep-embeddings-1"),
        ('{"format": "mmrep-embeddings-1"}', "broken manifest"),
        (good.replace("rows/", "../rows/"), "broken manifest"),
        (good.replace('"rows": 13', '"rows": 14'), "broken embeddings"),
    ):
        manifest.write_text(content)
        refused(DataError, message)
    manifest.unlink()
    refused(DataError, "no manifest.json .*mmrep embed")
    manifest.write_text(good)
    small(seed=3).save_pretrained(copy / "model")
    refused(DataError, "not the one that made the embeddings")
    shutil.rmtree(copy / "model")
    refused(MmrepError, "no config.json")
    rows.unlink()
    refused(DataError, "gone or cut short")


def test_copies_are_known_without_a_matrix_of_queries_kept_and_tile() -> None:
    """Equal to a search over all at once, for a k and a tile of which [Q, k, T] would be half a gibibyte."""
    generator = torch.Generator().manual_seed(0)
    scores, contents = torch.rand(8, 16384, generator=generator), torch.randint(0, 5000, (16384,), generator=generator)
    first = torch.full((5000,), 16384).scatter_reduce(0, contents, torch.arange(16384), "amin")
    scores = scores[:, first.clamp(max=16383)][:, contents]  # equal contents score alike
    running = RunningTopK(8, 4000)
    for part in torch.arange(16384).split(8192):
        running.add(scores[:, part], part, contents[part])
    found, numbers = running.result()
    distinct = first[first < 16384].sort().values
    best = scores[:, distinct].sort(dim=1, descending=True, stable=True)
    assert torch.equal(found, best.values[:, :4000]) and torch.equal(numbers, distinct[best.indices[:, :4000]])


def test_a_k_larger_than_all_is_all_of_them(embedded: Path) -> None:
    index = EmbeddingIndex.load(embedded)
    rows = index.model.encode(text=["red"])
    for method in ("exact", "approximate"):
        assert len(index.search(rows, target="image", k=10**12, method=method, copies=False).hits[0]) > 10


def test_a_manifest_with_values_of_other_types_is_one_line(embedded: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(embedded, tmp_path / "copy"))
    whole = json.loads((folder / "manifest.json").read_text())
    wrong: list[tuple[list[Any], Any]] = [
        (["source", "modalities"], ["image"]),
        (["source", "embed_dim"], "16"),
        (["source", "splits"], None),
        (["shards", 0, "rows"], "20"),
        (["shards", 0, "present"], {"image": None}),
        (["shards", 0, "files"], []),
    ]
    for path, value in wrong:
        content = json.loads(json.dumps(whole))
        place = content
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = value
        (folder / "manifest.json").write_text(json.dumps(content))
        with pytest.raises(DataError, match="broken manifest"):
            EmbeddingIndex.load(folder)
