"""What an encoder returns: rows of which kind, made of which layers, pooled how."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..embeddings import Output
from ..errors import ConfigError, check_choice, check_flag
from .layers import name_layers, resolve_layers
from .pooling import Combine, SentencePooling, WordPooling


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputSpec:
    """What an encoder returns for a batch; `OutputSpec.of` checks it before any weights are loaded.

    Attributes:
        output: "tokens", "words" or "sentence".
        layers: the layers that vectors are made of. Negative numbers count from the end until `resolved`.
        combine: how several layers become one row.
        pooling: of a word's tokens, one name; of a text's tokens, one or several side by side; empty for tokens.
        special_tokens: whether the tokens that frame a text have rows or count in pooling.
        normalize: whether sentence vectors are scaled to length 1.
        output_dtype: dtype of the rows.
        head: what the folder's dense layers after the pooling are, beside their weights; empty for none.
        head_dim: the size of the vectors that they make.
        every_window: whether overlapping windows each keep a row for a token that they share; the lower half of a split
            encoder needs them all.
    """

    output: Output = "tokens"
    layers: tuple[int, ...] = (-1,)
    combine: Combine = "concat"
    pooling: tuple[str, ...] = ()
    special_tokens: bool = True
    normalize: bool = False
    output_dtype: torch.dtype = torch.float32
    every_window: bool = False
    head: tuple[tuple[object, ...], ...] = ()
    head_dim: int = 0

    @classmethod
    def of(
        cls,
        *,
        output: Output,
        layers: int | Sequence[int],
        combine: Combine,
        pooling: WordPooling | SentencePooling | Sequence[SentencePooling] | None,
        special_tokens: bool,
        normalize: bool,
        output_dtype: torch.dtype,
    ) -> OutputSpec:
        """Check the arguments of `Encoder` that say what it returns.

        Raises:
            ConfigError: one is out of range, or has no effect beside the others.
        """
        check_choice("output", output, Output)
        check_choice("combine", combine, Combine)
        check_flag("special_tokens", special_tokens)
        check_flag("normalize", normalize)
        if normalize and output != "sentence":
            raise ConfigError(f"normalize=True has no effect on output={output!r}: it is for sentence vectors")
        if not special_tokens and output == "words":
            raise ConfigError(
                "special_tokens=False has no effect on output='words': no special token is part of a word"
            )
        if not isinstance(output_dtype, torch.dtype) or not output_dtype.is_floating_point:
            raise ConfigError(f"output_dtype={output_dtype!r}: write a floating point dtype, such as torch.float32")
        return cls(
            output=output,
            layers=name_layers(layers),
            combine=combine,
            pooling=_pooling_names(output, pooling),
            special_tokens=special_tokens,
            normalize=normalize,
            output_dtype=output_dtype,
        )

    def resolved(self, num_layers: int) -> OutputSpec:
        """The same for a model of so many layers, with layers counted from 0 (the embedding layer).

        Raises:
            ConfigError: a layer is out of range or named twice, or the pooler is asked for below the last layer.
        """
        layers = resolve_layers(self.layers, num_layers)
        if "pooler" in self.pooling and (layers != (num_layers,) or self.combine == "stack"):
            raise ConfigError(
                f"pooling='pooler' works on the last layer alone, not on layers={layers} with combine={self.combine!r}"
            )
        return dataclasses.replace(self, layers=layers)

    @property
    def settings(self) -> tuple[Any, ...]:
        """What changes the vectors. Fingerprints hash its repr: another order or spelling loses every cache."""
        chosen = (self.output, self.layers, self.combine, self.pooling, self.special_tokens, self.normalize)
        return (chosen, self.output_dtype, *(["every window"] if self.every_window else []), *self.head)

    def embedding_dim(self, hidden_size: int) -> int:
        """H, the size of the vectors made of hidden states of `hidden_size`."""
        if self.head:
            return self.head_dim
        layers = len(self.layers) if self.combine == "concat" else 1
        vectors = sum(2 if how == "first_last" else 1 for how in self.pooling) or 1  # tokens are not pooled
        return hidden_size * layers * vectors

    def row_shape(self, hidden_size: int) -> tuple[int, ...]:
        """Shape of one row: (H,), or (K, H) where K layers are stacked."""
        size = self.embedding_dim(hidden_size)
        return (len(self.layers), size) if self.combine == "stack" else (size,)


def _pooling_names(output: Output, pooling: Any) -> tuple[str, ...]:
    if output == "tokens":
        if pooling is not None:
            raise ConfigError(f"pooling={pooling!r}: token output is not pooled, ask for output='words' or 'sentence'")
        return ()
    several = output == "sentence" and isinstance(pooling, (list, tuple)) and len(pooling) > 0
    chosen = ("mean",) if pooling is None else tuple(pooling) if several else (pooling,)
    for how in chosen:
        check_choice("pooling", how, WordPooling if output == "words" else SentencePooling)
    return chosen
