"""Small models of open_clip with random weights: its own towers, timm's, and a text tower of Hugging Face's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

NATIVE_TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
NATIVE: dict[str, Any] = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": NATIVE_TEXT,
}
TIMM: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear", "image_size": 160},
    "text_cfg": NATIVE_TEXT,
}
SIGMOID = {**NATIVE, "quick_gelu": False, "init_logit_bias": -10.0, "init_logit_scale": 2.3, "custom_text": True}
PREPROCESS = {
    "mean": [0.5, 0.4, 0.3],
    "std": [0.5, 0.6, 0.7],
    "interpolation": "bilinear",
    "resize_mode": "squash",
}
"""Unlike open_clip's defaults in everything, so that defaults would show."""


def hf_text(folder: Path) -> dict[str, Any]:
    """A config whose text tower is a tiny BERT with its own vocabulary, both in ``folder``."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "green", "thing", "##s", "apple"]
    tokenizer = Tokenizer(models.WordPiece({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
    ).save_pretrained(folder)
    text = {
        "hf_model_name": str(folder),
        "hf_tokenizer_name": str(folder),
        "hf_proj_type": "mlp",
        "hf_pooler_type": "mean_pooler",
        "context_length": 12,
    }
    return {"embed_dim": 24, "vision_cfg": NATIVE["vision_cfg"], "text_cfg": text}


def write_open_clip_folder(folder: Path, config: dict[str, Any], *, custom_text: bool | None = None) -> Path:
    """What open_clip's own export leaves: random weights, config with `PREPROCESS`, the tokenizer where it is a file."""
    import open_clip
    from open_clip.factory import create_model

    folder.mkdir(parents=True, exist_ok=True)
    text = config["text_cfg"]
    model_cfg = {**config, "text_cfg": {**text}} if custom_text is None else {**config, "custom_text": custom_text}
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": model_cfg, "preprocess_cfg": PREPROCESS}), encoding="utf-8"
    )
    if text.get("hf_tokenizer_name"):
        for path in Path(text["hf_tokenizer_name"]).iterdir():
            if path.name.startswith("tokenizer"):
                (folder / path.name).write_bytes(path.read_bytes())
    torch.manual_seed(1)
    model = create_model(f"local-dir:{folder}", load_weights=False, pretrained_text=False)
    with torch.no_grad():
        for parameter in model.parameters():  # zeros and ones of an initialisation would hide a swapped tensor
            parameter.add_(0.02 * torch.randn_like(parameter))
    save_file(
        {n: t.clone().contiguous() for n, t in model.state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    assert open_clip.list_models()
    return folder
