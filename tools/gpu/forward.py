"""Forwards of BERT-base and of MiniLM at several sizes, against the matrix product and against the plain packed way."""

from __future__ import annotations

import torch
from benchmarks.common import Products, useful_flops

from bertstream import Encoder, TokenBatch

from .encoders import ONE_FORWARD, batch_of, encoder_without_fused, first_texts, free_memory, load
from .part import Emit, Settings
from .timing import Times, times_of

SIZES = {"4k": 4096, "32k": 32768, "128k": 131072}
TINY = {"4k": 64, "32k": 128, "128k": 256}


def run(settings: Settings, emit: Emit) -> None:
    """For each model a row of its errors and one for each size; `packed_` is without the fused way."""
    texts = settings.texts()
    for model in ("bert_base", "minilm"):
        encoder = load(settings, model)
        plain = encoder_without_fused(load(settings, model))
        _errors(settings, emit, model, encoder, plain, batch_of(encoder, texts, 256 if settings.tiny else 16384))
        product = _product_tflops(settings, encoder)
        whole = batch_of(encoder, texts, max((TINY if settings.tiny else SIZES).values()))
        for name, tokens in (TINY if settings.tiny else SIZES).items():
            batch = first_texts(whole, tokens)
            own, packed = (_timed(one, batch, settings) for one in (encoder, plain))
            flops = useful_flops(encoder.model.config, batch.lengths.tolist())
            emit(
                f"{model} {name}",
                tokens=batch.num_tokens,
                texts=len(batch),
                tokens_per_s=round(1e3 * batch.num_tokens / own.back_to_back_ms),
                gpu_ms=own.gpu_ms,
                cpu_ms=own.cpu_ms,
                share_of_product=flops / own.back_to_back_ms / 1e9 / product,
                product_tflops=product,
                packed_tokens_per_s=round(1e3 * batch.num_tokens / packed.back_to_back_ms),
                packed_gpu_ms=packed.gpu_ms,
                packed_cpu_ms=packed.cpu_ms,
                times_packed=packed.back_to_back_ms / own.back_to_back_ms,
                way=encoder.batching.way,
            )
        del encoder, plain
        free_memory()


def _timed(encoder: Encoder, batch: TokenBatch, settings: Settings) -> Times:
    repeats = 2 if settings.tiny else 12
    return times_of(lambda: encoder.encode(batch, max_forward_tokens=ONE_FORWARD), settings.device, repeats=repeats)


def _product_tflops(settings: Settings, encoder: Encoder) -> float:
    """TFLOP/s of the feed-forward products of the model's shape, one after the other."""
    products = Products(encoder.dtype, settings.device, encoder.model.config.hidden_size)

    @torch.no_grad()
    def both() -> None:
        products.down(products.up(products.rows))

    return products.flops / times_of(both, settings.device, repeats=2 if settings.tiny else 50).back_to_back_ms / 1e9


def _errors(settings: Settings, emit: Emit, model: str, encoder: Encoder, plain: Encoder, batch: TokenBatch) -> None:
    """Relative L2 errors over all rows against the plain packed way in float32 (TF32 is off, as torch has it)."""
    exact = encoder_without_fused(load(settings, model, "float32"))
    right = exact.encode(batch).values.double()

    def error(one: Encoder) -> float:
        return float((one.encode(batch).values.double() - right).norm() / right.norm())

    emit(f"{model} error", tokens=batch.num_tokens, error=error(encoder), packed_error=error(plain))
