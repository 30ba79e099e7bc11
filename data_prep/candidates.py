"""Accuracy where every query has its own few candidates, as Symile-MIMIC is judged: the right X-ray among ten.

``python -m data_prep.candidates --checkpoint RUN --data data/symile_mimic --direction 'ecg+labs->cxr'``. The field
``candidates`` of a sample's JSON lists the ids of its candidates, its own first. The model's own rule ranks; a tie counts
against the query.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmrep.errors import DataError, MmrepError
from mmrep.printing import printable

ID = "hadm_id"
"""Field of the samples' JSON by which candidates are listed."""


def accuracy(
    rows: Mapping[str, Any], scorer: Any, candidates: Sequence[Sequence[int]], given: Sequence[str], target: str
) -> list[bool]:
    """Whether each query finds its own target.

    Args:
        rows: Modality -> embeddings ``[N, D]``.
        scorer: See `mmrep.evaluation.retrieval.Scorer`.
        candidates: For each query the numbers of its candidates' samples, its own first.
        given: Modalities of the query.
        target: What is to be found.
    """
    found = []
    for numbers in candidates:
        query = {name: rows[name][numbers[0]][None] for name in given}
        scores = scorer.score(target=target, candidates=rows[target][list(numbers)], given=query)[0]
        found.append(bool((scores[0] > scores[1:]).all()))
    return found


def read_candidates(samples: Any) -> tuple[list[list[int]], int]:
    """For each sample that has candidates, their numbers in the split; a query of which one is missing is left out.

    Returns:
        The candidates, and how many queries are left out.

    Raises:
        DataError: If no sample has candidates, or no query has all of them in the split.
    """
    from mmrep.data.decode import decode

    records = [decode("json", "json", samples.read(n, "json"), samples.where(n)) for n in range(len(samples))]
    places = {record.get(ID): number for number, record in enumerate(records)}
    listed = [record["candidates"] for record in records if record.get("candidates")]
    if not listed:
        fix = "val and test of Symile-MIMIC have them"
        raise DataError("no sample has candidates", where=samples.index.folder, fix=fix)
    whole = [[places[one] for one in some] for some in listed if all(one in places for one in some)]
    if not whole:
        raise DataError(
            f"each of {len(listed)} queries lacks a candidate in the split",
            where=samples.index.folder,
            fix="write the shards without --limit",
        )
    return whole, len(listed) - len(whole)


def judge(checkpoint: str, data: str, split: str, direction: str) -> dict[str, Any]:
    """The accuracy of a checkpoint on a split, with its 95 % interval."""
    import torch

    from mmrep.data.index import Index
    from mmrep.data.reader import Samples
    from mmrep.devices import choose_device
    from mmrep.evaluation.metrics import share_interval
    from mmrep.evaluation.retrieval import Direction
    from mmrep.evaluation.zero_shot import Split
    from mmrep.interop import load

    index, model = Index.load(data), load(checkpoint).to(choose_device(None))
    way = Direction.parse(direction, list(model.by_modality))
    candidates, left_out = read_candidates(Samples(index, split))
    encoders = {name: model.by_modality[name] for name in (*way.given, way.target)}
    embeddings = Split(index, split).embed(model, encoders)
    with torch.inference_mode():
        found = accuracy(embeddings.rows, model, candidates, way.given, way.target)
    share = sum(found) / len(found)
    interval = list(share_interval(share, len(found)))
    chance = sum(1 / len(some) for some in candidates) / len(candidates)
    return {"split": split, "direction": str(way), "queries": len(found), "accuracy": share, "ci95": interval} | {
        "chance": chance,
        "left_out": left_out,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; gives 0, or 2 after an error that the user can mend."""
    parser = argparse.ArgumentParser(prog="python -m data_prep.candidates", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--checkpoint", required=True, help="what mmrep.load takes")
    parser.add_argument("--data", required=True, help="folder with an index.json")
    parser.add_argument("--split", default="test", help="which split (default: test)")
    parser.add_argument("--direction", default="ecg+labs->cxr", help="default: ecg+labs->cxr")
    parser.add_argument("--out", type=Path, help="write the figures there too, as JSON")
    options = parser.parse_args(argv)
    try:
        result = judge(options.checkpoint, options.data, options.split, options.direction)
        if options.out is not None:
            options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    except (MmrepError, OSError) as error:
        print(f"error: {printable(error)}", file=sys.stderr)
        return 2
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
