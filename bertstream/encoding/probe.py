"""The texts of the self-test, and the right vectors of each: what the model as it came gives it alone.

The texts hold what has broken packing or padding in some model: the ids of the mask, of padding and of the unknown
token inside a text, a short text beside a far longer one, segment ids, lengths around a window of the attention, and
more tokens in one row than the model has positions.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import EncoderError
from ..tokens import Int32Array, TokenBatch, batch_of_ids
from .attention import plain_mode
from .layers import is_cut
from .model_state import ModelState
from .pretrained import most_positions
from .vocabulary import num_ids

Run: TypeAlias = Callable[[Sequence[Int32Array], Sequence[Int32Array] | None], list[list[Tensor]]]
"""From texts and their segment ids to the vectors [T, H] of each layer and, within it, of each text."""

MOST_TOKENS = 2048
"""Tokens of all the texts of one way, at most."""

_EXACT = 1e-5
_FEW_POSITIONS = 1000
"""Of a model with more positions, no row of more tokens is tried: the self-test would take too long."""


class Probe:
    """Texts, and the right vectors of each layer that was asked for.

    Args:
        model: a transformers encoder in eval mode, whole. It is left as it is.
        layers: counted from 0, the embedding layer.
        num_layers: of the model.
        special_ids: ids that a text may hold and that a model may treat specially, beside those that the config names.
    Attributes:
        texts: the ids of each text.
        segments: the segment ids of the first texts, as of pairs; empty where the model has none.
        right: the vectors [T, H] of each layer and, within it, of each text, float32.
        tolerance: relative L2 error that a text may have: 1e-5 in float32; where products are rounded, 8 times the
            difference between the model's own attention functions.
        changes_itself: whether a forward of the model changed it.
    Raises:
        EncoderError: the model is no encoder, does not run in its precision, or does not give these layers.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[int], num_layers: int, special_ids: Sequence[int | None] = ()
    ) -> None:
        self.layers = tuple(layers)
        self.num_layers = num_layers
        self.changes_itself = False
        self._positions = most_positions(cast(Any, model.config)) or 0
        self.skipped_id = _skipped_id(model)
        self.texts = probe_texts(model, special_ids)
        self.segments = _probe_segments(model, self.texts)
        with plain_mode(next(model.parameters()).device):
            self.right = self._alone(model)
            self._right_of_pairs = self._alone(model, self.segments) if self.segments else []
            self.tolerance = _EXACT if _is_exact(model) else max(1e-4, 8 * self._noise(model))

    def errors(self, run: Run, *, long_row: bool) -> list[float]:
        """The worst relative L2 error of a text, layer by layer; infinite where a value is not finite.

        Args:
            run: gives the vectors of texts that share a forward, or several.
            long_row: whether texts are repeated until a row is longer than the model's table of positions.
        """
        copies = self._copies() if long_row else 1
        found = run(self.texts * copies, None)
        errors = [worst_error(layer, right * copies) for layer, right in zip(found, self.right, strict=True)]
        if self.segments:
            found = run(self.texts[: len(self.segments)], self.segments)
            errors = list(map(max, errors, map(worst_error, found, self._right_of_pairs)))
        return errors

    @property
    def most_row(self) -> int:
        """Tokens of the longest row that was tried."""
        return self._copies() * sum(map(len, self.texts))

    def _copies(self) -> int:
        """How often each text is in a run, so that a packed row is longer than the model's table of positions."""
        tokens = sum(map(len, self.texts))
        wanted = self._positions // tokens + 1 if self._positions <= _FEW_POSITIONS else 1
        return max(1, min(wanted, MOST_TOKENS // tokens))

    def _alone(self, model: nn.Module, segments: Sequence[Int32Array] | None = None) -> list[list[Tensor]]:
        """One text at a time, each by the model as it was found; with segment ids the first texts only."""
        state = ModelState(model)
        by_text = []
        for number, text in enumerate(self.texts if segments is None else self.texts[: len(segments)]):
            types = None if segments is None else segments[number]
            by_text.append([layer.float() for layer in self._states(model, text, types)])
            if state.differs():
                self.changes_itself = True
                state.put_back()
        return [list(layer) for layer in zip(*by_text, strict=True)]

    def _states(self, model: nn.Module, text: Int32Array, segments: Int32Array | None) -> list[Tensor]:
        name, parameter = type(model).__name__, next(model.parameters())
        ids = torch.from_numpy(text.astype(np.int64))[None].to(parameter.device)
        inner = any(layer < self.num_layers for layer in self.layers)
        more: dict[str, Any] = {"output_hidden_states": True} if inner else {}
        if segments is not None:
            more["token_type_ids"] = torch.from_numpy(segments.astype(np.int64))[None].to(parameter.device)
        try:
            out: Any = model(input_ids=ids, attention_mask=torch.ones_like(ids), **more)
            last = out.last_hidden_state
        except AttributeError as error:
            raise EncoderError(
                f"{name} gives no last_hidden_state ({error}): pass the encoder alone, as AutoModel loads it or "
                "model.base_model holds it"
            ) from error
        except RuntimeError as error:
            raise EncoderError(f"{name} does not run in {parameter.dtype} on {parameter.device}: {error}") from error
        except Exception as error:
            raise EncoderError(
                f"{name} does not run on input_ids and attention_mask alone ({type(error).__name__}: {error}): pass a "
                "text encoder; of a model with a decoder, model.get_encoder()"
            ) from error
        states = list(getattr(out, "hidden_states", None) or ()) if inner else []
        if len(states) == self.num_layers and is_cut(model):  # the lower half of a split encoder: the end gives none
            states.append(last)
        if inner and len(states) != self.num_layers + 1:
            raise EncoderError(
                f"{name} gives {len(states)} hidden_states for {self.num_layers} layers, so which of them are "
                f"layers={self.layers} is not known: leave layers= out"
            )
        size = int(cast(Any, model.config).hidden_size)
        widths = sorted({int(state.shape[-1]) for state in (last, *states)})
        if widths != [size]:
            raise EncoderError(
                f"{name} gives vectors of {' and '.join(map(str, widths))} numbers, and its config says "
                f"hidden_size={size}: such a model is not known here; pass one whose layers are all of that size"
            )
        # Some models pad inside, on the right, and give the padding's rows too.
        found = [last[0] if layer == self.num_layers else states[layer][0, : len(text)] for layer in self.layers]
        if not all(bool(rows.isfinite().all()) for rows in found):
            way_out = "look at its weights"
            if parameter.dtype == torch.float16:
                way_out = "ask for dtype='bfloat16' or 'float32'"
            raise EncoderError(f"{name} gives values that are not finite in {parameter.dtype}: {way_out}")
        return found

    def _noise(self, model: nn.Module) -> float:
        """The difference between two of the model's own attention functions in its precision."""
        native = cast(Any, model.config)._attn_implementation
        changed = self.changes_itself
        try:
            cast(Any, model).set_attn_implementation("sdpa" if native == "eager" else "eager")
            found = self._alone(model)
        except (ValueError, ImportError, EncoderError):
            return 1e-3
        finally:
            cast(Any, model).set_attn_implementation(native)
            self.changes_itself = changed
        noise = max(worst_error(layer, right) for layer, right in zip(found, self.right, strict=True))
        return noise if math.isfinite(noise) else 1e-3


def probe_texts(model: nn.Module, special_ids: Sequence[int | None] = ()) -> list[Int32Array]:
    """Texts of different lengths, each starting in another part of the vocabulary; some of them equally long.

    Args:
        model: a transformers encoder.
        special_ids: ids to put inside some texts, beside those that the config names.
    """
    config: Any = model.config
    skipped = _skipped_id(model)
    vocab_size = _vocab_size(model)
    limit = min((most_positions(config) or MOST_TOKENS) - (0 if skipped is None else skipped + 1), MOST_TOKENS)
    lengths = [5, 7, 7, 11, 24, 96, 5, 5]  # three of 5 share a block of attention on any CPU
    for length in _odd_lengths(config):
        if length <= limit and sum(lengths) + length <= MOST_TOKENS:
            lengths.append(length)
    lengths = [max(1, min(length, limit)) for length in lengths]
    usable = np.arange(min(max(16, vocab_size // 8), vocab_size // 2), vocab_size)
    texts = [
        usable[(number * len(usable) // len(lengths) + 37 * np.arange(length)) % len(usable)].astype(np.int32)
        for number, length in enumerate(lengths)
    ]
    named = [getattr(config, f"{name}_token_id", None) for name in ("mask", "pad", "unk")]
    known = dict.fromkeys(i for i in (skipped, *named, *special_ids) if isinstance(i, int) and 0 <= i < vocab_size)
    for number, special in enumerate(known):
        # Inside texts, not at their edges; twice in one, so that the share of such tokens differs from text to text.
        for place, text in enumerate((texts[2], texts[3], texts[3], texts[5])):
            if len(text) > 2:
                text[1 + (2 * number + 3 * place) % (len(text) - 2)] = special
    return texts


def _probe_segments(model: nn.Module, texts: Sequence[Int32Array]) -> list[Int32Array]:
    """Segment ids of the first texts, the last of which is of one segment; none where the model takes no others."""
    takes_them = "token_type_ids" in inspect.signature(model.forward).parameters
    if not takes_them or (getattr(cast(Any, model.config), "type_vocab_size", None) or 0) < 2:
        return []
    firsts = [len(text) // 2 for text in texts[:3]] + [len(texts[3])]
    return [(np.arange(len(text)) >= first).astype(np.int32) for text, first in zip(texts, firsts, strict=False)]


def _odd_lengths(config: Any) -> Iterator[int]:
    """Lengths just above what a model's attention sees at once, in rising order."""
    found = set()
    # What differs from layer to layer is not in the config itself.
    layers = config.per_layer_config if getattr(config, "is_heterogeneous", False) else ()
    for part in (config, *layers):
        for name in ("sliding_window", "local_attention", "attention_window", "window_size", "block_size"):
            value = _entry(part, name)
            sizes = value if isinstance(value, (list, tuple)) else [value]
            found |= {size + 1 for size in sizes if isinstance(size, int) and size > 0}
    block, random = _entry(config, "block_size"), _entry(config, "num_random_blocks")
    if isinstance(block, int) and isinstance(random, int):
        found.add((5 + 2 * random) * block + 1)  # big_bird's attention is sparse from here on
    yield from sorted(found)


def _entry(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # transformers refuses what each layer has for itself with an error that is no AttributeError
        return None


def _vocab_size(model: nn.Module) -> int:
    size = num_ids(model.config) or 0
    try:
        return min(size, int(cast(Any, model).get_input_embeddings().num_embeddings))
    except (AttributeError, NotImplementedError):
        return size


def _skipped_id(model: nn.Module) -> int | None:
    """The id that has no position, where a model's table of positions has an entry for padding."""
    for path, module in model.named_modules():
        padding = getattr(module, "padding_idx", None)  # of an nn.Embedding, or of ibert's own kind
        if path.endswith("position_embeddings") and isinstance(padding, int):
            return padding
    return None


def batch_of(texts: Sequence[Int32Array]) -> TokenBatch:
    """Texts as a batch of single texts that nothing more is known of."""
    return batch_of_ids(np.concatenate(texts), np.array([len(text) for text in texts], np.int32))


def _is_exact(model: nn.Module) -> bool:
    """Whether products are computed in full float32."""
    return next(model.parameters()).dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"


def worst_error(found: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """The largest relative L2 error of the found texts; infinite where one is not finite or has another shape."""
    errors = [
        float((a.float() - b).norm() / b.norm()) if a.shape == b.shape else math.inf
        for a, b in zip(found, right, strict=True)
    ]
    return max(errors) if all(map(math.isfinite, errors)) else math.inf  # max() ignores a NaN
