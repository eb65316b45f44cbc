"""A pretrained BERT that turns token batches into embeddings, several texts packed into one row."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..embeddings import Embeddings, Output
from ..errors import ConfigError, EncoderError, check_choice
from ..system.cuda import resolve_device
from ..tokens import Text, TokenBatch, cumulate
from .attention import PACKED, plain_mode, probe_batching
from .autotune import fastest_dtype, fastest_forward_tokens
from .fingerprint import hash_weights, note_training, weights_state
from .forward import FORWARD_TOKENS, BatchedForward
from .layers import layer_list, resolve_layers, stop_behind, unroll
from .pooling import Combine, SentencePooling, WordPooling
from .pretrained import DType, convert, load_pretrained, save_pooling, torch_dtype, warn_of_half
from .tokenizer import Overflow, Split, TextTokenizer
from .upper import UpperEncoder

logger = logging.getLogger(__name__)

# What is tried where the tokens of one forward are measured.
_TRIED_TOKENS = {"cpu": (1024, 2048, 4096), "cuda": (4096, 8192, 16384, 32768, 65536)}


class Encoder(BatchedForward):
    """From `TokenBatch` to `Embeddings`; frozen until `unfreeze` is called.

    The model's structure is copied and its parameters are shared; the model that is handed in is left as it is (until
    `.to()` moves the parameters, in place as torch does, and so for both). A frozen encoder stays in eval mode whatever
    `train()` says. Forwards run one at a time, so that several loaders and a model may hold the same encoder.

    Args:
        model: a transformers encoder (`AutoModel`) with its weights, or a PeftModel around one.
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
        if not special_tokens and output == "words":
            raise ConfigError(
                "special_tokens=False has no effect on output='words': no special token is part of a word"
            )
        model = _without_peft(model)
        config = _config_of(model)
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
        self.train(False)

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
        config = _config_of(model)
        last = resolve_layers(options.get("layers", -1), config.num_hidden_layers)
        of_folder = options.get("output") == "sentence" and last == (config.num_hidden_layers,)
        if folder is not None and of_folder and options.get("pooling") is None:
            if folder.pooling is None:
                raise EncoderError(
                    f"{name} makes sentence vectors by {', '.join(folder.modules)} in a way that is not known here: "
                    "say what you want with pooling="
                )
            options = {"normalize": folder.normalize} | options | {"pooling": folder.pooling}
        if resolved is None:
            resolved = fastest_dtype(device, config.hidden_size)
        model.requires_grad_(False)
        # Converted here and not by the constructor: it would copy, and these weights have no other owner.
        convert(model, device, resolved)
        return cls(model, tokenizer, **options)

    def calibrate(self) -> int:
        """Measure how many tokens of one forward are fastest on this device; once, and not where a number was given.

        On a CPU the feed-forward products of one layer are timed, on CUDA whole forwards: for a second, and as long as
        the slowest of them takes. A loader calls it when it starts, unless it is deterministic or the encoder is
        trained.

        Returns:
            `max_forward_tokens`, as it is from now on.
        """
        tried = _TRIED_TOKENS.get(self.device.type) if not self.trainable else None
        fixed = self._max_forward_tokens or self._forward_tokens_limit
        if fixed is None and self.device not in self._found_forward_tokens and tried is not None:
            run = self._feed_forward() if self.device.type == "cpu" else self._dummy_forward
            with self._weights():
                found = fastest_forward_tokens(tried, run, self.device, FORWARD_TOKENS[self.device.type])
            self._found_forward_tokens[self.device] = found
            logger.info("forwards of %d tokens are fastest on %s", found, self.device)
        return self.max_forward_tokens

    def _feed_forward(self) -> Callable[[int], object]:
        size = cast(Any, self.model.config).hidden_size
        up = torch.zeros(4 * size, size, dtype=self.dtype, device="cpu")
        rows = torch.zeros(max(_TRIED_TOKENS["cpu"]), size, dtype=self.dtype, device="cpu")
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
        self._mode = mode
        super().train(False)
        self.training = mode and self.trainable
        if self.training:
            if any(parameter.requires_grad for parameter in self._trained_parameters()[-1]):
                self.model.train()
            for layer in layer_list(self.model):
                layer.train(any(parameter.requires_grad for parameter in layer.parameters()))
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Encoder:
        """As torch does, for all parameters; see `unfreeze`, which leaves out those that nothing uses."""
        if not requires_grad:
            super().train(False)  # before another thread encodes again
        with self._weights():  # what encodes from here on finds what optimizers have queued
            super().requires_grad_(requires_grad)
            self.trainable = requires_grad
            self.times_frozen += not requires_grad
        return self.train(self._mode)

    _mode = _said_half = False
    times_frozen = 0
    """How often it was frozen: vectors from before the last time may be of other weights."""

    def freeze(self) -> Encoder:
        """No parameter is trained any more; vectors may be cached from here on."""
        self._fingerprint = None  # the weights may have changed in ways that leave no trace
        return self.requires_grad_(False)

    def unfreeze(self, layers: int | None = None, *, parameters: Iterable[nn.Parameter] | None = None) -> Encoder:
        """Let parameters be trained, and only these, until `freeze` is called.

        Loaders of this encoder then hand out `TokenBatch`es, those that were encoded ahead too, and a cache is off. Put
        the encoder into a `BertEmbedding` to get vectors with gradients. Once `train()` was called, before or after
        this, what is trained has dropout.

        A DistributedDataParallel averages the parameters that were trained when it was made: make it anew afterwards.

        Args:
            layers: how many of the layers that are used, from the top (with a pooler that is used); 0 is none of them.
                None is all, and what stands outside the layers: the embedding layer, say.
            parameters: these instead, those of an adapter, say.
        Raises:
            ConfigError: there are not so many layers, or the parameters are none, or not this encoder's.
        """
        if parameters is None:
            groups = self._trained_parameters()
            if layers is not None and not 0 <= layers < len(groups):
                raise ConfigError(f"layers={layers}: {len(groups) - 1} layers are used; None is all of them and more")
            chosen = [p for group in groups[: None if layers is None else layers] for p in group]
        else:
            chosen = list(parameters)
            own = {id(parameter) for parameter in self.parameters()}
            foreign = sum(id(parameter) not in own for parameter in chosen)
            if layers is not None:
                raise ConfigError(f"layers={layers} and parameters=: say one of them")
            if not chosen or foreign:
                raise ConfigError(
                    f"parameters= holds {len(chosen)}, {foreign} of which are not this encoder's: choose from "
                    "encoder.parameters(). They lack the layers above layers=, and are copies where dtype= or device= "
                    "asked for another than the model's"
                )
        self.requires_grad_(False)
        note_training(chosen)
        with self._weights():  # what optimizers queue from here on waits for all that was encoded
            for parameter in chosen:
                parameter.requires_grad_(True)
            self.trainable = bool(chosen)
        self._said_half = self._said_half or warn_of_half(chosen)
        return self.train(self._mode)

    def split(self, at: int) -> tuple[Encoder, UpperEncoder]:
        """Two halves that together are this encoder: a lower one to stream and cache, an upper one to train.

        Parameters are shared with this encoder, which is frozen by it: nothing of the lower half is trained, all of the
        upper half is. What both halves use (all layers of albert, the relative positions of deberta and mpnet) is
        trained in the upper half, and the lower half keeps a copy as it is now.

        Args:
            at: how many layers the lower half has.
        Returns:
            An `Encoder` whose vectors are the hidden states behind its layers, one for each token that enters the
            model. Its fingerprint, by which a cache knows its vectors, depends on its own weights alone. And the
            module that takes its `Embeddings` and gives those of the whole: output, layers and pooling as here.
        Raises:
            ConfigError: `at` is out of range, or a layer below it is asked for.
        """
        top = max(self.layers)
        if not 1 <= at < top:
            raise ConfigError(f"split(at={at}): {top} layers are used, write a number from 1 to {top - 1}")
        if min(self.layers) < at:
            raise ConfigError(
                f"split(at={at}): layer {min(self.layers)} of layers={self.layers} is below it, and the upper half "
                "does not see it; split below the lowest layer that is asked for"
            )
        self.freeze()
        lower = Encoder(
            self.model,
            self._pretrained_tokenizer,
            layers=at,
            output_dtype=self.dtype,
            packed=None if self.batching.way == "packed" else False,
            max_forward_tokens=self._max_forward_tokens,
        )
        lower.tokenizer = self.tokenizer
        lower._forward_tokens_limit = self._forward_tokens_limit
        lower._every_window = True
        upper = UpperEncoder(_own_copy(self.model, "auto", "auto"), at, self)
        uppers = {id(parameter) for parameter in upper.parameters()}
        lowers = {id(parameter): parameter for parameter in lower.parameters()}
        if not uppers.isdisjoint(lowers):
            logger.warning(
                "both halves of %s use %d of its parameters: the lower half keeps them as they are now, the upper half "
                "trains them, and what is trained fits this lower half only",
                type(self.model).__name__,
                len(uppers & lowers.keys()),
            )
            alone: Any = {key: parameter for key, parameter in lowers.items() if key not in uppers}
            lower.model = copy.deepcopy(lower.model, alone)
        upper.requires_grad_(True)
        warn_of_half(upper.parameters())
        return lower, upper

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write model and tokenizer as transformers does, and as sentence-transformers does how sentences are pooled.

        Sentence vectors are then the same in sentence-transformers, and here where `output="sentence"` is asked for
        again. But not of texts that are cut or come in windows; nor where its folders have no word for what is pooled:
        `pooling="pooler"`, several in another order than cls, max, mean, weighted_mean, or `special_tokens=False`. Of
        an encoder that was split, this is the one to save.

        Raises:
            ConfigError: layers above the ones asked for were let go, or adapters are in the model, so that it could not
                be loaded; or transformers cannot write it.
        """
        if max(self.layers) < self._last_layer:
            raise ConfigError(
                f"layers={self.layers}: the layers above are not there to be saved; save the model that was handed in"
            )
        if any(hasattr(module, "base_layer") for module in self.model.modules()):
            raise ConfigError(
                "adapters of PEFT are in this model: save them by the PeftModel's own save_pretrained(), or save what "
                "its merge_and_unload() gives"
            )
        try:
            cast(Any, self.model).save_pretrained(folder)
        except RuntimeError as error:  # albert's groups, each of which is several of the layers
            raise ConfigError(
                f"transformers cannot write this {type(self.model).__name__} with layers={self.layers}: {error}; make "
                "the encoder that is to be saved with layers=-1"
            ) from error
        self._pretrained_tokenizer.save_pretrained(folder)
        known = self.output == "sentence" and self.layers == (self._last_layer,) and self.special_tokens
        pooling = self.pooling if known else ()
        save_pooling(folder, pooling, self.normalize, cast(Any, self.model).config.hidden_size)

    def __repr__(self) -> str:
        """In one line, unlike other modules: `print(encoder.model)` shows the layers."""
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"Encoder({type(self.model).__name__}, output={self.output!r}, layers={self.layers}, "
            f"embedding_dim={self.embedding_dim}, {self.batching.way}, {dtype}, {self.device})"
        )

    def forward(self, texts: Sequence[Text] | TokenBatch) -> Embeddings:
        """Encode texts (strings, lists of words, or pairs) or a `TokenBatch` at once; once unfrozen, as `embed`."""
        batch = texts if isinstance(texts, TokenBatch) else self.tokenizer.batch(texts)
        return self.embed(batch) if self.trainable else self.encode(batch)

    def encode(self, batch: TokenBatch, *, max_forward_tokens: int | None = None) -> Embeddings:
        """Encode a batch, longest texts together, in as many forwards as `max_forward_tokens` asks for.

        Whatever grad mode, inference mode or autocast the caller is in, the forward runs without them, and its result
        is an ordinary tensor that a trainable layer may take.

        Args:
            batch: the texts.
            max_forward_tokens: tokens of one forward in this call alone; None is the encoder's own number.
        Returns:
            A row for each token, word or text, in the order of the batch; on `device`, in `output_dtype`. A text
            without any token never enters the model; as a sentence it is a row of zeros.
        Raises:
            EncoderError: the batch holds a text that is longer than the model takes, or no words where word vectors
                were asked for; or a float16 forward overflowed.
        """
        with plain_mode(self.device):
            return self.embed(batch, max_forward_tokens=max_forward_tokens)

    def embed(self, batch: TokenBatch, *, max_forward_tokens: int | None = None) -> Embeddings:
        """As `encode`, but in the caller's modes: with gradients, autocast, and dropout while it is trained.

        Raises:
            EncoderError: as for `encode`.
        """
        if not isinstance(batch, TokenBatch):
            raise EncoderError(
                f"encode takes a TokenBatch, not a {type(batch).__name__}: for texts call encoder(texts)"
            )
        self._check_batch(batch)
        self._check_marks(batch)
        found = self._vectors(batch, max_forward_tokens=max_forward_tokens)
        if not self._checked_finite:
            self._check_finite(found)
        return found

    def fingerprint(self) -> bytes | None:
        """What stands for everything that changes the vectors of given tokens: weights, config and settings.

        The weights are read once, and again when they may be others: after any of them required a gradient, was
        written to in place, moved or converted, and after `freeze`. What writes through `.data` (the averages of an
        EMA, say) leaves no trace: call `freeze` behind it.

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
            about = (settings, self.output_dtype, *(["every window"] if self._every_window else []))
            with self._weights():
                known = state, hash_weights(self.model, repr(about), config.to_dict())
            self._fingerprint = known
        return known[1]

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
        return super().__getstate__() | {"_fingerprint": None}


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


def _without_peft(model: Any) -> nn.Module:
    """The model that a PeftModel is around, with the adapters that are in its layers."""
    if not hasattr(model, "get_base_model"):
        return cast(nn.Module, model)
    if getattr(model.active_peft_config, "is_prompt_learning", False):
        raise ConfigError(
            f"{model.peft_type} puts tokens before each text in the PeftModel's own forward, which does not run here: "
            "choose adapters that are in the layers, such as LoRA"
        )
    return cast(nn.Module, model.get_base_model())


def _config_of(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    lacking = [name for name in ("vocab_size", "hidden_size", "num_hidden_layers") if not hasattr(config, name)]
    if lacking:
        raise ConfigError(f"{type(model).__name__} is no transformers text encoder: its config has no {lacking[0]}")
    return config


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
