"""A tiny model of random weights of every text encoder that the installed transformers has."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from .tokenizers import wordpiece

MORE = (
    *("bert-generation", "bros", "canine", "dpr", "layoutlmv3", "lilt", "markuplm", "splinter", "visual_bert", "xlnet"),
    *("embedding_gemma2_text", "t5gemma2_encoder"),
    *("gemma3_text", "mistral", "qwen3"),  # decoders that embedding models are made of
)
"""Families that are in neither of transformers' lists, of masked language models and of text encoders."""

PARTS = {
    "align_text_model": "AlignText",
    "blip_text_model": "BlipText",
    "chinese_clip_text_model": "ChineseCLIPText",
    "clap_text_model": "ClapText",
    "flava_text_model": "FlavaText",
    "longt5": "LongT5",
    "siglip_text_model": "SiglipText",
    "xclip_text_model": "XCLIPText",
}
"""Encoders inside other models, by the beginning of their classes' names."""

LAYERS = 3

SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "dim", "emb_dim", "n_embd", "d_latents", "projection_dim"), 32),
    **dict.fromkeys(("embedding_size", "input_embedding_size", "true_hidden_size", "embedding_rank"), 16),
    **dict.fromkeys(("num_hidden_layers", "n_layers", "n_layer", "num_layers", "encoder_layers"), LAYERS),
    **dict.fromkeys(("decoder_layers", "num_decoder_layers"), 1),
    **dict.fromkeys(("num_attention_heads", "n_heads", "n_head", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads",), 2),
    **dict.fromkeys(("head_dim", "d_head", "d_kv", "attention_head_size"), 8),
    **dict.fromkeys(("intermediate_size", "hidden_dim", "d_ff", "d_inner", "feed_forward_size"), 64),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 64),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "tpu_short_seq_length"), 80),
    # Windows and blocks of attention, so that texts of tens of tokens reach over several.
    **dict.fromkeys(("attention_window", "sliding_window", "local_radius"), 8),
    "local_attention": 16,
    "global_attn_every_n_layers": 2,
    "block_size": 4,
    "num_random_blocks": 1,
    "global_block_size": 4,
    "local_attn_chunk_length": 8,
    "lsh_attn_chunk_length": 8,
    "hidden_size_per_layer_input": 8,
    "query_pre_attn_scalar": 8,
    "embedding_dim": 32,
    "entity_vocab_size": 20,
    "entity_emb_size": 16,
    "shape_vocab_size": 40,
    "pronunciation_vocab_size": 40,
    "xpath_unit_hidden_size": 4,
    "max_depth": 4,
    "intra_bottleneck_size": 16,
    "num_latents": 8,
    "image_size": 16,
    "patch_size": 8,
    "num_experts": 2,
}
"""By the name of a config's entry, wherever a config has it."""

OWN: dict[str, dict[str, Any]] = {
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "conv_kernel_size": 3},
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "esm": {"token_dropout": True, "position_embedding_type": "rotary"},
    "esmc": {"head_dim": 8, "num_key_value_heads": 4},
    "funnel": {"block_sizes": [1, 1, 1], "num_decoder_layers": 1},
    "luke": {"use_entity_aware_attention": True},
    "mobilebert": {"embedding_size": 32},
    "layoutlmv3": {"hidden_size": 48, "coordinate_size": 8, "shape_size": 8},
    "lilt": {"hidden_size": 48},
    "neomme": {"head_dim": 16},
    "reformer": {
        "hash_seed": 0,
        "attn_layers": ["local", "lsh", "local"],
        "axial_pos_shape": [8, 10],
        "axial_pos_embds_dim": [16, 16],
        "num_buckets": 4,
    },
    "squeezebert": {"embedding_size": 32},
    "roc_bert": {"pronunciation_embed_dim": 8, "shape_embed_dim": 8},
    "roformer": {"embedding_size": 32},
    "t5gemma": {"is_encoder_decoder": False},
    "tapas": {"type_vocab_sizes": [3, 8, 8, 2, 8, 8, 4]},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
}
"""What a family needs besides, by its name."""

WINDOWS = (
    "attention_window",
    "local_attention",
    "sliding_window",
    "block_size",
    "local_attn_chunk_length",
    "local_radius",
)
"""Entries of configs that hold the size of a window or block; the first that there is counts."""

MOST_PARAMETERS = 20_000_000


class NotBuiltError(Exception):
    """No small random model of the family can be made here; the text says why."""


@dataclass
class Family:
    """A tiny model and a tokenizer whose special tokens have the ids that its config says.

    Attributes:
        name: as in transformers' config mapping, or in `PARTS`.
        model: random weights, eval mode, float32.
        tokenizer: of transformers.
        window: the size of a window or block of attention, 16 if there is none.
    """

    name: str
    model: nn.Module
    tokenizer: Any
    window: int

    @property
    def layers(self) -> int:
        """How many layers follow the embedding layer."""
        config: Any = self.model.config
        return int(getattr(config, "num_hidden_layers", 1))


def names() -> list[str]:
    """The families to sweep, by name."""
    listed = {*modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, *modeling_auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES}
    known = {name for name in (*listed, *MORE) if name in CONFIG_MAPPING_NAMES}
    return sorted({*known, *(name for name, stem in PARTS.items() if hasattr(transformers, f"{stem}Config"))})


def build(name: str, tokenizer: Any = None) -> Family:
    """A tiny model of a family.

    Args:
        name: as `names` lists it.
        tokenizer: of transformers; None is a `wordpiece` whose padding token has the id of the family's default config.
    Raises:
        NotBuiltError: transformers does not make one of this config, or it is large all the same.
    """
    try:
        kind, config_kind = classes(name)
        config = shrunken(config_kind, name)
        segments = (getattr(config, "type_vocab_size", 0) or 0) > 1
        segments &= "token_type_ids" in inspect.signature(kind.forward).parameters
        if tokenizer is None:
            pad_id = getattr(config, "pad_token_id", None) or 0
            tokenizer = wordpiece(min(pad_id, 4), segments=segments)
        elif not segments:
            tokenizer.model_input_names = ["input_ids", "attention_mask"]
        config = shrunken(config_kind, name, tokenizer)
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in kind(config).parameters())
        if size > MOST_PARAMETERS:
            raise NotBuiltError(f"{size:,} parameters even so")
        torch.manual_seed(0)
        model = spread(kind(config).eval())
    except NotBuiltError:
        raise
    except Exception as error:
        raise NotBuiltError(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}") from error
    windows = [SIZES[key] for key in WINDOWS if key in config.to_dict() and key in SIZES]
    return Family(name, model, tokenizer, next(iter(windows), 16))


def classes(name: str) -> tuple[Any, Any]:
    """The classes of a family's model, the encoder alone where there is one, and of its config."""
    if name in PARTS:
        model = getattr(transformers, f"{PARTS[name]}Model", None) or getattr(
            transformers, f"{PARTS[name]}EncoderModel"
        )
        if name == "longt5":
            model = transformers.LongT5EncoderModel
        return model, getattr(transformers, f"{PARTS[name]}Config")
    model_name = modeling_auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES.get(name)
    model_name = model_name or modeling_auto.MODEL_MAPPING_NAMES[name]
    first = model_name if isinstance(model_name, str) else model_name[0]
    model = getattr(transformers, first)
    return model, model.config_class or getattr(transformers, CONFIG_MAPPING_NAMES[name])


def shrunken(kind: Any, name: str, tokenizer: Any = None) -> Any:
    """A config with small sizes, in its parts too; with the tokenizer's vocabulary and special tokens, if given."""
    default = kind()
    known = default.to_dict()
    changes = {key: value for key, value in SIZES.items() if key in known}
    if tokenizer is not None:
        changes |= {key: value for key, value in vocabulary(tokenizer).items() if key in known}
    changes |= OWN.get(name, {})
    for key in getattr(kind, "sub_configs", {}):
        value = getattr(default, key, None)
        if isinstance(value, transformers.PreTrainedConfig):
            changes[key] = shrunken(type(value), "", tokenizer)
    return kind(**changes)


def vocabulary(tokenizer: Any) -> dict[str, int]:
    """What configs say of a vocabulary, by all the names that they use."""
    ids = {"pad": tokenizer.pad_token_id, "unk": tokenizer.unk_token_id, "mask": tokenizer.mask_token_id}
    ids |= {"bos": tokenizer.cls_token_id, "eos": tokenizer.sep_token_id}
    ids |= {"cls": tokenizer.cls_token_id, "sep": tokenizer.sep_token_id}
    found = {"vocab_size": len(tokenizer), "decoder_start_token_id": ids["pad"]}
    for name, number in ids.items():
        found |= {f"{name}_token_id": number, f"{name}_index": number}
    return found


def spread(model: nn.Module) -> nn.Module:
    """Weights as wide as trained ones: with the initial ones attention is nearly uniform, and hides mistakes."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model
