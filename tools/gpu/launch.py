"""The CPU's time to launch one forward of 12 layers; the device is idle before each."""

from __future__ import annotations

from .encoders import ONE_FORWARD, batch_of, batch_of_lengths, encoder_without_fused, load
from .part import Emit, Settings
from .timing import times_of


def run(settings: Settings, emit: Emit) -> None:
    """A row for one text of 4 tokens, for 64 of 4, and for 4,096 tokens; `packed_` is without the fused way."""
    repeats = 2 if settings.tiny else 40
    encoder = load(settings, "bert_base")
    batches = {
        "1 text of 4": batch_of_lengths(encoder, [4]),
        "64 texts of 4": batch_of_lengths(encoder, [4] * 64),
        "4k tokens": batch_of(encoder, settings.texts(), 64 if settings.tiny else 4096),
    }
    own = {}
    for name, batch in batches.items():
        own[name] = times_of(
            lambda batch=batch: encoder.encode(batch, max_forward_tokens=ONE_FORWARD), settings.device, repeats=repeats
        )
        emit(name, cpu_ms=own[name].cpu_ms, gpu_ms=own[name].gpu_ms, way=encoder.batching.way)
    way = encoder.batching.way
    plain = encoder_without_fused(encoder)
    for name, batch in batches.items():
        times = times_of(
            lambda batch=batch: plain.encode(batch, max_forward_tokens=ONE_FORWARD), settings.device, repeats=repeats
        )
        emit(
            name,
            cpu_ms=own[name].cpu_ms,
            gpu_ms=own[name].gpu_ms,
            way=way,
            packed_cpu_ms=times.cpu_ms,
            over_packed=own[name].cpu_ms / times.cpu_ms,
        )
