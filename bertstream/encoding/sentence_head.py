"""The dense layers that some sentence-transformers folders have after their pooling.

They are a module of the model, like its pooler: they move, are trained, split and hashed with it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError, EncoderError
from .output_spec import OutputSpec

HEAD = "sentence_head"
"""The attribute of the model that holds them, an `nn.Sequential`."""


class Dense(nn.Module):
    """A linear layer and its activation, as sentence-transformers' module of that name computes them.

    Args:
        in_features, out_features, bias: of the linear layer.
        activation: after it.
        residual: whether the input is added to the result, through a linear layer where the sizes differ.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, activation: nn.Module, residual: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias=bias)
        self.activation_function = activation
        self.adds_input = residual
        self.residual = nn.Linear(in_features, out_features, bias=False) if in_features != out_features else None
        if not residual:
            self.residual = None

    def forward(self, vectors: Tensor) -> Tensor:
        """[B, in_features] to [B, out_features]."""
        out: Tensor = self.activation_function(self.linear(vectors))
        if self.adds_input:
            out = out + (vectors if self.residual is None else self.residual(vectors))
        return out

    @property
    def settings(self) -> tuple[object, ...]:
        """What changes the result, beside the weights."""
        return "Dense", self.linear.out_features, type(self.activation_function).__name__, self.adds_input

    @property
    def config(self) -> dict[str, object]:
        """As sentence-transformers writes it."""
        activation = type(self.activation_function)
        return {
            "in_features": self.linear.in_features,
            "out_features": self.linear.out_features,
            "bias": self.linear.bias is not None,
            "activation_function": f"{activation.__module__}.{activation.__qualname__}",
        } | ({"use_residual": True} if self.adds_input else {})


class Normalize(nn.Module):
    """Scales vectors to length 1, between two dense layers."""

    settings, config = ("Normalize",), dict[str, object]()

    def forward(self, vectors: Tensor) -> Tensor:
        """[B, H] to [B, H]."""
        return F.normalize(vectors, dim=-1)


@dataclasses.dataclass(frozen=True)
class HeadModule:
    """One module of a head, as a folder describes it.

    Attributes:
        path: its own folder.
        config: of a `Dense`; None for a `Normalize`.
    """

    path: str
    config: Mapping[str, Any] | None = None


def unknown_dense(config: Mapping[str, Any]) -> list[str]:
    """The settings of a `Dense` that this package does not follow, each as "name=value"."""
    known = {"module_input_name": "sentence_embedding", "module_output_name": "sentence_embedding"}
    wrong = [
        f"{name}={config[name]!r}" for name, right in known.items() if config.get(name, right) not in (right, None)
    ]
    name = config.get("activation_function")
    return wrong if _activation(name) is not None else [*wrong, f"activation_function={name!r}"]


def _activation(name: str | None) -> nn.Module | None:
    """The activation of that name, if torch has it; sentence-transformers' default is the tanh."""
    if name is None:
        return nn.Tanh()
    kind = getattr(nn, name.rpartition(".")[2], None) if name.startswith("torch.nn.") else None
    if not isinstance(kind, type) or not issubclass(kind, nn.Module):
        return None
    try:
        return kind()
    except TypeError:  # a module with arguments is no activation
        return None


def load_head(modules: Sequence[HeadModule], find: Callable[[str], str | None]) -> nn.Sequential:
    """Make the modules and read their weights.

    Args:
        modules: in their order.
        find: gives the local path of a folder's file, or None.
    Raises:
        EncoderError: a module has no weights, or others than its config says.
    """
    head = nn.Sequential()
    for module in modules:
        if module.config is None:
            head.append(Normalize())
            continue
        config, activation = module.config, _activation(module.config.get("activation_function"))
        assert activation is not None  # `unknown_dense` was empty
        dense = Dense(
            config["in_features"],
            config["out_features"],
            config.get("bias", True),
            activation,
            config.get("use_residual", False),
        )
        try:
            dense.load_state_dict(_weights(module.path, find))
        except RuntimeError as error:
            raise EncoderError(f"the weights in {module.path} are not those of its config.json: {error}") from error
        head.append(dense)
    return head


def _weights(path: str, find: Callable[[str], str | None]) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    if (file := find(f"{path}/model.safetensors")) is not None:
        return load_file(file)
    if (file := find(f"{path}/pytorch_model.bin")) is not None:
        found: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
        return found
    raise EncoderError(f"{path} holds neither model.safetensors nor pytorch_model.bin")


def with_head(spec: OutputSpec, model: nn.Module, num_layers: int) -> OutputSpec:
    """The same spec with the model's head, where it is used: for sentences of the last layer.

    Args:
        spec: with layers counted from 0.
        model: of the encoder's own structure; a head that is not used is taken off.
        num_layers: the model's.
    Raises:
        ConfigError: the head takes vectors of another size.
    """
    head: Any = getattr(model, HEAD, None)
    if head is None:
        return spec
    if spec.output != "sentence" or spec.layers != (num_layers,) or spec.combine == "stack":
        delattr(model, HEAD)
        return spec
    dense = [module for module in head if isinstance(module, Dense)]
    found = spec.embedding_dim(cast(Any, model.config).hidden_size)
    if dense[0].linear.in_features != found:
        raise ConfigError(
            f"pooling={spec.pooling} makes vectors of {found} numbers, and the model's Dense takes "
            f"{dense[0].linear.in_features}: leave pooling= out"
        )
    settings = tuple(module.settings for module in head)
    return dataclasses.replace(spec, head=settings, head_dim=dense[-1].linear.out_features)
