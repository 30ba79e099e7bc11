"""Models out: a folder with weights, config, preprocessing and model card, and the hub."""

from __future__ import annotations

import copy
from pathlib import Path

from mmrep.encoders.lora import merge_adapters
from mmrep.errors import CheckpointError, ConfigError, did_you_mean
from mmrep.interop.model_card import CardFacts, model_card
from mmrep.interop.open_clip import export_open_clip
from mmrep.model import MultimodalModel

FORMATS = ("mmrep", "open_clip")


def export(
    model: MultimodalModel,
    folder: Path | str,
    facts: CardFacts,
    *,
    format: str = "mmrep",
    image: str = "image",
    text: str = "text",
    layout: str = "custom-text",
) -> Path:
    """Write a model for others to use, with a model card. Adapters are merged into the weights; ``model`` stays as it is.

    Args:
        model: What to write.
        folder: Where to; it may be empty or not exist.
        facts: What the card tells: see `mmrep.interop.model_card.collect_facts`.
        format: ``mmrep``, a model folder, or ``open_clip``: see `mmrep.interop.open_clip.export_open_clip`.
        image, text, layout: Of the format ``open_clip``.

    Raises:
        ConfigError: If the folder holds something, or the format cannot hold the model.
    """
    if format not in FORMATS:
        raise ConfigError(f"--format {format}", fix=did_you_mean(format, FORMATS))
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError("something is there already", where=folder, fix="give another --out")
    merged = merge(model)
    card = model_card(merged, facts).encode(errors="replace")  # before the weights: a fault leaves no half export
    if format == "open_clip":
        export_open_clip(merged, folder, image=image, text=text, layout=layout)
    else:
        merged.save_pretrained(folder)
    (folder / "README.md").write_bytes(card)
    return folder


def merge(model: MultimodalModel) -> MultimodalModel:
    """The model with the adapters folded into its weights: itself where it has none."""
    if not any("lora" in encoder.settings for encoder in model.by_modality.values()):
        return model
    merged = copy.deepcopy(model)
    for encoder in merged.by_modality.values():
        merge_adapters(encoder)
    return merged


def push_to_hub(folder: Path | str, repository: str, *, private: bool = True) -> str:
    """Upload an exported folder to the Hugging Face hub, with the credentials that its client finds.

    Args:
        folder: As `export` wrote it.
        repository: ``ORG/NAME``; made if it does not exist.
        private: Whether a new repository is private.

    Returns:
        The address of the commit.

    Raises:
        CheckpointError: If it cannot be uploaded.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload by mmrep"))
    except Exception as error:  # offline, no credentials, no such organisation: the hub's client has a dozen types
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"cannot be uploaded ({type(error).__name__}: {reason[:120]})",
            where=repository,
            fix="check the network and `hf auth login`; the folder is complete and can be uploaded by hand",
        ) from error
