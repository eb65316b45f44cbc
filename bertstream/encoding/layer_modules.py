"""Which modules of an encoder do what: its embedding tables, and in each layer the products and the norms.

`describe` reads this from the attributes of the families in `_FAMILIES`. A description is a claim: the self-test
compares the vectors before it is used.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

Ids = Literal["input_ids", "position_ids", "token_type_ids", "zeros"]
"""What an embedding table is looked up by; "zeros" is always its first row."""


class UndescribedError(Exception):
    """The model is not one that the fused forward knows; the message says why."""


@dataclass(frozen=True, slots=True)
class LayerModules:
    """One layer.

    Attributes:
        qkv: the products for queries, keys and values: three, or one that holds all.
        attention_out: the product after attention.
        attention_norm: before attention in a pre-norm layer, else after it; None for no norm.
        up: the products into the feed-forward: one; or two of a gated one, the activated first.
        down: the product out of it.
        feed_forward_norm: before or after the feed-forward.
        window: a token sees the tokens fewer than this many positions away; None for all.
        rotary: the layer's name in `EncoderModules.rotary`; None for no rotary positions.
    """

    qkv: tuple[nn.Module, ...]
    attention_out: nn.Module
    attention_norm: nn.Module | None
    up: tuple[nn.Module, ...]
    down: nn.Module
    feed_forward_norm: nn.Module
    window: int | None = None
    rotary: str | None = None


@dataclass(frozen=True, slots=True)
class EncoderModules:
    """An encoder that consists of embedding tables and layers of the form of `LayerModules`.

    Attributes:
        tables: the embedding tables that are added up, and what each is looked up by.
        embedding_norm: after the sum; None for no norm.
        projection: from the size of the tables to that of the layers; None where they are equal.
        layers: bottom first.
        heads: of the queries.
        kv_heads: of keys and values.
        head_size: of each head.
        activation: its name in transformers.
        gated: whether the first half of `up` is activated and multiplied by the second.
        pre_norm: whether norms come before attention and feed-forward, and not after the residual is added.
        final_norm: after the last layer; None for no norm.
        rotary: for each kind of layer, a function from [N, H] and position ids [1, N] to cosines and sines
            [1, N, head_size].
    """

    tables: tuple[tuple[nn.Module, Ids], ...]
    embedding_norm: nn.Module | None
    projection: nn.Module | None
    layers: tuple[LayerModules, ...]
    heads: int
    kv_heads: int
    head_size: int
    activation: str
    gated: bool = False
    pre_norm: bool = False
    final_norm: nn.Module | None = None
    rotary: dict[str, Callable[..., Any]] = field(default_factory=dict)


def describe(model: nn.Module, layers: int, *, whole: bool = True) -> EncoderModules:
    """The modules of a model's embeddings and its first layers.

    Args:
        model: a transformers encoder; layers above may have been dropped.
        layers: how many layers run.
        whole: whether these are all layers of the model, so that a final norm follows.
    Raises:
        UndescribedError: the family is unknown, or the model has other attributes or settings than the family.
    """
    config: Any = model.config
    family = _FAMILIES.get(config.model_type)
    if family is None:
        raise UndescribedError(f"no fused forward is known for {config.model_type}")
    if getattr(config, "position_embedding_type", "absolute") not in ("absolute", "rope"):
        raise UndescribedError(f"its positions are {config.position_embedding_type}")
    try:
        modules = family(model, config, layers)
    except (AttributeError, IndexError, KeyError, TypeError) as error:  # modules that are not what they are elsewhere
        raise UndescribedError(f"this {type(model).__name__} has other modules than its family: {error}") from error
    return modules if whole else dataclasses.replace(modules, final_norm=None)


def _bert(model: Any, config: Any, layers: int) -> EncoderModules:
    """Also roberta, xlm-roberta, camembert, data2vec-text, ernie and electra."""
    embeddings = model.embeddings
    tables: list[tuple[nn.Module, Ids]] = [
        (embeddings.word_embeddings, "input_ids"),
        (embeddings.position_embeddings, "position_ids"),
        (embeddings.token_type_embeddings, "token_type_ids"),
    ]
    if getattr(config, "use_task_id", False):  # ernie's
        tables.append((embeddings.task_type_embeddings, "zeros"))
    return EncoderModules(
        tables=tuple(tables),
        embedding_norm=embeddings.LayerNorm,
        projection=getattr(model, "embeddings_project", None),  # electra's
        layers=tuple(_bert_layer(layer) for layer in model.encoder.layer[:layers]),
        heads=config.num_attention_heads,
        kv_heads=config.num_attention_heads,
        head_size=config.hidden_size // config.num_attention_heads,
        activation=config.hidden_act,
    )


def _bert_layer(layer: Any) -> LayerModules:
    attention = layer.attention.self
    return LayerModules(
        qkv=(attention.query, attention.key, attention.value),
        attention_out=layer.attention.output.dense,
        attention_norm=layer.attention.output.LayerNorm,
        up=(layer.intermediate.dense,),
        down=layer.output.dense,
        feed_forward_norm=layer.output.LayerNorm,
    )


def _distilbert(model: Any, config: Any, layers: int) -> EncoderModules:
    embeddings = model.embeddings
    return EncoderModules(
        tables=((embeddings.word_embeddings, "input_ids"), (embeddings.position_embeddings, "position_ids")),
        embedding_norm=embeddings.LayerNorm,
        projection=None,
        layers=tuple(
            LayerModules(
                qkv=(layer.attention.q_lin, layer.attention.k_lin, layer.attention.v_lin),
                attention_out=layer.attention.out_lin,
                attention_norm=layer.sa_layer_norm,
                up=(layer.ffn.lin1,),
                down=layer.ffn.lin2,
                feed_forward_norm=layer.output_layer_norm,
            )
            for layer in model.transformer.layer[:layers]
        ),
        heads=config.n_heads,
        kv_heads=config.n_heads,
        head_size=config.dim // config.n_heads,
        activation=config.activation,
    )


def _albert(model: Any, config: Any, layers: int) -> EncoderModules:
    if config.inner_group_num != 1:
        raise UndescribedError(f"inner_group_num={config.inner_group_num}")
    embeddings, groups = model.embeddings, model.encoder.albert_layer_groups
    each = config.num_hidden_layers / config.num_hidden_groups  # 1 once the groups are unrolled
    used = [groups[int(index / each)].albert_layers[0] for index in range(layers)]
    return EncoderModules(
        tables=(
            (embeddings.word_embeddings, "input_ids"),
            (embeddings.position_embeddings, "position_ids"),
            (embeddings.token_type_embeddings, "token_type_ids"),
        ),
        embedding_norm=embeddings.LayerNorm,
        projection=model.encoder.embedding_hidden_mapping_in,
        layers=tuple(
            LayerModules(
                qkv=(layer.attention.query, layer.attention.key, layer.attention.value),
                attention_out=layer.attention.dense,
                attention_norm=layer.attention.LayerNorm,
                up=(layer.ffn,),
                down=layer.ffn_output,
                feed_forward_norm=layer.full_layer_layer_norm,
            )
            for layer in used
        ),
        heads=config.num_attention_heads,
        kv_heads=config.num_attention_heads,
        head_size=config.hidden_size // config.num_attention_heads,
        activation=config.hidden_act,
    )


def _modernbert(model: Any, config: Any, layers: int) -> EncoderModules:
    used = model.layers[:layers]
    kinds = [layer.attention_type for layer in used]
    _check_rotary(model.rotary_emb.rope_type[kind] for kind in set(kinds))
    return EncoderModules(
        tables=((model.embeddings.tok_embeddings, "input_ids"),),
        embedding_norm=model.embeddings.norm,
        projection=None,
        layers=tuple(
            LayerModules(
                qkv=(layer.attn.Wqkv,),
                attention_out=layer.attn.Wo,
                attention_norm=None if isinstance(layer.attn_norm, nn.Identity) else layer.attn_norm,
                up=(layer.mlp.Wi,),
                down=layer.mlp.Wo,
                feed_forward_norm=layer.mlp_norm,
                window=layer.attn.sliding_window,
                rotary=kind,
            )
            for layer, kind in zip(used, kinds, strict=True)
        ),
        heads=config.num_attention_heads,
        kv_heads=config.num_attention_heads,
        head_size=config.hidden_size // config.num_attention_heads,
        activation=config.hidden_activation,
        gated=True,
        pre_norm=True,
        final_norm=model.final_norm,
        rotary={kind: _rotary_of_kind(model, kind) for kind in set(kinds)},
    )


def _nomic_bert(model: Any, config: Any, layers: int) -> EncoderModules:
    embeddings, used = model.embeddings, model.layers[:layers]
    _check_rotary([model.rotary_emb.rope_type])
    heads = config.num_attention_heads
    return EncoderModules(
        tables=((embeddings.word_embeddings, "input_ids"), (embeddings.token_type_embeddings, "token_type_ids")),
        embedding_norm=embeddings.LayerNorm,
        projection=None,
        layers=tuple(
            _projected_layer(layer, layer.post_attention_layernorm, layer.post_mlp_layernorm) for layer in used
        ),
        heads=heads,
        kv_heads=heads,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // heads,
        activation=config.hidden_act,
        gated=True,
        rotary={"": model.rotary_emb},
    )


def _eurobert(model: Any, config: Any, layers: int) -> EncoderModules:
    _check_rotary([model.rotary_emb.rope_type])
    heads = config.num_attention_heads
    return EncoderModules(
        tables=((model.embed_tokens, "input_ids"),),
        embedding_norm=None,
        projection=None,
        layers=tuple(
            _projected_layer(layer, layer.input_layernorm, layer.post_attention_layernorm)
            for layer in model.layers[:layers]
        ),
        heads=heads,
        kv_heads=config.num_key_value_heads,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // heads,
        activation=config.hidden_act,
        gated=True,
        pre_norm=True,
        final_norm=model.norm,
        rotary={"": model.rotary_emb},
    )


def _projected_layer(layer: Any, attention_norm: nn.Module, feed_forward_norm: nn.Module) -> LayerModules:
    """A layer with the attribute names of Llama."""
    attention, mlp = layer.self_attn, layer.mlp
    return LayerModules(
        qkv=(attention.q_proj, attention.k_proj, attention.v_proj),
        attention_out=attention.o_proj,
        attention_norm=attention_norm,
        up=(mlp.gate_proj, mlp.up_proj),
        down=mlp.down_proj,
        feed_forward_norm=feed_forward_norm,
        rotary="",
    )


def _rotary_of_kind(model: Any, kind: str) -> Callable[..., Any]:
    return lambda states, positions: model.rotary_emb(states, positions, kind)


def _check_rotary(types: Iterable[str]) -> None:
    """Refuse frequencies that depend on the longest text of a forward."""
    for rope_type in types:
        if rope_type not in ("default", "linear"):
            raise UndescribedError(f"its rotary positions are of type {rope_type}")


_FAMILIES: dict[str, Callable[[Any, Any, int], EncoderModules]] = {
    "albert": _albert,
    "bert": _bert,
    "camembert": _bert,
    "data2vec-text": _bert,
    "distilbert": _distilbert,
    "electra": _bert,
    "ernie": _bert,
    "eurobert": _eurobert,
    "modernbert": _modernbert,
    "nomic_bert": _nomic_bert,
    "roberta": _bert,
    "xlm-roberta": _bert,
}
