"""``mmrep export``: a trained model as a folder for others, in mmrep's format or open_clip's, and to the hub."""

from __future__ import annotations

import argparse
from pathlib import Path


def run(arguments: list[str]) -> int:
    """Run ``export ...``."""
    options = _parser().parse_args(arguments[1:])
    from mmrep.interop import load
    from mmrep.interop.export import export, push_to_hub
    from mmrep.interop.model_card import collect_facts, run_folder_of

    model = load(options.checkpoint)
    path = Path(options.checkpoint)
    run = run_folder_of(path)
    facts = collect_facts(
        options.name or (run.name if run is not None else path.stem if path.is_file() else path.name),
        run=run,
        licence=options.licence,
        data=Path(options.data) if options.data else None,
        results=[Path(result) for result in options.result],
    )
    folder = export(
        model,
        options.out,
        facts,
        format=options.format,
        image=options.image,
        text=options.text,
        layout=options.layout,
    )
    print(f"{options.format} model in {folder}: {', '.join(sorted(file.name for file in folder.iterdir()))}")
    if options.push_to_hub:
        print(push_to_hub(folder, options.push_to_hub, private=not options.public))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mmrep export", description="Write a trained model as a folder for others.")
    parser.add_argument("--checkpoint", required=True, help="run folder, model folder, .ckpt, or what mmrep.load takes")
    parser.add_argument("--out", required=True, metavar="DIR", help="where to; empty or not there yet")
    parser.add_argument("--format", default="mmrep", help="mmrep (default) or open_clip")
    parser.add_argument("--name", help="of the model, in its card (default: of the checkpoint)")
    parser.add_argument("--licence", default="", metavar="SPDX", help="of the weights, as apache-2.0")
    parser.add_argument("--data", metavar="DIR", help="training data (default: the run's), for its licences")
    parser.add_argument(
        "--result", action="append", default=[], metavar="FILE.json", help="of `mmrep eval ... --out`, for the card"
    )
    parser.add_argument("--push-to-hub", metavar="ORG/NAME", help="upload the folder to the Hugging Face hub")
    parser.add_argument("--public", action="store_true", help="a new repository there is public")
    group = parser.add_argument_group("format open_clip")
    group.add_argument("--image", default="image", metavar="MODALITY", help="of the image tower (default: image)")
    group.add_argument("--text", default="text", metavar="MODALITY", help="of the text tower (default: text)")
    group.add_argument("--layout", default="custom-text", help="custom-text (default) or clip, OpenAI's")
    return parser
