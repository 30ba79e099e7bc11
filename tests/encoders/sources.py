"""Small models of transformers and timm on disk, with random weights, as others' pretrained ones lie there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

PICTURE = Image.fromarray((np.random.default_rng(0).random((200, 150, 3)) * 255).astype(np.uint8))
_LEVELS = np.round(np.sin(np.arange(40000) / 9) * 13000)
TONE = (((_LEVELS + 0.01 * np.sign(_LEVELS)) / 32767).astype(np.float32), 16000)
"""Of 16 bits a sample, a hair beyond each level so that rounding is unambiguous."""
TEXTS = ["a grinning face", "red apple", "one two three four five six seven eight nine ten eleven twelve", ""]
WORDS = sorted({word for text in TEXTS for word in text.split()})

TRANSFORMER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
WAVES = {**TRANSFORMER, "conv_dim": [8] * 7, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}
SEQ2SEQ = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 2}
SEQ2SEQ |= {"decoder_attention_heads": 2}
TEXT_NETWORKS: dict[str, dict[str, Any]] = {
    "bert": TRANSFORMER,
    "distilbert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32},
    "roberta": {**TRANSFORMER, "max_position_embeddings": 80},
    "mpnet": TRANSFORMER,
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2},
    "t5": {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2},
    "deberta-v2": TRANSFORMER,
    "bart": SEQ2SEQ,
}
AUDIO_NETWORKS: dict[str, dict[str, Any]] = {
    "wav2vec2": WAVES,
    "wavlm": WAVES,
    "hubert": WAVES,
    "whisper": {**SEQ2SEQ, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": 60000},
    "audio-spectrogram-transformer": {**TRANSFORMER, "max_length": 128},
}


def write_text_source(folder: Path, kind: str = "bert", **changed: Any) -> Path:
    """A text network and a word tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **special).save_pretrained(folder)
    ids = {f"{name}_token_id": 0 for name in ("bos", "eos", "pad")}
    config = AutoConfig.for_model(kind, **{"vocab_size": len(words), **ids, **TEXT_NETWORKS[kind], **changed})
    torch.manual_seed(0)  # whatever ran before
    AutoModel.from_config(config).save_pretrained(folder)
    return folder


def write_audio_source(folder: Path, kind: str, **changed: Any) -> Path:
    """An audio network and its feature extractor."""
    import transformers

    extractors = {
        "whisper": transformers.WhisperFeatureExtractor(),
        "audio-spectrogram-transformer": transformers.ASTFeatureExtractor(max_length=128),
    }
    extractors.get(kind, transformers.Wav2Vec2FeatureExtractor()).save_pretrained(folder)
    config = transformers.AutoConfig.for_model(kind, **{**AUDIO_NETWORKS[kind], **changed})
    torch.manual_seed(0)
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    return folder
