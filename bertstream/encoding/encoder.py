"""A pretrained BERT that turns texts into embeddings: made from a model or by name, split in two, saved."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..embeddings import Output
from ..errors import ConfigError, EncoderError
from ..system.cuda import resolve_device
from .autotune import fastest_dtype
from .forward_size import ForwardSize
from .output_spec import OutputSpec
from .own_model import own_copy, without_peft
from .pooling import Combine, SentencePooling, WordPooling
from .pretrained import (
    DType,
    HubOptions,
    check_config,
    convert,
    find_pretrained,
    longest_text,
    save_model,
    torch_dtype,
)
from .self_test import probe_batching
from .sentence_folder import SentenceFolder, remove_sentence_folder, write_sentence_folder
from .sentence_head import HEAD, with_head
from .text_forward import TextForward
from .tokenizer import Overflow, TextTokenizer, WordSplitter, check_cutting, renamed_splitter
from .upper import UpperEncoder, cannot_split, upper_half
from .vocabulary import check_vocabulary, num_ids
from .word_cache import LIMIT

logger = logging.getLogger(__name__)


class Encoder(TextForward):
    """Turns texts, or a `TokenBatch`, into `Embeddings`; frozen until `unfreeze`.

    The model's structure is copied and its parameters are shared; the user's model object stays as it is (until `.to()`
    moves the parameters, in place as in torch, and so for both). A frozen encoder stays in eval mode whatever `train()`
    says. Forwards run one at a time, so several loaders and a model may use the same encoder.

    Args:
        model: a transformers encoder (`AutoModel`) with its weights, or a PeftModel around one.
        tokenizer: the model's transformers tokenizer, fast or written in Python; None takes ids alone.
        output: "tokens" for a vector a token; "words" for a vector a word; "sentence" for a vector a text.
        layers: the layer or layers that vectors are made of: 0 is the embedding layer, -1 the last. The forward stops
            at the highest.
        combine: how several layers become one: "concat" side by side, "mean", "sum", or "stack" ([N, K, H], see
            `ScalarMix`).
        pooling: of a word's tokens: "mean" (the default), "first", "last", "max" or "first_last". Of a text's tokens:
            "mean" (the default), "cls", "last", "max", "weighted_mean", "mean_sqrt_len" (the sum by the root of their
            number), "pooler" (the model's own layer over the first token), or several, side by side.
        special_tokens: whether the tokens that frame a text have rows in token output, and count in the pooling of
            sentences.
        normalize: whether sentence vectors are scaled to length 1.
        word_splitter: a function from a string to its words, for word output; None splits at whitespace.
        dtype: of the model while it encodes. "auto" keeps its own (see `from_pretrained` for what it does there). A
            dtype or device other than the model's copies the weights.
        device: "auto" keeps the model's own.
        output_dtype: dtype of the vectors; float32 fits a downstream layer of default dtype.
        overflow: for a text that is longer than the model takes: "error"; "truncate", on the tokenizer's
            `truncation_side`; or "windows", which covers it with overlapping windows and takes each word's vector from
            the window in which it is farthest from an edge.
        stride: tokens by which windows overlap.
        max_length: tokens of the longest text or window; None is what the model and the tokenizer allow.
        prompt: a text to put before each text, before the first one of a pair, for sentence output.
        packed: None packs texts into one row where the model allows it, True refuses a model that does not, False
            does not pack.
        max_forward_tokens: tokens of one forward; None is 2,048 on the CPU and 16,384 on CUDA, until `calibrate` finds
            a better number.
        word_cache: bytes in each process that tokenizes for the ids of words, which most texts repeat: 64 MiB hold some
            250,000 words, and are little beside a worker's 300 MB. False or 0 keeps none. Tokens are the same.
        split: deprecated alias of `word_splitter`, removed in the next version.
    Attributes:
        tokenizer: the `TextTokenizer`, light enough for worker processes; its `batch(texts)` is what `encode` takes.
            transformers' own is `AutoTokenizer.from_pretrained(encoder.model.config._name_or_path)`.
        spec: what it returns, as one `OutputSpec`; its fields are attributes of the encoder too.
        batching: the self-test's result: whether texts run fused, packed, padded or grouped by length (`way`), and why
            (`reason`).
        trainable: whether it was unfrozen: then `BertEmbedding` gives vectors with gradients, and loaders yield
            `TokenBatch`es for it to embed.
    Raises:
        ConfigError: an argument is out of range.
        EncoderError: `packed` is True and the model cannot be packed, no way is right for these layers, or the
            tokenizer is not the model's.
    """

    _folder = SentenceFolder()

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
        word_splitter: WordSplitter | None = None,
        dtype: DType = "auto",
        device: torch.device | str = "auto",
        output_dtype: torch.dtype = torch.float32,
        overflow: Overflow = "error",
        stride: int = 0,
        max_length: int | None = None,
        prompt: str | None = None,
        packed: bool | None = None,
        max_forward_tokens: int | None = None,
        word_cache: int = LIMIT,
        split: WordSplitter | None = None,
    ) -> None:
        word_splitter = renamed_splitter(word_splitter, split)
        spec = OutputSpec.of(
            output=output,
            layers=layers,
            combine=combine,
            pooling=pooling,
            special_tokens=special_tokens,
            normalize=normalize,
            output_dtype=output_dtype,
        )
        check_cutting(output, word_splitter, overflow, stride, max_length, prompt, word_cache)
        size = ForwardSize(max_forward_tokens)
        model = without_peft(model)
        config: Any = getattr(model, "config", None)
        check_config(config, type(model).__name__)
        check_vocabulary(tokenizer, config, type(model).__name__, saved_together=False)
        num_layers: int = config.num_hidden_layers
        spec = spec.resolved(num_layers)
        if "pooler" in spec.pooling and getattr(model, "pooler", None) is None:
            raise ConfigError(f"pooling='pooler': {type(model).__name__} has no pooler, or its weights were not saved")
        own = own_copy(model, device, dtype)
        spec = with_head(spec, own, num_layers)
        special_ids = [getattr(tokenizer, f"{name}_token_id", None) for name in ("mask", "pad", "unk")]
        own, batching = probe_batching(own, spec.layers, num_layers, packed, special_ids)
        longest = longest_text(tokenizer, config, max_length, batching.first_position)
        texts = TextTokenizer(
            tokenizer,
            max_length=longest.tokens,
            limit=longest.said,
            prompt=prompt or "",
            overflow=overflow,
            stride=stride,
            word_splitter=word_splitter or (str.split if output == "words" and tokenizer is not None else None),
            segments="token_type_ids" in getattr(tokenizer, "model_input_names", ()),
            word_cache=word_cache,
            vocab_size=num_ids(config),
        )
        super().__init__(own, spec, batching, num_layers, size, texts)
        logger.info("%s runs %s: %s", type(model).__name__, batching.way, batching.reason)
        self._pretrained_tokenizer = tokenizer

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        output: Output = "tokens",
        layers: int | Sequence[int] = -1,
        combine: Combine = "concat",
        pooling: WordPooling | SentencePooling | Sequence[SentencePooling] | None = None,
        special_tokens: bool = True,
        normalize: bool | None = None,
        word_splitter: WordSplitter | None = None,
        dtype: DType = "auto",
        device: torch.device | str = "auto",
        output_dtype: torch.dtype = torch.float32,
        overflow: Overflow = "error",
        stride: int = 0,
        max_length: int | None = None,
        prompt: str | None = None,
        packed: bool | None = None,
        max_forward_tokens: int | None = None,
        word_cache: int = LIMIT,
        split: WordSplitter | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        trust_remote_code: bool = False,
        cache_dir: str | os.PathLike[str] | None = None,
        subfolder: str = "",
        local_files_only: bool = False,
    ) -> Encoder:
        """Load an encoder by name. The options are those of `Encoder`, except for what is said here.

        Args:
            name: a folder with `config.json`, weights and tokenizer; or a name, looked up among the installed packages
                that carry weights, then on the Hugging Face hub.
            pooling: None follows a sentence-transformers folder's own pooling, dense layers and normalisation, for
                sentence output of the last layer.
            normalize: None is False where no folder says otherwise.
            max_length: None follows such a folder's own `max_seq_length`, for sentence output.
            prompt: also the name of one of such a folder's prompts. None follows the folder's default prompt, "" puts
                nothing before texts.
            dtype: "auto" is bfloat16 if a short measurement finds its matrix products faster than float32's (every
                recent GPU, some CPUs), else float32. The weights are read as float32 and then converted.
            device: "auto" is the process's CUDA device if there is one, else the CPU.
            revision, token, trust_remote_code, cache_dir, subfolder, local_files_only: as transformers takes them.
        Raises:
            ConfigError: an argument is out of range; raised before weights are loaded, unless only they show it.
            EncoderError: there is no model of that name; the message says what to install or download.
        """
        word_splitter = renamed_splitter(word_splitter, split)
        spec = OutputSpec.of(
            output=output,
            layers=layers,
            combine=combine,
            pooling=pooling,
            special_tokens=special_tokens,
            normalize=False if normalize is None else normalize,
            output_dtype=output_dtype,
        )
        check_cutting(output, word_splitter, overflow, stride, max_length, prompt, word_cache)
        ForwardSize(max_forward_tokens)
        device = resolve_device(device)
        resolved = None if dtype == "auto" else torch_dtype(dtype)
        hub = HubOptions(revision, token, trust_remote_code, cache_dir, subfolder, local_files_only)
        found = find_pretrained(os.path.expanduser(name), hub)
        longest_text(found.tokenizer, found.config, max_length)
        num_layers: int = found.config.num_hidden_layers
        followed = found.followed(spec.resolved(num_layers), pooling, normalize, prompt, max_length)
        if resolved is None:
            resolved = fastest_dtype(device, found.config.hidden_size)
        model = found.load_model().requires_grad_(False)
        followed.add_head(model, found)
        convert(model, device, resolved)  # in place: the constructor would copy
        followed.lowercase(found.tokenizer)
        encoder = cls(
            model,
            found.tokenizer,
            output=output,
            layers=layers,
            combine=combine,
            pooling=followed.pooling,
            special_tokens=special_tokens,
            normalize=followed.normalize,
            word_splitter=word_splitter,
            output_dtype=output_dtype,
            overflow=overflow,
            stride=stride,
            max_length=followed.max_length,
            prompt=followed.prompt,
            packed=packed,
            max_forward_tokens=max_forward_tokens,
            word_cache=word_cache,
        )
        encoder._folder = followed.folder
        followed.finish(encoder.tokenizer, max_length)
        return encoder

    def __repr__(self) -> str:
        """One line; `print(encoder.model)` shows the layers."""
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"Encoder({type(self.model).__name__}, output={self.output!r}, layers={self.layers}, "
            f"embedding_dim={self.embedding_dim}, {self.batching.way}, {dtype}, {self.device})"
        )

    def split(self, at: int) -> tuple[Encoder, UpperEncoder]:
        """Split into two halves: a lower one to stream and cache, an upper one to train.

        Both share this encoder's parameters. The encoder is frozen; the upper half's parameters are trained. Weights
        that both halves use (all layers of albert, the relative positions of deberta and mpnet) are trained in the
        upper half, and the lower half keeps a copy of their present values.

        Args:
            at: how many layers the lower half has.
        Returns:
            The lower half, an `Encoder` of the hidden states after its layers, one row for each token that enters the
            model; its fingerprint, the cache's name for its vectors, depends on its own weights only. And the upper
            half, a module from these `Embeddings` to those of the whole, with this encoder's output, layers and
            pooling.
        Raises:
            ConfigError: `at` is out of range, or above a layer of `layers`; or the model cannot be split.
        """
        top = max(self.layers)
        if not isinstance(at, int) or not 1 <= at < top:
            raise ConfigError(f"split(at={at!r}): {top} layers are used, write a number from 1 to {top - 1}")
        if min(self.layers) < at:
            raise ConfigError(
                f"split(at={at}): layer {min(self.layers)} of layers={self.layers} is below it, where the upper half "
                "does not see it; split at or below the lowest layer of layers="
            )
        self.freeze()
        packed = None if self.batching.packs else False
        try:
            lower = Encoder(self.model, self._pretrained_tokenizer, layers=at, output_dtype=self.dtype, packed=packed)
        except EncoderError as error:
            raise cannot_split(self.model, at) from error
        lower.tokenizer = self.tokenizer
        lower.spec = dataclasses.replace(lower.spec, every_window=True)
        lower._size = ForwardSize(self._size.given, limit=self._size.limit)  # its own layers are measured again
        return lower, upper_half(at, self, lower)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write model and tokenizer as transformers does, and the pooling as sentence-transformers does.

        Sentence vectors are then the same in sentence-transformers, and here with `output="sentence"`; prompt,
        `max_length` and a folder's dense layers are saved too. Exceptions: texts that come in windows;
        `pooling="pooler"`; several poolings in another order than cls, max, mean, mean_sqrt_len, weighted_mean, last;
        and `special_tokens=False`. Of a split encoder, save the whole.

        Raises:
            ConfigError: the layers above the highest of `layers` were dropped, or adapters are in the model, so it
                could not be loaded again; or transformers cannot write it.
        """
        if max(self.layers) < self._num_layers:
            raise ConfigError(
                f"layers={self.layers}: the layers above were dropped and cannot be saved; save the model that this "
                "encoder was made from"
            )
        folder = os.path.expanduser(folder)
        save_model(folder, self.model, self._pretrained_tokenizer)
        remove_sentence_folder(folder)
        if self.output == "sentence" and self.layers == (self._num_layers,) and self.special_tokens:
            like = dataclasses.replace(
                self._folder,
                pooling=self.pooling,
                normalize=self.normalize,
                include_prompt=self.tokenizer.prompt_counts,
                max_length=self.tokenizer.max_length,
                default_prompt=self.tokenizer.prompt,
            )
            head = getattr(self.model, HEAD, None)
            write_sentence_folder(folder, like, head, self._hidden_size)
