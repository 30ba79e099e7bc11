"""The model card of a model folder: what it embeds, how it was trained, on what data, how good it is, under which licence."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mmrep.errors import ConfigError, DataError
from mmrep.model import MultimodalModel

RETRIEVAL = {
    "queries": "queries",
    "candidates": "candidates",
    "recall@1": "R@1 %",
    "recall@5": "R@5 %",
    "recall@10": "R@10 %",
    "mrr": "MRR",
}
CLASSIFICATION = {
    "n": "samples",
    "classes": "classes",
    "acc1": "top-1 %",
    "acc5": "top-5 %",
    "mean_per_class_recall": "mean per class %",
    "mean_average_precision": "mAP %",
    "chance_acc1": "chance %",
}
PROBE = {"classes": "classes", "accuracy": "accuracy %", "chance": "chance %", "test": "samples"}


@dataclass(frozen=True)
class CardFacts:
    """What a card tells beyond the model itself.

    Attributes:
        name: Of the model.
        licence: SPDX name, or empty where the user stated none.
        training: The run's config, as in ``config.yaml``; empty where it is not known.
        data: Content of the data set's ``index.json``; empty where it is not known.
        results: What ``mmrep eval ... --out`` wrote.
    """

    name: str
    licence: str = ""
    training: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    results: Sequence[Mapping[str, Any]] = ()


def collect_facts(
    name: str, *, run: Path | None, licence: str = "", data: Path | None = None, results: Sequence[Path] = ()
) -> CardFacts:
    """Read what there is: the run's config.yaml, the index of its data, results of evaluations.

    Args:
        name: Of the model.
        run: The run folder, if the model comes from one.
        licence: SPDX name.
        data: Folder of the training data; by default the run's ``data.path``, if it is there.
        results: JSON files of ``mmrep eval``.

    Raises:
        ConfigError: If a result or the data is not there.
        DataError: If a file is broken, or no result.
    """
    training = {}
    if run is not None and (run / "config.yaml").is_file():
        training = _read(run / "config.yaml", yaml.safe_load)
        with _telling(run / "config.yaml", "the config of a run"):
            _training(training)
            _data_of(training)
    if data is not None and not (data / "index.json").is_file():
        raise ConfigError("no index.json", where=data, fix="give the folder of the training data, or leave it out")
    folder = data or _data_of(training)
    content = {}
    if folder is not None and (folder / "index.json").is_file():
        content = _read(folder / "index.json", json.loads)
        with _telling(folder / "index.json", "an index"):
            _data(content)
    return CardFacts(name, licence, training, content, [_result(path) for path in results])


def run_folder_of(checkpoint: Path) -> Path | None:
    """The run folder that a checkpoint, a model folder or a run folder belongs to; None where it is none of a run."""
    run = checkpoint
    if checkpoint.is_dir() and checkpoint.name == "model":
        run = checkpoint.parent
    elif checkpoint.is_file() and checkpoint.parent.name == "checkpoints":
        run = checkpoint.parent.parent
    return run if (run / "config.yaml").is_file() else None


def _read(path: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    """A YAML or JSON file that holds a mapping. YAML 1.1 is no reader of JSON: to it 5e-05 is a text."""
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise DataError(f"broken file ({str(error).splitlines()[0]})", where=path) from error
    if not isinstance(content, dict):
        raise DataError("the file holds no mapping", where=path)
    return content


def _data_of(training: Mapping[str, Any]) -> Path | None:
    path = (training.get("data") or {}).get("path")
    return Path(path) if isinstance(path, str) and "://" not in path else None


def _result(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError("no such result", where=path, fix="write one: mmrep eval retrieval ... --out FILE.json")
    content = _read(path, json.loads)
    with _telling(path, "a result of `mmrep eval`"):
        _result_lines(content)
    return content


@contextmanager
def _telling(path: Path, what: str) -> Iterator[None]:
    """Turn what values of other kinds than ours raise into one line."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise DataError(f"not {what} ({type(error).__name__}: {error})", where=path) from error


def model_card(model: MultimodalModel, facts: CardFacts) -> str:
    """The card as Markdown, with the header that the Hugging Face hub reads.

    Args:
        model: The model.
        facts: What is known of it.
    """
    from huggingface_hub import ModelCard, ModelCardData

    data = ModelCardData(
        model_name=facts.name,
        library_name="mmrep",
        tags=["mmrep", "contrastive-learning", "multimodal", *model.modalities],
        license=facts.licence or None,
    )
    sections = [
        f"---\n{data.to_yaml()}\n---\n\n# {facts.name}",
        f"One embedding space of {model.embed_dim} numbers for {', '.join(model.modalities)}, trained with mmrep.",
        _usage(model),
        _model(model),
        _data(facts.data),
        _training(facts.training),
        _results(facts.results),
        f"## Licence\n\n{facts.licence}" if facts.licence else "## Licence\n\nThe authors state none.",
    ]
    return str(ModelCard("\n\n".join(section for section in sections if section) + "\n"))


def _usage(model: MultimodalModel) -> str:
    example = {"text": '["a red apple"]', "image": '["apple.png"]', "audio": '["apple.flac"]', "array": '["apple.npy"]'}
    items = ", ".join(f"{name}={example[encoder.kind]}" for name, encoder in model.by_modality.items())
    lines = ["import mmrep", "", 'model = mmrep.load("FOLDER_OR_HUB_ID")', f"rows = model.encode({items})"]
    if len(model.modalities) > 1:
        target, given = model.modalities[0], model.modalities[-1]
        asked = f'candidates=rows["{target}"], given={{"{given}": rows["{given}"]}}'
        lines.append(f'scores = model.score(target="{target}", {asked})')
    return "\n".join(["## Use", "", "```python", *lines, "```"])


def _model(model: MultimodalModel) -> str:
    lines = ["## Model", "", "| modality | encoder | parameters |", "|---|---|---|"]
    for name, encoder in model.by_modality.items():
        size = sum(parameter.numel() for parameter in encoder.parameters())
        shared = f" (of {model.share[name]})" if name in model.share else ""
        lines.append(f"| {name} | {type(encoder).__name__}{shared} | {size:,} |")
    settings = {key: value for key, value in model.loss.settings.items() if value is not None}
    stated = ", ".join(f"{key}={value}" for key, value in settings.items() if key != "modalities")
    return "\n".join(
        [*lines, "", f"Objective: {type(model.loss).__name__}({stated}); rows normalised by {model.normalize}."]
    )


def _data(index: Mapping[str, Any]) -> str:
    if not index:
        return "## Data\n\nNot recorded."
    count = {shard["name"]: shard["samples"] for shard in index.get("shards", [])}
    splits = [
        f"{split}: {sum(count.get(name, 0) for name in names):,} samples"
        for split, names in index.get("splits", {}).items()
    ]
    source = (index.get("provenance") or {}).get("dataset")
    lines = [
        "## Data",
        "",
        f"{source + ', ' if source else ''}fingerprint `{index.get('fingerprint', '')[:16]}`; " + "; ".join(splits),
    ]
    licences = [
        f"- {name}: {item.get('spdx') or item.get('title', '')}" if isinstance(item, dict) else f"- {name}: {item}"
        for name, item in (index.get("licences") or {}).items()
    ]
    return "\n".join([*lines, *(["", "Licences of the data:", "", *licences] if licences else [])])


def _training(training: Mapping[str, Any]) -> str:
    if not training:
        return ""
    model, data, trainer = (training.get(part) or {} for part in ("model", "data", "trainer"))
    stated = {
        "module": model.get("class_path"),
        **{key: (model.get("init_args") or {}).get(key) for key in ("lr", "weight_decay", "warmup_steps", "optimizer")},
        "global batch size": data.get("global_batch_size"),
        "epochs": trainer.get("max_epochs"),
        "seed": training.get("seed_everything"),
    }
    return "## Training\n\n" + "\n".join(f"- {key}: {value}" for key, value in stated.items() if value is not None)


def _results(results: Sequence[Mapping[str, Any]]) -> str:
    if not results:
        return ""
    return "\n\n".join(["## Results", *("\n".join(_result_lines(result)) for result in results)])


def _result_lines(result: Mapping[str, Any]) -> list[str]:
    """What was measured, and a table of it: see the commands of `mmrep eval` for what they write."""
    about = f"{result['task']} on {Path(str(result.get('data', ''))).name}, split {result.get('split', '')}"
    stated = [f"{key} {result[key]}" for key in ("method", "modality", "label") if result.get(key)]
    tables = {
        "retrieval": lambda: _table("direction", RETRIEVAL, {f"`{n}`": row for n, row in result["directions"].items()}),
        "classification": lambda: _table("prompts", CLASSIFICATION, {str(result.get("language", "")): result}),
        "probe": lambda: _table("features", PROBE, result["features"]),
    }
    return [f"{', '.join([about, *stated])}:", "", *tables[result["task"]]()]


def _table(first: str, headings: Mapping[str, str], rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Figures as Markdown; those that no row has are left out."""
    shown = {
        key: heading for key, heading in headings.items() if any(row.get(key) is not None for row in rows.values())
    }
    lines = [f"| {' | '.join([first, *shown.values()])} |", "|---" * (1 + len(shown)) + "|"]
    for name, row in rows.items():
        lines.append(f"| {' | '.join([name, *(_shown(heading, row.get(key)) for key, heading in shown.items())])} |")
    return lines


def _shown(heading: str, value: float | None) -> str:
    if value is None:
        return "-"
    if heading.endswith("%"):
        return f"{100 * value:.1f}"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"
