"""What the files of a sentence-transformers folder say, of versions 2 to 6: read, followed and written.

They are followed for sentence output. Tokens and words are those of plain transformers.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from safetensors.torch import save_file
from torch import nn

from ..errors import ConfigError, EncoderError, shortened
from .pooling import SentencePooling
from .sentence_head import Dense, HeadModule, unknown_dense

logger = logging.getLogger(__name__)

# sentence-transformers' names of poolings, old flags and new names, in the order in which flags are concatenated.
_POOLING_MODES: dict[str, SentencePooling] = {
    "cls_token": "cls",
    "cls": "cls",
    "max_tokens": "max",
    "max": "max",
    "mean_tokens": "mean",
    "mean": "mean",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
    "weightedmean_tokens": "weighted_mean",
    "weightedmean": "weighted_mean",
    "lasttoken": "last",
}
_POOLING_FLAGS = (
    "cls_token",
    "max_tokens",
    "mean_tokens",
    "mean_sqrt_len_tokens",
    "weightedmean_tokens",
    "lasttoken",
)

_TRANSFORMER_CONFIGS = [
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
]

# Settings of the transformer module that do not change the vectors of `SentenceTransformer.encode`, or change nothing
# with these values: the values that are harmless, or None for any.
_HARMLESS: dict[str, tuple[object, ...] | None] = {
    "max_seq_length": None,  # followed
    "do_lower_case": None,  # followed
    "modality_config": None,  # looked into
    "unpad_inputs": None,
    "query_length": None,  # for encode_query() and encode_document()
    "document_length": None,
    "query_expansion": None,
    "transformer_task": ("feature-extraction",),
    "module_output_name": ("token_embeddings",),
}
_HARMLESS_ARGUMENTS = {
    "attn_implementation",
    "dtype",
    "torch_dtype",
    "add_pooling_layer",
    "trust_remote_code",
    "use_fast",
    "padding_side",  # nothing is padded here, or where it is, on the right
}
_PLAIN_TEXT = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}


@dataclass(frozen=True)
class SentenceFolder:
    """How a sentence-transformers folder makes sentence vectors.

    Attributes:
        subfolder: where its transformer is; empty for the folder itself.
        pooling: the poolings that it concatenates, in its order.
        head: the modules after the pooling, but for a last Normalize.
        normalize: whether vectors are scaled to length 1 at the end.
        include_prompt: whether a prompt's tokens count in the pooling.
        max_length: tokens of the longest text; None where it says nothing.
        lowercase: whether texts are lowercased first.
        prompts: name -> text.
        default_prompt: the prompt that is put before texts unless another is chosen; empty for none.
        unknown_modules: what is not known here of the way from tokens to vectors.
        unknown_settings: what is not known here of the way from texts to tokens.
    """

    subfolder: str = ""
    pooling: tuple[str, ...] = ("mean",)
    head: tuple[HeadModule, ...] = ()
    normalize: bool = False
    include_prompt: bool = True
    max_length: int | None = None
    lowercase: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str = ""
    unknown_modules: tuple[str, ...] = ()
    unknown_settings: tuple[str, ...] = ()

    def prompt_of(self, prompt: str | None) -> str:
        """The prompt of that name, or the text itself; None is the folder's default.

        Raises:
            ConfigError: it looks like a name, and the folder has none of that name.
        """
        if prompt is None:
            return self.default_prompt
        if prompt in self.prompts:
            return self.prompts[prompt]
        if re.fullmatch(r"[\w.-]+", prompt, re.ASCII):
            names = (
                f"the folder's prompts are {sorted(self.prompts)}" if self.prompts else "the folder names no prompts"
            )
            raise ConfigError(
                f"prompt={prompt!r}: {names}; the text of a prompt ends in a blank or a sign, such as '{prompt}: ', or "
                "its first word would be glued to it"
            )
        return prompt


def read_sentence_folder(read: Callable[[str], Any]) -> SentenceFolder | None:
    """Read all of a folder's settings.

    Args:
        read: gives the content of one of the folder's JSON files, or None.
    Returns:
        None if it is no sentence-transformers folder.
    Raises:
        EncoderError: a file does not hold what its name says, or the default prompt is none of the prompts.
    """
    listed = read("modules.json")
    if listed is None:
        return None
    if not (isinstance(listed, list) and all(isinstance(m, dict) and isinstance(m.get("type"), str) for m in listed)):
        raise EncoderError(f'modules.json holds {shortened(listed)}: it must be a list of modules, each with a "type"')
    modules = [(_kind(module["type"]), module.get("path", "")) for module in listed]
    transformer = modules[0][1] if modules and modules[0][0] == "Transformer" else ""
    unknown = [] if modules and modules[0][0] == "Transformer" else ["its first module is no Transformer"]
    pooled: Mapping[str, Any] = {}
    if modules[1:] and modules[1][0] == "Pooling":
        pooled = _settings(read, f"{modules[1][1]}/config.json")
    else:
        unknown.append("its second module is no Pooling")
    pooling, not_known = _pooling(pooled)
    unknown += not_known
    head = []
    for kind, path in modules[2:]:
        if kind == "Dense":
            config = _settings(read, f"{path}/config.json")
            head.append(HeadModule(path, config))
            unknown += [f"{path}/config.json: {setting}" for setting in unknown_dense(config)]
        elif kind == "Normalize":
            head.append(HeadModule(path))
        elif kind != "Dropout":  # which does nothing outside of training
            unknown.append(f"module {kind}")
    normalize = bool(head) and head[-1].config is None
    while head and head[-1].config is None:
        head.pop()
    names = [f"{transformer}/{name}".removeprefix("/") for name in _TRANSFORMER_CONFIGS]
    settings: Mapping[str, Any] = next((found for name in names if (found := _settings(read, name))), {})
    longest = settings.get("max_seq_length")
    if not (longest is None or (type(longest) is int and longest > 0)):
        raise EncoderError(
            f"the folder's max_seq_length is {shortened(longest)}: it must be a number of tokens, or null"
        )
    about = _settings(read, "config_sentence_transformers.json")
    named = about.get("prompts") or {}
    if not (isinstance(named, dict) and all(isinstance(text, str | None) for text in named.values())):
        raise EncoderError(
            f"config_sentence_transformers.json: prompts={shortened(named)}, which must be texts by their names"
        )
    prompts = {name: text or "" for name, text in named.items()}
    chosen = about.get("default_prompt_name")
    if chosen is not None and chosen not in {"query", "document", *prompts}:
        raise EncoderError(
            f"config_sentence_transformers.json: default_prompt_name={chosen!r} is none of its prompts "
            f"{sorted(prompts)}; prompt= chooses one, once the name is corrected or removed"
        )
    return SentenceFolder(
        subfolder=transformer,
        pooling=pooling,
        head=tuple(head),
        normalize=normalize,
        include_prompt=pooled.get("include_prompt", True),
        max_length=longest,
        lowercase=bool(settings.get("do_lower_case")),
        prompts=prompts,
        default_prompt=prompts.get(chosen, "") if chosen is not None else "",
        unknown_modules=tuple(unknown),
        unknown_settings=tuple(_unknown_settings(settings)),
    )


def _settings(read: Callable[[str], Any], file: str) -> Mapping[str, Any]:
    """The object in a JSON file; empty where there is no such file."""
    found = read(file)
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise EncoderError(f"{file} holds {shortened(found)}: it must be a JSON object")
    return found


def _kind(module: str) -> str:
    """A module's name within sentence-transformers, or all of it for code of others."""
    return module.rpartition(".")[2] if module.startswith("sentence_transformers.") else module


def _pooling(config: Mapping[str, Any]) -> tuple[tuple[str, ...], list[str]]:
    named = config.get("pooling_mode")
    modes = [named] if isinstance(named, str) else named
    if modes is None:
        flag = "pooling_mode_"
        chosen = {name.removeprefix(flag) for name, on in config.items() if name.startswith(flag) and on}
        modes = [*(mode for mode in _POOLING_MODES if mode in chosen), *sorted(chosen - _POOLING_MODES.keys())]
    known = tuple(_POOLING_MODES[mode] for mode in modes if mode in _POOLING_MODES)
    return known or ("mean",), [f"pooling {mode}" for mode in modes if mode not in _POOLING_MODES]


def _unknown_settings(config: Mapping[str, Any]) -> list[str]:
    """The settings of the transformer module that change vectors and are not followed."""
    unknown = []
    for name, value in config.items():
        if name.endswith(("_args", "_kwargs")) and isinstance(value, dict):
            if name == "processing_kwargs":  # chat templates are refused with their modality
                unknown += [f"{name}={value!r}"] if value.keys() - {"chat_template"} and any(value.values()) else []
            else:
                unknown += [f"{name}: {key}={value[key]!r}" for key in value.keys() - _HARMLESS_ARGUMENTS]
        elif name == "modality_config":
            unknown += [] if value == _PLAIN_TEXT else [f"{name}={value!r}"]
        elif (harmless := _HARMLESS.get(name, ())) is not None and value and value not in harmless:
            unknown.append(f"{name}={value!r}")
    return unknown


def write_sentence_folder(
    folder: str | os.PathLike[str], like: SentenceFolder, head: nn.Sequential | None, hidden_size: int
) -> None:
    """Write into a saved model's folder how sentences are made, in the form that `read_sentence_folder` reads.

    sentence-transformers wrote this form before version 6, and every version reads it.

    Args:
        folder: holds the model.
        like: what to write; of its `head` nothing.
        head: the modules after the pooling.
        hidden_size: of the model.
    """
    flags = {flag: _POOLING_MODES[flag] in like.pooling for flag in _POOLING_FLAGS}
    if [_POOLING_MODES[flag] for flag, chosen in flags.items() if chosen] != list(like.pooling):
        logger.warning(
            "%s does not say how sentences are pooled: sentence-transformers has no name for %s",
            folder,
            list(like.pooling),
        )
        return
    root = Path(folder)
    pooled: dict[str, Any] = {"word_embedding_dimension": hidden_size}
    # Early versions refuse settings that they do not know.
    pooled |= {f"pooling_mode_{flag}": on for flag, on in flags.items() if on or flag not in _POOLING_FLAGS[-2:]}
    pooled |= {} if like.include_prompt else {"include_prompt": False}
    modules: list[tuple[str, Mapping[str, Any]]] = [
        ("Transformer", {}),
        ("Pooling", pooled),
        *((type(module).__name__, cast(Any, module).config) for module in head or ()),
        *([("Normalize", {})] if like.normalize else []),
    ]
    listed = []
    for number, (kind, config) in enumerate(modules):
        path = f"{number}_{kind}" if number else ""
        listed.append(
            {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        )
        (root / path).mkdir(exist_ok=True)
        if config:
            _write(root / path / "config.json", config)
        module = None if head is None or not 2 <= number < 2 + len(head) else head[number - 2]
        if isinstance(module, Dense):
            weights = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
            save_file(weights, str(root / path / "model.safetensors"))
    prompts = dict(like.prompts)
    chosen = next((name for name, text in prompts.items() if text == like.default_prompt), "default")
    if like.default_prompt:
        prompts[chosen] = like.default_prompt
    if prompts:
        named = {"prompts": prompts, "default_prompt_name": chosen if like.default_prompt else None}
        _write(root / "config_sentence_transformers.json", named)
    _write(root / "sentence_bert_config.json", {"max_seq_length": like.max_length, "do_lower_case": like.lowercase})
    _write(root / "modules.json", listed)


def remove_sentence_folder(folder: str | os.PathLike[str]) -> None:
    """Remove what an earlier model in this folder said of its sentences."""
    for name in ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"):
        (Path(folder) / name).unlink(missing_ok=True)


def _write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")
