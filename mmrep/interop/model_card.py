"""The model card of a model folder: what it embeds, how it was trained, on what data, how good it is, under which licence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mmrep.errors import ConfigError, DataError
from mmrep.model import MultimodalModel

FIGURES = {"recall@1": "R@1 %", "recall@5": "R@5 %", "recall@10": "R@10 %", "mrr": "MRR"}


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
    training = _read(run / "config.yaml") if run is not None and (run / "config.yaml").is_file() else {}
    if data is not None and not (data / "index.json").is_file():
        raise ConfigError("no index.json", where=data, fix="give the folder of the training data, or leave it out")
    folder = data or _data_of(training)
    known = folder is not None and (folder / "index.json").is_file()
    content = _read(folder / "index.json") if folder is not None and known else {}
    return CardFacts(name, licence, training, content, [_result(path) for path in results])


def run_folder_of(checkpoint: Path) -> Path | None:
    """The run folder that a checkpoint, a model folder or a run folder belongs to; None where it is none of a run."""
    run = checkpoint
    if checkpoint.is_dir() and checkpoint.name == "model":
        run = checkpoint.parent
    elif checkpoint.is_file() and checkpoint.parent.name == "checkpoints":
        run = checkpoint.parent.parent
    return run if (run / "config.yaml").is_file() else None


def _read(path: Path) -> dict[str, Any]:
    """A YAML or JSON file that holds a mapping."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
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
    content = _read(path)
    if "task" not in content:
        raise DataError("no result of `mmrep eval`", where=path)
    return content


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
        _data(facts),
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


def _data(facts: CardFacts) -> str:
    index = facts.data
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
    lines = ["## Results", ""]
    for result in results:
        lines += [f"{result['task']} on {Path(str(result.get('data', ''))).name}, split {result.get('split', '')}:", ""]
        lines += _retrieval_rows(result) if "directions" in result else _metric_rows(result)
        lines.append("")
    return "\n".join(lines).rstrip()


def _retrieval_rows(result: Mapping[str, Any]) -> list[str]:
    rows = [f"| direction | queries | candidates | {' | '.join(FIGURES.values())} |", "|---" * (3 + len(FIGURES)) + "|"]
    for direction, found in result["directions"].items():
        shown = [_shown(key, found.get(key)) for key in FIGURES]
        rows.append(f"| `{direction}` | {found['queries']} | {found['candidates']} | {' | '.join(shown)} |")
    return rows


def _shown(key: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if key == "mrr" else f"{100 * value:.1f}"


def _metric_rows(result: Mapping[str, Any]) -> list[str]:
    metrics = {key: value for key, value in (result.get("metrics") or {}).items() if isinstance(value, int | float)}
    return [f"- {key}: {value:.4f}" for key, value in metrics.items()]
