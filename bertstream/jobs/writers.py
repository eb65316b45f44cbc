"""Write records and their vectors as Parquet, WebDataset tars or safetensors, for other programs to read."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import ConfigError, check_choice

PartFormat: TypeAlias = Literal["parquet", "webdataset", "safetensors"]


@dataclass
class Part:
    """Records and their vectors: the content of one file.

    Attributes:
        keys: a name for each record, unique in its shard.
        shards: the path or URL of each record's shard.
        indices: [B] int64, each record's index in its shard.
        lengths: [B] int64, rows of each record; None if each record has exactly one vector.
        values: [N, ...] on the CPU, the rows record by record; [B, ...] if `lengths` is None.
    """

    keys: list[str]
    shards: list[str]
    indices: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64] | None
    values: Tensor


def ending_of(format: PartFormat) -> str:
    """The file name ending of a format."""
    return _FORMATS[format].ending


def check_format(format: PartFormat, dtype: torch.dtype) -> None:
    """Refuse a format that is unknown, cannot hold this dtype, or needs a package that is not installed.

    Raises:
        ConfigError: with what to write or install instead.
    """
    check_choice("format", format, PartFormat)
    if format != "safetensors" and dtype == torch.bfloat16:
        raise ConfigError(f"format={format!r} has no bfloat16: give the encoder output_dtype=torch.float16 or float32")
    package = _FORMATS[format].package
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"format={format!r} needs {package}: pip install 'bertstream[{format}]'")


def write_part(path: Path, part: Part, format: PartFormat) -> None:
    """Write a file.

    A Parquet row has `key`, `shard`, `index` and `vector`: a list of H numbers, or for tokens and words a list of such
    lists. A WebDataset record has `npy`, [H] or [L, H], and `json` with key, shard and index; its own key is a number.
    A safetensors file has `values` [N, H], `index` [B] and, for tokens and words, `cu_seqlens` [B + 1]; its metadata
    holds `keys` and `shards` as JSON lists.

    Raises:
        OSError: the file cannot be written.
    """
    _FORMATS[format].write(path, part)


def whole_or_nothing(path: Path, write: Callable[[Path], object]) -> None:
    """Let a function write a file under a temporary name, sync it to disk, then rename it.

    The file is complete or absent, even if the process or the machine stops.

    Raises:
        OSError: with the file's path, which that of a full disk lacks; nothing of the file is left.
    """
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        write(unfinished)
        for place in (unfinished, path.parent):
            if place is not unfinished:
                os.replace(unfinished, path)
            descriptor = os.open(place, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    except OSError as error:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        if error.filename is not None:
            raise
        raise OSError(error.errno or errno.EIO, error.strerror or str(error), os.fspath(path)) from error


def _write_parquet(path: Path, part: Part) -> None:
    import pyarrow
    import pyarrow.parquet

    vectors = pyarrow.array(part.values.numpy().reshape(-1))
    for size in reversed(part.values.shape[1:]):
        vectors = pyarrow.FixedSizeListArray.from_arrays(vectors, size)
    if part.lengths is not None:
        offsets = np.concatenate([[0], np.cumsum(part.lengths)]).astype(np.int32)
        vectors = pyarrow.ListArray.from_arrays(pyarrow.array(offsets), vectors)
    columns = {"key": part.keys, "shard": part.shards, "index": part.indices, "vector": vectors}
    # Vectors look like noise: compression, dictionaries and statistics cost time and save nothing.
    pyarrow.parquet.write_table(
        pyarrow.table(columns), path, compression="NONE", use_dictionary=["shard"], write_statistics=["index", "key"]
    )


def _write_tar(path: Path, part: Part) -> None:
    from webdataset import TarWriter

    rows = part.values.numpy() if part.lengths is None else np.split(part.values.numpy(), np.cumsum(part.lengths[:-1]))
    with open(path, "wb") as file, TarWriter(file, mtime=0) as tar:
        for number, (key, shard, index) in enumerate(zip(part.keys, part.shards, part.indices.tolist(), strict=True)):
            place = {"key": key, "shard": shard, "index": index}
            tar.write({"__key__": f"{path.name.partition('.')[0]}-{number:06d}", "npy": rows[number], "json": place})


def _write_safetensors(path: Path, part: Part) -> None:
    from safetensors.torch import save

    tensors = {"values": part.values.contiguous(), "index": torch.from_numpy(part.indices)}
    if part.lengths is not None:
        tensors["cu_seqlens"] = torch.from_numpy(np.concatenate([[0], np.cumsum(part.lengths)]))
    # Not `save_file`: it makes files that only their owner can read.
    path.write_bytes(save(tensors, {"keys": json.dumps(part.keys), "shards": json.dumps(part.shards)}))


class _Format(NamedTuple):
    ending: str
    package: str
    write: Callable[[Path, Part], Any]


_FORMATS = {
    "parquet": _Format(".parquet", "pyarrow", _write_parquet),
    "webdataset": _Format(".tar", "webdataset", _write_tar),
    "safetensors": _Format(".safetensors", "safetensors", _write_safetensors),
}
