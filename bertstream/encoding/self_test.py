"""The self-test at load: which ways of sharing a forward give each text the vectors that it has alone.

Each way is tried with the code that runs later (`BatchedForward`), on the texts of a `Probe`. The reference is
the model as it came: one text at a time, without padding, by its own `hidden_states`.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from torch import Tensor, nn

from ..errors import EncoderError
from ..tokens import Int32Array
from .attention import PACKED, BatchingSupport, plain_mode, register
from .forward import BatchedForward
from .forward_size import ForwardSize
from .layer_modules import UndescribedError
from .layers import stop_after, unroll
from .output_spec import OutputSpec
from .own_model import own_copy
from .pretrained import most_positions
from .probe import Probe, Run, batch_of
from .vocabulary import num_ids


def probe_batching(
    model: nn.Module,
    layers: Sequence[int],
    num_layers: int,
    packed: bool | None = None,
    special_ids: Sequence[int | None] = (),
) -> tuple[nn.Module, BatchingSupport]:
    """Cut a model off after its highest layer, and find the fastest right way to share its forwards.

    Args:
        model: a transformers encoder in eval mode that shares neither structure nor config with the user's. A model
            that passes packed keeps the packed attention, any other its own.
        layers: counted from 0, the embedding layer.
        num_layers: of the model.
        packed: True refuses a model that cannot be packed, False does not try.
        special_ids: as for `Probe`.
    Returns:
        The model to run, and how.
    Raises:
        EncoderError: no way is right for these layers; or `packed` is True and packing is not; or as for `Probe`.
    """
    register()
    inner = min(layers) < num_layers
    whole = own_copy(model) if inner else model  # asking for hidden_states leaves hooks in a model
    probe = Probe(whole, layers, num_layers, special_ids)
    support = _Trial(model, probe, packed)
    try:
        if inner:
            unroll(model)
        if max(layers) < num_layers:
            stop_after(model, max(layers))
    except Exception as error:  # whatever a model does that has no plain list of layers
        support.reasons.append(f"its layers cannot be read inside ({type(error).__name__}: {error})")
    else:
        if (found := support.best(reads_own=False)) is not None:
            return model, found
    if inner:
        support.model = whole
        if (found := support.best(reads_own=True)) is not None:
            return whole, found
    name, reason = type(model).__name__, "; ".join(support.reasons)
    if packed:
        raise EncoderError(f"{name} cannot run packed: {reason}; leave packed= out")
    wrong = [layer for layer, error in zip(layers, support.errors, strict=True) if not error <= support.loosest]
    way_out = "leave these layers out" if inner else "pass a text encoder that gives a text the same vectors each time"
    raise EncoderError(f"{name}: layers {wrong or list(layers)} are not right in any way: {reason}; {way_out}")


class _Trial:
    """The ways to share a forward, from the fastest, and why those that were tried are not right."""

    def __init__(self, model: nn.Module, probe: Probe, packed: bool | None) -> None:
        self.model = model
        self.probe = probe
        self.packed = packed
        self.reasons = [] if packed is not False else ["packing was not asked for"]
        self.errors: list[float] = [math.inf] * len(probe.layers)
        # Grouped is the last way, so noise alone must not refuse it.
        self.loosest = max(probe.tolerance, 1e-4)

    def best(self, reads_own: bool) -> BatchingSupport | None:
        """The fastest right way; None if there is none."""
        model: Any = self.model
        native = model.config._attn_implementation
        support = BatchingSupport(
            "packed",
            "",
            skipped_id=self.probe.skipped_id,
            fill_id=_fill_id(model.config, self.probe.skipped_id),
            reads_own=reads_own,
            changes_itself=self.probe.changes_itself,
        )
        if self.packed is not False and self._packs():
            support = dataclasses.replace(support, most_tokens=self._table())
            try:
                model.set_attn_implementation(PACKED)
            except Exception as error:  # a model that cannot be packed may raise anything; the reason says what
                self.reasons.append(f"it takes no other attention ({type(error).__name__}: {error})")
            else:
                if self._passes(support, self.probe.tolerance):
                    return self._found(self._fused(support))
            if model.config._attn_implementation != native:
                model.set_attn_implementation(native)
        if self.packed:
            return None
        for way, tolerance in (("padded", self.probe.tolerance), ("grouped", self.loosest)):
            support = dataclasses.replace(support, way=cast(Any, way), most_tokens=None)
            if self._passes(support, tolerance):
                return self._found(support)
        return None

    def _fused(self, packed: BatchingSupport) -> BatchingSupport:
        """Our own loop over the weights of a model that runs packed, if it is right too; else the same as before."""
        errors, fused = self.errors, dataclasses.replace(packed, way="fused")
        if packed.reads_own:
            self.reasons.append("not fused: it runs as it came")
        elif self._passes(fused, self.probe.tolerance):
            return fused
        self.errors = errors
        return packed

    def _packs(self) -> bool:
        if "position_ids" in inspect.signature(self.model.forward).parameters:
            return True
        self.reasons.append(f"{type(self.model).__name__} takes no position_ids, so positions cannot restart")
        return False

    def _table(self) -> int | None:
        """Tokens that a packed row may have, where a buffer of the model has as many entries as it has positions."""
        positions = most_positions(cast(Any, self.model.config)) or 0
        if positions <= self.probe.most_row:
            return None
        return positions if any(positions in buffer.shape for buffer in self.model.buffers()) else None

    def _passes(self, support: BatchingSupport, tolerance: float) -> bool:
        device = next(self.model.parameters()).device
        try:
            with plain_mode(device):
                # For a model that reads positions by their place in the row; our own loop reads them by their ids.
                run, long_row = _run_of(self.model, support, self.probe), support.way == "packed"
                self.errors = self.probe.errors(run, long_row=long_row)
        except UndescribedError as error:
            self.reasons.append(f"not fused: {error}")
            return False
        except Exception as error:
            self.reasons.append(f"the {support.way} self-test raised {type(error).__name__}: {error}")
            return False
        worst = max(self.errors)
        if worst <= tolerance:
            self.reasons.append(f"{support.way} equals one by one (worst relative L2 error {worst:.1e})")
            return True
        self.reasons.append(f"{support.way} differs from one by one (relative L2 error {worst:.1e} > {tolerance:.0e})")
        return False

    def _found(self, support: BatchingSupport) -> BatchingSupport:
        own = ["layers are the model's own hidden_states"] if support.reads_own else []
        return dataclasses.replace(support, reason="; ".join([*own, *self.reasons]))


def _run_of(model: nn.Module, support: BatchingSupport, probe: Probe) -> Run:
    """Texts in one forward, by the code that runs later."""
    forward = BatchedForward(model, OutputSpec(layers=probe.layers), support, probe.num_layers, ForwardSize(1 << 20))
    forward.eval()  # as frozen encoders are: in train mode nothing runs fused

    def run(texts: Sequence[Int32Array], segments: Sequence[Int32Array] | None) -> list[list[Tensor]]:
        batch = batch_of(texts)
        batch.token_type_ids = None if segments is None else np.concatenate(segments)
        return [list(layer.split(batch.lengths.tolist())) for layer in forward._token_vectors(batch, None, None)]

    return run


def _fill_id(config: Any, skipped_id: int | None) -> int:
    """An id for the padding: the one that positions skip, else the config's if it is one; never the mask's."""
    mask = getattr(config, "mask_token_id", None)
    for fill in (skipped_id, getattr(config, "pad_token_id", None), 0, 1):
        if isinstance(fill, int) and 0 <= fill < (num_ids(config) or 0) and fill != mask:
            return fill
    return 0
