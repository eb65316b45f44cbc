"""A pretrained BERT that turns token batches into embeddings, several texts packed into one row."""

from __future__ import annotations

import copy
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import PACKED, Packing, plain_mode, probe_batching, register
from .cuda import to_device
from .errors import ConfigError, EncoderError, check_choice
from .fingerprint import hash_weights, weights_state
from .layers import kept_inputs, layer_list, resolve_layers, stop_behind, unroll
from .loading import (
    DType,
    convert,
    fastest_dtype,
    fastest_forward_tokens,
    load_pretrained,
    resolve_device,
    torch_dtype,
)
from .pooling import Combine, SentencePooling, WordPooling, combine_layers, pool_runs
from .tokenizer import Overflow, Split, TextTokenizer
from .types import BoolArray, Embeddings, Int32Array, Output, Text, TokenBatch, cumulate, rows_of, steps

logger = logging.getLogger(__name__)

# Tokens of one forward, and what is tried where that is measured. On a few CPU cores more no longer fits the
# activations into the cache; a GPU is bound by kernel launches below 5-10 k tokens.
_FORWARD_TOKENS = {"cpu": 2048, "cuda": 16384}
_TRIED_TOKENS = {"cpu": (1024, 2048, 4096), "cuda": (4096, 8192, 16384, 32768, 65536)}


class Encoder(nn.Module):
    """From `TokenBatch` to `Embeddings`; frozen until `unfreeze` is called.

    The model's structure is copied and its parameters are shared; the model that is handed in is left as it is (until
    `.to()` moves the parameters, in place as torch does, and so for both). A frozen encoder stays in eval mode whatever
    `train()` says. Forwards run one at a time, so that several loaders and a model may hold the same encoder.

    Args:
        model: a transformers encoder (`AutoModel`) with its weights.
        tokenizer: the transformers tokenizer that belongs to it.
        output: "tokens" for a vector a token; "words" for a vector a word; "sentence" for a vector a text.
        layers: which layer, or layers, the vectors are made of: 0 is the embedding layer, -1 the last. The forward
            stops at the highest.
        combine: of several layers: "concat" side by side, "mean", "sum", or "stack" ([N, K, H], see `ScalarMix`).
        pooling: of a word's tokens: "mean" (the default), "first", "last", "max" or "first_last". Of a text's tokens:
            "mean" (the default), "cls", "max", "weighted_mean", "pooler" (the model's own layer over the first token),
            or several, side by side.
        special_tokens: whether the tokens that frame a text have rows in token output, and count in means and maxima
            of sentences.
        normalize: whether sentence vectors are scaled to length 1.
        split: splits strings into words, for word output; None is by blanks.
        dtype: of the forward. "auto" keeps the model's own for a model that is handed in; see `from_pretrained`.
            Another dtype or device than the model's is a copy of the weights.
        device: "auto" keeps the model's own for a model that is handed in.
        output_dtype: of the vectors that come out; float32 fits a downstream layer of default dtype.
        overflow: what to do with a text that is longer than the model takes: "error"; "truncate"; or "windows", which
            covers it with overlapping windows and takes each word's vector from the one in which it stands farthest
            from an edge.
        stride: tokens by which windows overlap.
        max_length: tokens of the longest text or window; None is what the model and the tokenizer allow.
        packed: None packs texts into one row where the model allows it, True refuses a model that does not, False
            does not pack.
        max_forward_tokens: tokens of one forward; None is 2,048 on the CPU and 16,384 on CUDA, until `calibrate` finds
            a better number.
    Attributes:
        tokenizer: the `TextTokenizer`, light enough for worker processes.
        batching: what the self-test at load found: whether texts run packed, padded or grouped by length, and why.
        trainable: whether it was unfrozen: then `BertEmbedding` gives vectors with gradients, and loaders hand out
            `TokenBatch`es, for it to embed.
    Raises:
        ConfigError: an argument is out of range.
        EncoderError: `packed` is True and the model cannot be packed.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        output: Output = "tokens",
        layers: int | Sequence[int] = -1,
        combine: Combine = "concat",
        pooling: WordPooling | SentencePooling | Sequence[SentencePooling] | None = None,
        special_tokens: bool = True,
        normalize: bool = False,
        split: Split | None = None,
        dtype: DType = "auto",
        device: torch.device | str = "auto",
        output_dtype: torch.dtype = torch.float32,
        overflow: Overflow = "error",
        stride: int = 0,
        max_length: int | None = None,
        packed: bool | None = None,
        max_forward_tokens: int | None = None,
    ) -> None:
        super().__init__()
        self.pooling = _resolve_pooling(output, pooling)
        check_choice("combine", combine, Combine)
        if max_forward_tokens is not None and max_forward_tokens < 1:
            raise ConfigError(f"max_forward_tokens={max_forward_tokens}: write a number of at least 1")
        if normalize and output != "sentence":
            raise ConfigError(f"normalize=True has no effect on output={output!r}: it is for sentence vectors")
        if split is not None and output != "words":
            raise ConfigError(f"split= has no effect on output={output!r}: it is for word vectors")
        config: Any = getattr(model, "config", None)
        lacking = [name for name in ("vocab_size", "hidden_size", "num_hidden_layers") if not hasattr(config, name)]
        if lacking:
            raise ConfigError(f"{type(model).__name__} is no transformers text encoder: its config has no {lacking[0]}")
        self.output: Output = output
        self.layers = resolve_layers(layers, config.num_hidden_layers)
        self.combine: Combine = combine
        self.special_tokens = special_tokens
        self.normalize = normalize
        self.output_dtype = output_dtype
        self._last_layer: int = config.num_hidden_layers
        self._max_forward_tokens = max_forward_tokens
        self._found_forward_tokens: dict[torch.device, int] = {}
        self._check_pooler(model)
        self.model = _own_copy(model, device, dtype)
        if min(self.layers) < self._last_layer:
            unroll(self.model)
        if max(self.layers) < self._last_layer:
            stop_behind(self.model, max(self.layers))
        self.batching = probe_batching(self.model, packed)
        logger.info("%s runs %s: %s", type(model).__name__, self.batching.way, self.batching.reason)
        longest = self._longest_text(tokenizer)
        if max_length is not None and not 1 <= max_length <= longest:
            raise ConfigError(f"max_length={max_length}: the model takes 1 to {longest} tokens")
        self.tokenizer = TextTokenizer(
            tokenizer,
            max_length=max_length or longest,
            overflow=overflow,
            stride=stride,
            split=(split or str.split) if output == "words" else None,
            segments="token_type_ids" in getattr(tokenizer, "model_input_names", ()),
        )
        self.trainable = False
        self._pretrained_tokenizer = tokenizer
        self._checked_finite = self.dtype != torch.float16
        self._fingerprint: tuple[Any, bytes] | None = None
        self._lock = threading.Lock()

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        dtype: DType = "auto",
        device: torch.device | str = "auto",
        **options: Any,
    ) -> Encoder:
        """Load an encoder by name.

        Args:
            name: a folder with `config.json`, weights and tokenizer; or a name, looked for among the installed
                packages that carry weights, then on the Hugging Face hub. For sentence output of the last layer, a
                sentence-transformers folder's own pooling and normalisation are followed where `pooling` and
                `normalize` say nothing.
            dtype: "auto" is bfloat16 where a short measurement finds its matrix products faster than float32's (every
                GPU of the last years, some CPUs), else float32. The weights are read as float32 and then converted.
            device: "auto" is the process's CUDA device if there is one, else the CPU.
            options: all the others of `Encoder`.
        Raises:
            ConfigError: an argument is out of range.
            EncoderError: no model of that name can be had; the message says what to install or download.
        """
        _resolve_pooling(options.get("output", "tokens"), options.get("pooling"))
        device = resolve_device(device)
        resolved = None if dtype == "auto" else torch_dtype(dtype)
        model, tokenizer, folder = load_pretrained(str(name))
        last = resolve_layers(options.get("layers", -1), model.config.num_hidden_layers)
        of_folder = options.get("output") == "sentence" and last == (model.config.num_hidden_layers,)
        if folder is not None and of_folder and options.get("pooling") is None:
            if folder.pooling is None:
                raise EncoderError(
                    f"{name} makes sentence vectors by {', '.join(folder.modules)} in a way that is not known here: "
                    "say what you want with pooling="
                )
            options = {"normalize": folder.normalize} | options | {"pooling": folder.pooling}
        if resolved is None:
            resolved = fastest_dtype(device, model.config.hidden_size)
        model.requires_grad_(False)
        # Converted here and not by the constructor: it would copy, and these weights have no other owner.
        convert(model, device, resolved)
        return cls(model, tokenizer, **options)

    @property
    def embedding_dim(self) -> int:
        """H, the size of the vectors that come out; the name that `nn.Embedding` uses."""
        config: Any = self.model.config
        layers = len(self.layers) if self.combine == "concat" else 1
        vectors = sum(2 if how == "first_last" else 1 for how in self.pooling) or 1  # tokens are not pooled
        return int(config.hidden_size) * layers * vectors

    @property
    def device(self) -> torch.device:
        """Where the forward runs and the vectors come out."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the forward."""
        return next(self.model.parameters()).dtype

    @property
    def max_forward_tokens(self) -> int:
        """Tokens of one forward at most; a single longer text is a forward of its own."""
        default = _FORWARD_TOKENS.get(self.device.type, 2048)
        return self._max_forward_tokens or self._found_forward_tokens.get(self.device, default)

    def calibrate(self) -> int:
        """Measure how many tokens of one forward are fastest on this device; once, and not where a number was given.

        On a CPU the feed-forward products of one layer are timed, on CUDA whole forwards: a second at most. A loader
        calls it when it starts, unless it is deterministic.

        Returns:
            `max_forward_tokens`, as it is from now on.
        """
        tried = _TRIED_TOKENS.get(self.device.type)
        if self._max_forward_tokens is None and self.device not in self._found_forward_tokens and tried is not None:
            run = self._feed_forward() if self.device.type == "cpu" else self._dummy_forward
            found = fastest_forward_tokens(tried, run, self.device, _FORWARD_TOKENS[self.device.type])
            self._found_forward_tokens[self.device] = found
            logger.info("forwards of %d tokens are fastest on %s", found, self.device)
        return self.max_forward_tokens

    def _feed_forward(self) -> Callable[[int], object]:
        size = cast(Any, self.model.config).hidden_size
        up = torch.zeros(4 * size, size, dtype=self.dtype)
        rows = torch.zeros(max(_TRIED_TOKENS["cpu"]), size, dtype=self.dtype)
        return lambda tokens: F.linear(F.gelu(F.linear(rows[:tokens], up)), up.T)

    def _dummy_forward(self, tokens: int) -> object:
        lengths = np.full(tokens // 32, 32, np.int32)
        nothing = np.zeros(len(lengths), np.int32)
        ids = np.zeros(32 * len(lengths), np.int32)
        batch = TokenBatch(ids, cumulate(lengths), None, None, None, nothing, nothing)
        with plain_mode(self.device):
            forward = self._packed_forward if self.batching.way == "packed" else self._padded_forward
            return forward(batch, np.arange(len(ids)), lengths)

    def train(self, mode: bool = True) -> Encoder:
        """Follow the mode where parameters are trained; layers that are frozen stay in eval mode, without dropout."""
        super().train(False)
        self.training = mode and self.trainable
        if self.training:
            below = self._trained_parameters()[-1]
            parts = [self.model] if any(p.requires_grad for p in below) else layer_list(self.model)
            for part in parts:
                part.train(any(p.requires_grad for p in part.parameters()))
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Encoder:
        """As torch does, for all parameters; see `unfreeze`, which leaves out those that nothing uses."""
        super().requires_grad_(requires_grad)
        self.trainable = requires_grad
        return self

    def freeze(self) -> Encoder:
        """No parameter is trained any more; vectors may be cached from here on."""
        self.requires_grad_(False)
        self._fingerprint = None  # the weights may have changed in ways that leave no trace
        self.train(False)
        return self

    def unfreeze(self, layers: int | None = None, *, parameters: Iterable[nn.Parameter] | None = None) -> Encoder:
        """Let parameters be trained, and only these, until `freeze` is called.

        Loaders of this encoder then hand out `TokenBatch`es, those that were encoded ahead too, and a cache is off. Put
        the encoder into a `BertEmbedding` to get vectors with gradients.

        Args:
            layers: how many of the layers that are used, from the top (with a pooler that is used); 0 is none of them.
                None is all, and the embedding layer.
            parameters: these instead, those of an adapter, say.
        Raises:
            ConfigError: there are not so many layers, or no parameter to train.
        """
        if parameters is None:
            groups = self._trained_parameters()
            if layers is not None and not 0 <= layers < len(groups):
                raise ConfigError(f"layers={layers}: {len(groups) - 1} layers are used; None is all of them and more")
            parameters = [p for group in groups[: None if layers is None else layers] for p in group]
        chosen = list(parameters)
        self.requires_grad_(False)
        for parameter in chosen:
            parameter.requires_grad_(True)
        if not chosen and layers != 0:
            raise ConfigError("parameters= holds none")
        self.trainable = bool(chosen)
        return self

    def parameter_groups(self, lr: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
        """What an optimizer takes: a group for each layer, the top one first, the embedding layer last.

        Give it all of them from the start: parameters that are frozen have no gradient, and optimizers leave them
        alone.

        Args:
            lr: learning rate of the top layer.
            layer_decay: each layer further down learns at this times the rate of the one above it.
        """
        groups = self._trained_parameters()
        return [{"params": group, "lr": lr * layer_decay**depth} for depth, group in enumerate(groups)]

    def _trained_parameters(self) -> list[list[nn.Parameter]]:
        """The parameters of each layer that is used, from the top, and of all below them; none twice (albert's are)."""
        pooler = getattr(self.model, "pooler", None)
        top = list(pooler.parameters()) if pooler is not None else []
        groups = [list(layer.parameters()) for layer in layer_list(self.model)][::-1]
        groups = [group for group in groups if group]
        seen = {id(parameter) for group in (top, *groups) for parameter in group}
        groups.append([parameter for parameter in self.model.parameters() if id(parameter) not in seen])
        if "pooler" in self.pooling:
            groups[0] = top + groups[0]
        seen.clear()
        out = []
        for group in groups:
            out.append([parameter for parameter in group if id(parameter) not in seen])
            seen |= {id(parameter) for parameter in group}
        return [group for group in out[:-1] if group] + out[-1:]

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write model and tokenizer as transformers does; sentence-transformers loads such folders as well.

        Raises:
            ConfigError: layers above the ones asked for were let go, so the model is not whole.
        """
        if max(self.layers) < self._last_layer:
            raise ConfigError(
                f"layers={self.layers}: the layers above are not there to be saved; save the model that was handed in"
            )
        cast(Any, self.model).save_pretrained(folder)
        self._pretrained_tokenizer.save_pretrained(folder)

    def __repr__(self) -> str:
        """In one line, unlike other modules: `print(encoder.model)` shows the layers."""
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"Encoder({type(self.model).__name__}, output={self.output!r}, layers={self.layers}, "
            f"embedding_dim={self.embedding_dim}, {self.batching.way}, {dtype}, {self.device})"
        )

    def forward(self, texts: Sequence[Text] | TokenBatch) -> Embeddings:
        """Encode at once: texts (strings, lists of words, or pairs) or a `TokenBatch`."""
        return self.encode(texts if isinstance(texts, TokenBatch) else self.tokenizer.batch(texts))

    def encode(self, batch: TokenBatch) -> Embeddings:
        """Encode a batch, longest texts together, in as many forwards as `max_forward_tokens` asks for.

        Whatever grad mode, inference mode or autocast the caller is in, the forward runs without them, and its result
        is an ordinary tensor that a trainable layer may take.

        Returns:
            A row for each token, word or text, in the order of the batch; on `device`, in `output_dtype`. A text
            without any token never enters the model; as a sentence it is a row of zeros.
        Raises:
            EncoderError: the batch holds a text that is longer than the model takes, or no words where word vectors
                were asked for; or a float16 forward overflowed.
        """
        with plain_mode(self.device):
            return self.embed(batch)

    def embed(self, batch: TokenBatch) -> Embeddings:
        """As `encode`, but in the caller's modes: with gradients, autocast, and dropout while it is trained.

        Raises:
            EncoderError: as for `encode`.
        """
        self._check_batch(batch)
        with self._lock:
            layers = self._token_vectors(batch)
            if self.output == "words":
                values = self._words(layers, batch)
            elif self.output == "sentence":
                values = self._sentences(layers, batch)
            else:
                values = self._tokens(layers, batch)
            found = self.assemble(values.to(self.output_dtype), batch)
            if not self._checked_finite:
                self._check_finite(found)
            return found

    def fingerprint(self) -> bytes | None:
        """What stands for everything that changes the vectors of given tokens: weights, config and settings.

        The weights are read once, and again when they may be others: after any of them required a gradient, was
        written to in place, moved or converted.

        Returns:
            16 bytes, the same in every process; None while a parameter requires a gradient, because optimizers change
            weights without a trace.
        """
        state = weights_state(self.model)
        if state is None:
            self._fingerprint = None
            return None
        known = self._fingerprint
        if known is None or known[0] != state:
            config: Any = self.model.config
            settings = (self.output, self.layers, self.combine, self.pooling, self.special_tokens, self.normalize)
            known = state, hash_weights(self.model, repr((settings, self.output_dtype)), config.to_dict())
            self._fingerprint = known
        return known[1]

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of one row of what comes out: (H,), or (K, H) where K layers are stacked."""
        return (len(self.layers), self.embedding_dim) if self.combine == "stack" else (self.embedding_dim,)

    def row_counts(self, batch: TokenBatch) -> Int32Array:
        """[B] int32, how many rows each text has in what `encode` gives."""
        if self.output == "sentence":
            return np.ones(len(batch), np.int32)
        if self.output == "words":
            return batch.num_words
        kept = _kept_tokens(batch, self.special_tokens)
        return batch.lengths if kept is None else _count_by_text(kept, batch)

    def assemble(self, values: Tensor, batch: TokenBatch) -> Embeddings:
        """A batch's rows with all that belongs to them; the rows may come from a cache.

        Args:
            values: [N, ...] one row of `row_shape` for each that `row_counts` counts, in the order of the batch; on
                `device`, in `output_dtype`. They are taken over, not copied.
            batch: the texts.
        """
        lengths = self.row_counts(batch)
        word_ids, present = None, None
        if self.output == "words":
            word_ids = steps(lengths).astype(np.int32)
            if batch.words_cut is not None:
                word_ids[batch.words_cut] = -1
            present = self._to_device(_tokens_of_words(batch)[1] > 0)
        elif self.output == "tokens" and batch.word_ids is not None:
            kept = _kept_tokens(batch, self.special_tokens)
            word_ids = batch.word_ids if kept is None else batch.word_ids[kept]
        return Embeddings(
            values=values,
            cu_seqlens=self._to_device(cumulate(lengths)),
            lengths=torch.from_numpy(lengths.astype(np.int64)),
            tokens=batch,
            output=self.output,
            word_ids=word_ids,
            present=present,
        )

    def _tokens(self, layers: list[Tensor], batch: TokenBatch) -> Tensor:
        kept = _kept_tokens(batch, self.special_tokens)
        values = combine_layers(layers, self.combine)
        return values if kept is None else self._picked(values, kept)

    def _words(self, layers: list[Tensor], batch: TokenBatch) -> Tensor:
        """Each word's tokens are neighbours, so words are runs of rows, and index arithmetic on the host finds them."""
        kept, counts = _tokens_of_words(batch)
        values = self._picked(combine_layers(layers, self.combine), kept)
        return pool_runs(values, self._to_device(cumulate(counts)), cast(WordPooling, self.pooling[0]))

    def _sentences(self, layers: list[Tensor], batch: TokenBatch) -> Tensor:
        values = combine_layers(layers, self.combine)
        kept = _kept_tokens(batch, self.special_tokens)
        rows = values if kept is None else self._picked(values, kept)
        offsets = cumulate(batch.lengths if kept is None else _count_by_text(kept, batch))
        parts = []
        for how in self.pooling:
            if how in ("cls", "pooler"):  # the first token, which is a special one, whether those count or not
                first = pool_runs(values, self._to_device(batch.cu_seqlens), "first")
                parts.append(self._pooler(first) if how == "pooler" else first)
            else:
                parts.append(pool_runs(rows, self._to_device(offsets), cast(SentencePooling, how)))
        vectors = parts[0] if len(parts) == 1 else torch.cat([part.float() for part in parts], -1)
        return F.normalize(vectors.float(), dim=-1) if self.normalize else vectors

    def _pooler(self, first: Tensor) -> Tensor:
        model: Any = self.model
        if hasattr(model, "pooler_activation"):  # albert keeps the two apart
            return cast(Tensor, model.pooler_activation(model.pooler(first)))
        return cast(Tensor, model.pooler(first[:, None]))

    def _picked(self, values: Tensor, kept: BoolArray) -> Tensor:
        return values if kept.all() else values.index_select(0, self._to_device(np.flatnonzero(kept)))

    def _token_vectors(self, batch: TokenBatch) -> list[Tensor]:
        """[N, H] for each wanted layer, in the dtype of the forward, rows in the order of the batch."""
        lengths = batch.lengths if batch.window_lengths is None else batch.window_lengths
        cu_seqlens = cumulate(lengths)
        # Longest first: if memory runs out, it does so at once, and equal lengths stand side by side.
        order = np.argsort(-lengths, kind="stable")
        order = order[lengths[order] > 0]
        forward = self._packed_forward if self.batching.way == "packed" else self._padded_forward
        parts: list[list[Tensor]] = []
        rows = []
        waiting = deque(self._forwards(order, lengths))
        while waiting:
            texts = waiting.popleft()
            places = rows_of(texts, cu_seqlens)
            try:
                parts.append(forward(batch, places, lengths[texts]))
                rows.append(places)
            except torch.OutOfMemoryError:
                if len(texts) == 1:
                    raise
                self._lower_budget(len(places))
                waiting.extendleft(np.array_split(texts, 2)[::-1])
        if not parts:
            size = cast(Any, self.model.config).hidden_size
            return [torch.zeros(0, size, dtype=self.dtype, device=self.device)] * len(self.layers)
        back = np.empty(batch.num_tokens, np.int64)
        back[np.concatenate(rows)] = np.arange(batch.num_tokens)
        index = self._to_device(back)
        return [torch.cat(layer).index_select(0, index) for layer in zip(*parts, strict=True)]

    def _lower_budget(self, tokens: int) -> None:
        """After a forward of so many tokens found no memory: later ones are of half as many."""
        self._max_forward_tokens = max(1, tokens // 2)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        logger.warning(
            "a forward of %d tokens found no memory on %s: from now on max_forward_tokens=%d",
            tokens,
            self.device,
            self._max_forward_tokens,
        )

    def _forwards(self, order: Any, lengths: Int32Array) -> Iterator[Any]:
        """Cut texts, longest first, into forwards by real tokens, or by padded ones where the model is padded."""
        start, held, most = 0, 0, self.max_forward_tokens
        for end, text in enumerate(order.tolist()):
            longest, length = int(lengths[order[start]]), int(lengths[text])
            cost = length if self.batching.way == "packed" else longest
            odd = self.batching.way == "grouped" and length != longest
            if held and (odd or held + cost > most):
                yield order[start:end]
                start, held, cost = end, 0, length
            held += cost
        if len(order):
            yield order[start:]

    def _packed_forward(self, batch: TokenBatch, rows: Any, lengths: Int32Array) -> list[Tensor]:
        positions = steps(lengths) + self.batching.first_position
        inputs = {"input_ids": batch.input_ids[rows], "position_ids": positions}
        if batch.token_type_ids is not None:
            inputs["token_type_ids"] = batch.token_type_ids[rows]
        tensors = {name: self._to_device(ids.astype(np.int64))[None] for name, ids in inputs.items()}
        packing = Packing(lengths, self._to_device(cumulate(lengths)))
        return [layer[0] for layer in self._run(**tensors, packing=packing)]

    def _padded_forward(self, batch: TokenBatch, rows: Any, lengths: Int32Array) -> list[Tensor]:
        longest = int(lengths.max())
        places = np.repeat(np.arange(len(lengths)) * longest, lengths) + steps(lengths)

        def pad(flat: Any, fill: int) -> Tensor:
            out = np.full(len(lengths) * longest, fill, np.int64)
            out[places] = flat
            return self._to_device(out.reshape(len(lengths), longest))

        inputs = {
            "input_ids": pad(batch.input_ids[rows], getattr(self.model.config, "pad_token_id", None) or 0),
            "attention_mask": pad(np.ones(len(rows), np.int64), 0),
        }
        if batch.token_type_ids is not None:
            inputs["token_type_ids"] = pad(batch.token_type_ids[rows], 0)
        index = self._to_device(places)
        return [layer.flatten(0, 1).index_select(0, index) for layer in self._run(**inputs)]

    def _run(self, **inputs: Any) -> list[Tensor]:
        with kept_inputs(self.model, [layer for layer in self.layers if layer < self._last_layer]) as kept:
            out = self.model(**inputs)
        kept[self._last_layer] = out.last_hidden_state
        return [kept[layer] for layer in self.layers]

    def _to_device(self, array: Any) -> Tensor:
        return to_device(array, self.device)

    def _longest_text(self, tokenizer: Any) -> int:
        config: Any = self.model.config
        longest = int(min(getattr(tokenizer, "model_max_length", 1 << 30), 1 << 30))
        positions = getattr(config, "max_position_embeddings", None)
        # RoBERTa's family counts positions from behind its padding id, packed or not.
        first = self.batching.first_position
        return longest if positions is None else min(longest, positions - first)

    def _check_pooler(self, model: nn.Module) -> None:
        if "pooler" not in self.pooling:
            return
        if getattr(model, "pooler", None) is None:
            raise ConfigError(f"pooling='pooler': {type(model).__name__} has no pooler, or its weights were not saved")
        if self.layers != (self._last_layer,) or self.combine == "stack":
            raise ConfigError(f"pooling='pooler' works on the last layer alone, not on layers={self.layers}")

    def _check_batch(self, batch: TokenBatch) -> None:
        lengths = batch.lengths if batch.window_lengths is None else batch.window_lengths
        longest = self.tokenizer.max_length
        if len(lengths) and lengths.max() > longest:
            texts = np.flatnonzero(batch.lengths > longest)
            message = f"text {texts[0]} has {batch.lengths[texts[0]]} tokens, the model takes {longest}"
            raise EncoderError(message, records=texts.tolist())
        vocab_size = cast(Any, self.model.config).vocab_size
        unknown = np.flatnonzero((batch.input_ids < 0) | (batch.input_ids >= vocab_size))
        if len(unknown):
            text = int(np.searchsorted(batch.cu_seqlens, unknown[0], "right")) - 1
            raise EncoderError(
                f"text {text} has the token id {batch.input_ids[unknown[0]]}, the model knows 0 to {vocab_size - 1}: "
                "it was tokenized for another model",
                records=(text,),
            )
        if not self.special_tokens and batch.special is None and batch.num_tokens:
            raise EncoderError(
                "special_tokens=False needs texts, or tokens of this encoder's own tokenizer: in ids that are padded "
                "already special tokens cannot be told apart"
            )
        if self.output == "words":
            of_no_word = _word_ids(batch) < 0
            if batch.special is not None:
                of_no_word &= ~batch.special
            texts = np.flatnonzero(_count_by_text(of_no_word, batch))
            if len(texts):
                raise EncoderError(
                    "word vectors need texts as lists of words, or strings tokenized by this encoder's own tokenizer; "
                    f"text {texts[0]} has tokens that belong to no word",
                    records=texts.tolist(),
                )

    def _check_finite(self, found: Embeddings) -> None:
        if not len(found.values):
            return
        if not bool(found.values.isfinite().all()):
            raise EncoderError(
                "the first float16 batch holds values that are not finite: this model overflows in float16, ask for "
                "dtype='bfloat16' or 'float32'"
            )
        self._checked_finite = True

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"} | {"_fingerprint": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        register()  # the process that unpickles it may not have made one itself
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._lock = threading.Lock()


def _resolve_pooling(output: Output, pooling: Any) -> tuple[str, ...]:
    """What is pooled, as a tuple: empty for token output, of one for words, of one or several for sentences."""
    check_choice("output", output, Output)
    if output == "tokens":
        if pooling is not None:
            raise ConfigError(f"pooling={pooling!r}: token output is not pooled, ask for output='words' or 'sentence'")
        return ()
    several = output == "sentence" and isinstance(pooling, (list, tuple)) and len(pooling) > 0
    chosen = ("mean",) if pooling is None else tuple(pooling) if several else (pooling,)
    for how in chosen:
        check_choice("pooling", how, WordPooling if output == "words" else SentencePooling)
    return chosen


def _own_copy(model: nn.Module, device: torch.device | str, dtype: DType) -> nn.Module:
    """The model's structure over the same parameters, or over a copy of them in another dtype or on another device."""
    parameter = next(model.parameters())
    device = parameter.device if str(device) == "auto" else resolve_device(device)
    dtype = parameter.dtype if dtype == "auto" else torch_dtype(dtype)
    shared = (device, dtype) == (parameter.device, parameter.dtype)
    own: Any = copy.deepcopy(model, {id(p): p for p in model.parameters()} if shared else {}).eval()
    if own.config._attn_implementation == PACKED:  # the model of another encoder
        own.set_attn_implementation("sdpa")
    if not shared:
        convert(own.requires_grad_(False), device, dtype)
    return cast(nn.Module, own)


def _kept_tokens(batch: TokenBatch, special_tokens: bool) -> BoolArray | None:
    """[N] the tokens whose vectors are asked for; None for all."""
    if special_tokens or batch.special is None:
        return batch.owned
    return ~batch.special if batch.owned is None else batch.owned & ~batch.special


def _word_ids(batch: TokenBatch) -> Int32Array:
    """[N] the word of each token, -1 for none."""
    return np.full(batch.num_tokens, -1, np.int32) if batch.word_ids is None else batch.word_ids


def _tokens_of_words(batch: TokenBatch) -> tuple[BoolArray, Any]:
    """[N] the tokens that words are made of, and [sum of num_words] how many each word has."""
    word_ids = _word_ids(batch)
    kept = word_ids >= 0 if batch.owned is None else (word_ids >= 0) & batch.owned
    starts = cumulate(batch.num_words)
    texts = np.repeat(np.arange(len(batch)), batch.lengths)
    words = (word_ids + starts[:-1][texts])[kept]
    return kept, np.bincount(words, minlength=starts[-1])


def _count_by_text(kept: BoolArray, batch: TokenBatch) -> Int32Array:
    return np.diff(cumulate(kept)[batch.cu_seqlens])
