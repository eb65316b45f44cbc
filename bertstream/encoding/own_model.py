"""The encoder's own model: the user's structure copied, its parameters shared, PEFT's wrapper taken off."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import nn

from ..errors import ConfigError
from ..system.cuda import resolve_device
from .attention import PACKED
from .model_state import remove_capture
from .pretrained import DType, convert, torch_dtype


def without_peft(model: Any) -> nn.Module:
    """The model inside a PeftModel, with the adapters in its layers; any other model as it is.

    Raises:
        ConfigError: the PeftModel adds tokens to each text (prompt learning), which does not run here.
    """
    if not hasattr(model, "get_base_model"):
        return cast(nn.Module, model)
    if getattr(model.active_peft_config, "is_prompt_learning", False):
        raise ConfigError(
            f"{model.peft_type} adds tokens before each text in the PeftModel's own forward, which does not run here: "
            "choose adapters inside the layers, such as LoRA"
        )
    return cast(nn.Module, model.get_base_model())


def own_copy(model: nn.Module, device: torch.device | str = "auto", dtype: DType = "auto") -> nn.Module:
    """The model's structure in eval mode, over the same parameters where device and dtype allow it.

    Args:
        model: a transformers encoder; it is left as it is.
        device: "auto" is the model's.
        dtype: "auto" is the model's. Another device or dtype copies the parameters.
    """
    parameter = next(model.parameters())
    device = parameter.device if str(device) == "auto" else resolve_device(device)
    dtype = parameter.dtype if dtype == "auto" else torch_dtype(dtype)
    shared = (device, dtype) == (parameter.device, parameter.dtype)
    own: Any = copy.deepcopy(model, _shared(model) if shared else {}).eval()
    remove_capture(own)
    if own.config._attn_implementation == PACKED:  # the model of another encoder
        try:
            own.set_attn_implementation("sdpa")
        except ValueError:  # splinter has no other than these two
            own.set_attn_implementation("eager")
    if not shared:
        convert(own.requires_grad_(False), device, dtype)
    return cast(nn.Module, own)


def _shared(model: nn.Module) -> dict[int, Any]:
    """What a copy over the same weights shares: the weights, and PEFT's lists of the adapters merged into them.

    With a list of its own the copy would add an adapter to weights that hold it already.
    """
    merged: list[Any] = [m.merged_adapters for m in model.modules() if hasattr(m, "merged_adapters")]
    return {id(part): part for part in (*model.parameters(), *merged)}
