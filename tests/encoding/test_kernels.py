"""The Triton kernels, against float64: on a GPU where there is one, and in Triton's interpreter on any CPU.

Triton reads TRITON_INTERPRET once, when it is imported, so one test runs this file again in a process that has it set,
and there the forwards of test_fused.py that launch kernels too.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import FULL_RUN
from fork_server import RANKS
from torch import Tensor

import bertstream.encoding
from bertstream import EncoderError
from bertstream.encoding import kernels
from bertstream.tokens import cumulate

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
HALVES = [torch.bfloat16, torch.float16]
WORST = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Relative L2 error that a dtype may have; the interpreter rounds bfloat16 towards zero."""

plain = pytest.mark.skipif(INTERPRETED, reason="Triton is the interpreter in this process")
TRITON = (0,) if importlib.util.find_spec("triton") is None else tuple(map(int, version("triton").split(".")[:2]))
needs_triton = pytest.mark.skipif(TRITON < (3,), reason="Triton is not installed")
needs_interpreter = pytest.mark.skipif(TRITON < (3, 9), reason="before 3.9, Triton's interpreter fails with numpy 2.4")


def on_device(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that launches kernels: it needs a GPU, unless Triton interprets them."""
    return test if INTERPRETED else pytest.mark.cuda(test)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return made.to(dtype).to(DEVICE)


def assert_near(found: Tensor, right: Tensor) -> None:
    assert found.shape == right.shape
    error = float((found.double() - right).norm() / right.norm())
    assert error < WORST[found.dtype], f"relative L2 error {error:.1e} in {found.dtype}"


# ---- add + norm


def normed(value: Tensor, weight: Tensor, bias: Tensor | None, rms: bool) -> Tensor:
    value, shape = value.double(), weight.shape
    if rms:
        out = F.rms_norm(value, shape, weight.double(), 1e-6)
        return out if bias is None else out + bias.double()
    return F.layer_norm(value, shape, weight.double(), None if bias is None else bias.double(), 1e-6)


@on_device
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("hidden", [8, 384, 768, 1000])
def test_add_norm_is_right_for_any_width(hidden: int, rms: bool) -> None:
    check_add_norm(hidden, rms, torch.float32)


@on_device
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_add_norm_in_half_precision_sums_in_float32(dtype: torch.dtype) -> None:
    check_add_norm(384, False, dtype)


def check_add_norm(hidden: int, rms: bool, dtype: torch.dtype) -> None:
    x, y = normal(9, hidden, dtype=dtype) + 3, normal(9, hidden, dtype=dtype, seed=1)
    weight, bias = normal(hidden, dtype=dtype, seed=2) + 1, normal(hidden, dtype=dtype, seed=3)
    total = x.double() + y.double()
    none, found = kernels.add_norm(x, y, weight, bias, 1e-6, rms=rms)
    assert none is None
    assert_near(found, normed(total, weight, bias, rms))
    assert_near(kernels.add_norm(x, None, weight, None, 1e-6, rms=rms)[1], normed(x, weight, None, rms))
    kept, found = kernels.add_norm(x, y, weight, None, 1e-6, rms=rms, keep_sum=True)
    assert_near(kept, total)
    assert_near(found, normed(total, weight, None, rms))
    assert kernels.add_norm(x, None, weight, None, 1e-6, rms=rms, keep_sum=True)[0] is x


@on_device
@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_add_norm_takes_few_tokens(tokens: int) -> None:
    x, weight = normal(tokens, 24), normal(24, seed=1)
    _, found = kernels.add_norm(x, x, weight, None, 1e-6)
    torch.testing.assert_close(found.double(), normed(x.double() * 2, weight, None, False), rtol=1e-5, atol=1e-6)


@on_device
def test_the_norm_of_a_nearly_constant_row_keeps_its_digits() -> None:
    x = 1000 + normal(5, 768)
    _, found = kernels.add_norm(x, None, torch.ones(768, device=DEVICE), None, 1e-6)
    assert float((found.double() - normed(x, torch.ones(768, device=DEVICE), None, False)).abs().max()) < 2e-4


# ---- attention


def attention(lengths: list[int], qkv: Tensor, heads: int, groups: int, size: int, window: int | None = None) -> Tensor:
    """`packed_attention` of texts in a packed row."""
    ends = np.array(lengths, np.int32)
    tiles = kernels.attention_tiles(ends, kernels.tile_rows(size, qkv.dtype))
    cu_seqlens, tiles_there = (torch.from_numpy(x).to(DEVICE) for x in (cumulate(ends), tiles))
    return kernels.packed_attention(
        qkv, cu_seqlens, tiles_there, heads=heads, kv_heads=groups, head_size=size, scale=size**-0.5, window=window
    )


def attended(lengths: list[int], qkv: Tensor, heads: int, groups: int, size: int, window: int | None = None) -> Tensor:
    """The same in float64, text by text."""
    out = []
    for text in qkv.double().split(lengths):
        q, k, v = text.unflatten(1, (-1, size)).transpose(0, 1).split([heads, groups, groups])
        k, v = (x.repeat_interleave(heads // groups, 0) for x in (k, v))
        scores = q @ k.mT * size**-0.5
        at = torch.arange(len(text), device=DEVICE)
        if window is not None:
            scores[:, (at[:, None] - at).abs() >= window] = -torch.inf
        out.append((scores.softmax(-1) @ v).transpose(0, 1).flatten(1))
    return torch.cat(out)


def around_a_tile(size: int, dtype: torch.dtype = torch.float32) -> list[int]:
    rows = kernels.tile_rows(size, dtype)
    many = [300] if not INTERPRETED else [150] if size == 64 else []  # the interpreter takes half a second for it
    return [1, rows - 1, rows, rows + 1, *many]


@on_device
@pytest.mark.parametrize("size", [16, 24, 32, 64, 80, 96, 128])
def test_attention_is_right_for_texts_around_a_tile(size: int) -> None:
    lengths = around_a_tile(size)
    qkv = normal(sum(lengths), 3 * size) * 2
    assert_near(attention(lengths, qkv, 1, 1, size), attended(lengths, qkv, 1, 1, size))


@on_device
@pytest.mark.parametrize("window", [1, 3, 32, 200])
def test_a_window_hides_what_is_farther_away(window: int) -> None:
    lengths = [1, 33, 100]
    qkv = normal(sum(lengths), 3 * 16) * 2
    assert_near(attention(lengths, qkv, 1, 1, 16, window), attended(lengths, qkv, 1, 1, 16, window))


@on_device
@pytest.mark.parametrize(("heads", "groups"), [(3, 3), (4, 2), (3, 1)])
def test_query_heads_share_the_key_heads_of_their_group(heads: int, groups: int) -> None:
    lengths = [40, 2]
    qkv = normal(sum(lengths), (heads + 2 * groups) * 16) * 2
    assert_near(attention(lengths, qkv, heads, groups, 16), attended(lengths, qkv, heads, groups, 16))


# In the interpreter a product of bfloat16 is one of the integers that hold them.
@on_device
@pytest.mark.parametrize("dtype", HALVES[INTERPRETED:], ids=str)
@pytest.mark.parametrize(("size", "window"), [(32, 50), (80, None)])
def test_attention_in_half_precision_sums_in_float32(size: int, window: int | None, dtype: torch.dtype) -> None:
    lengths = around_a_tile(size, dtype)
    qkv = normal(sum(lengths), 3 * size, dtype=dtype)
    assert_near(attention(lengths, qkv, 1, 1, size, window), attended(lengths, qkv, 1, 1, size, window))


@on_device
@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # the interpreter's numpy
@pytest.mark.parametrize("window", [None, 3])
def test_a_text_that_is_not_finite_spoils_no_other(window: int | None) -> None:
    lengths = [5, 40, 7]
    qkv = normal(sum(lengths), 3 * 16)
    qkv[5:45] = torch.nan
    first, spoiled, last = attention(lengths, qkv, 1, 1, 16, window).split(lengths)
    assert first.isfinite().all() and spoiled.isnan().all() and last.isfinite().all()


@on_device
def test_scores_of_any_size_do_not_overflow() -> None:
    qkv = normal(70, 3 * 16)
    qkv[:, :16] *= 1e4
    found, right = (f([70], qkv, 1, 1, 16) for f in (attention, attended))
    assert float((found.double() - right).norm() / right.norm()) < 1e-3  # of scores near 10,000


def test_tiles_cover_every_token_once_and_long_texts_come_first() -> None:
    lengths = np.array([3, 64, 0, 130, 65, 1], np.int32)
    tiles = kernels.attention_tiles(lengths, 64)
    assert tiles.dtype == np.int32
    assert tiles.tolist() == [[3, 0], [3, 64], [3, 128], [4, 0], [4, 64], [1, 0], [0, 0], [5, 0]]
    assert kernels.attention_tiles(np.zeros(0, np.int32), 64).shape == (0, 2)


def test_heads_that_do_not_fit_are_named() -> None:
    fit = [size for size in range(1, 257) if kernels.attention_fits(size, torch.bfloat16)]
    assert fit == list(range(16, 129, 8))
    assert not kernels.attention_fits(64, torch.float64)
    tiles = [kernels.tile_rows(size, dtype) for size in fit for dtype in (torch.float16, torch.float32)]
    assert all(rows >= 16 and rows & (rows - 1) == 0 for rows in tiles)


# ---- gates and rotary positions


ACTIVE = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


@on_device
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("activation", kernels.ACTIVATIONS)
def test_a_gate_multiplies_the_half_that_is_up(activation: str, dtype: torch.dtype) -> None:
    for tokens, inner in ((1, 1152), (5, 40), (3, 8)):
        x = normal(tokens, 2 * inner, dtype=dtype) * 2
        first, second = x.double().chunk(2, 1)
        assert_near(kernels.gated(x, activation, up_first=False), ACTIVE[activation](first) * second)
        assert_near(kernels.gated(x, activation, up_first=True), ACTIVE[activation](second) * first)


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(EncoderError, match="activation='relu'.*gelu, gelu_tanh, silu"):
        kernels.gated(torch.zeros(1, 2), "relu", False)


def rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[N, heads, d] as transformers' apply_rotary_pos_emb does it."""
    size = cos.shape[1]
    turned, rest = heads.double().split([size, heads.shape[2] - size], 2)
    lower, upper = turned.chunk(2, 2)
    turned = turned * cos.double()[:, None] + torch.cat([-upper, lower], 2) * sin.double()[:, None]
    return torch.cat([turned, rest], 2)


@on_device
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize(("size", "turned"), [(64, 64), (64, 32), (24, 24), (80, 20)])
def test_rotary_positions_turn_queries_and_keys_and_leave_values(size: int, turned: int, dtype: torch.dtype) -> None:
    heads, groups, tokens = 4, 2, 37
    qkv = normal(tokens, (heads + 2 * groups) * size, dtype=dtype)
    cos, sin = normal(tokens, turned, seed=1).cos(), normal(tokens, turned, seed=2).sin()
    before = qkv.clone().unflatten(1, (-1, size))
    kernels.rotate(qkv, cos, sin, heads=heads, kv_heads=groups, head_size=size, rotary_dim=turned)
    after = qkv.unflatten(1, (-1, size))
    assert_near(after[:, : heads + groups], rotated(before[:, : heads + groups], cos, sin))
    assert torch.equal(after[:, heads + groups :], before[:, heads + groups :])
    assert torch.equal(after[..., turned:], before[..., turned:])


# ---- where they run


@on_device
def test_the_kernels_are_available() -> None:
    assert kernels.available(DEVICE), kernels._why_not(DEVICE)


IN_THE_INTERPRETER = """
import os, sys
assert "triton" not in sys.modules, "it reads the variable when it is imported"
os.environ["TRITON_INTERPRET"] = "1"
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""


@plain
@needs_interpreter
@pytest.mark.slow
def test_in_tritons_interpreter_the_kernels_and_the_whole_forward_are_right() -> None:
    forwards = str(Path(__file__).with_name("test_fused.py"))
    options = ["-q", "-rp", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not cuda", "-x"]
    options += ["-k", "test_kernels or heads_that_fit_the_kernels"]
    out, errors, status = RANKS.start(IN_THE_INTERPRETER, *options, __file__, forwards).finish()
    assert status == 0, out + errors
    assert out.count("PASSED tests/encoding/test_fused.py") == 3


@plain
@needs_triton
@pytest.mark.parametrize("capability", [80, 90] if FULL_RUN else [90])
def test_the_kernels_compile_without_a_gpu(capability: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    triton = importlib.import_module("triton")
    target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", capability, 32)
    for kernel, args, options in launches(monkeypatch):
        types, known = described(kernel, args)
        source = triton.compiler.ASTSource(kernel, types, known)
        assert triton.compile(source, target=target, options=options).asm["cubin"]


def one_launch_of_each() -> None:
    half = {"dtype": torch.bfloat16}
    x, weight, qkv = torch.empty(9, 768, **half), torch.empty(768, **half), torch.empty(9, 3 * 96, **half)
    ints, angles = torch.empty(2, 2, dtype=torch.int32), torch.empty(9, 96)
    kernels.add_norm(x, x, weight, weight, 1e-12, keep_sum=True)
    kernels.add_norm(x, None, weight, None, 1e-12, rms=True)
    for there, window in ((qkv, 64), (qkv[:, :48], None), (qkv[:, :48].float(), None)):
        kernels.packed_attention(
            there, ints[0], ints, heads=1, kv_heads=1, head_size=there.shape[1] // 3, scale=0.125, window=window
        )
    kernels.rotate(qkv, angles, angles, heads=1, kv_heads=1, head_size=96, rotary_dim=96)
    for activation in kernels.ACTIVATIONS:
        kernels.gated(x, activation, up_first=True)


def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, tuple[Any, ...], dict[str, int]]]:
    """(kernel, arguments, options) of the launches above, which are not made."""
    made: list[tuple[Any, tuple[Any, ...], dict[str, int]]] = []

    class Recorded:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args, **options: made.append((self.kernel, args, options))

    recorded = SimpleNamespace(**{kernel.__name__: Recorded(kernel) for kernel in all_kernels()})
    monkeypatch.setattr(kernels, "_jit", lambda: recorded)
    with torch.device("meta"):
        one_launch_of_each()
    return made


def all_kernels() -> list[Any]:
    return [getattr(kernels._jit(), name) for name in ("add_norm", "attend", "gate", "rotate")]


def described(kernel: Any, args: tuple[Any, ...]) -> tuple[dict[str, str], dict[str, Any]]:
    """(type of each argument, value of each that is known when the kernel is compiled), as Triton takes them."""
    types, known = {}, {}
    for number, (name, arg) in enumerate(zip(kernel.arg_names, args, strict=True)):
        if number in kernel.constexprs or arg is None:
            types[name], known[name] = "constexpr", arg
        elif isinstance(arg, Tensor):
            types[name] = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32"}[arg.dtype]
        else:
            types[name] = "fp32" if isinstance(arg, float) else "i32"
    return types, known


@pytest.mark.cuda
def test_another_number_of_tokens_compiles_nothing() -> None:
    def compiled() -> int:
        return sum(len(cache[0]) for kernel in all_kernels() for cache in kernel.device_caches.values())

    counts = []
    for tokens in (64, 1, 16, 17, 1000):
        x, weight = normal(tokens, 72), normal(72)
        kernels.add_norm(x, x, weight, weight, 1e-6)
        kernels.gated(x, "silu", up_first=True)
        kernels.rotate(x, normal(tokens, 24), normal(tokens, 24), heads=1, kv_heads=1, head_size=24, rotary_dim=24)
        attention([tokens], x, 1, 1, 24)
        counts.append(compiled())
    assert counts == counts[:1] * 5


@pytest.mark.cuda
def test_offsets_above_two_to_the_31_are_right() -> None:
    lengths = [2**31 // (3 * 768), 300]
    qkv = torch.zeros(sum(lengths), 3 * 768, dtype=torch.bfloat16, device=DEVICE)
    qkv[-300:] = normal(300, 3 * 768, dtype=torch.bfloat16)
    right = attended([300], qkv[-300:].clone(), 12, 12, 64)
    cu_seqlens = torch.from_numpy(cumulate(np.array(lengths))).to(DEVICE)
    tiles = torch.tensor([[1, first] for first in range(0, 300, kernels.tile_rows(64, qkv.dtype))], dtype=torch.int32)
    found = kernels.packed_attention(
        qkv, cu_seqlens, tiles.to(DEVICE), heads=12, kv_heads=12, head_size=64, scale=0.125
    )
    assert_near(found[-300:], right)


@pytest.fixture
def unknown_yet() -> Iterator[None]:
    """Nothing is known of any device, before and after."""
    for cached in (kernels.available, kernels._jit):
        cached.cache_clear()
    yield
    for cached in (kernels.available, kernels._jit):
        cached.cache_clear()


@plain
@pytest.mark.usefixtures("unknown_yet")
def test_a_cpu_has_no_kernels_and_gets_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert not kernels.available(torch.device("cpu"))
    assert caplog.records == []


@pytest.mark.usefixtures("unknown_yet")
def test_an_old_gpu_has_no_kernels(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not any(kernels.available(torch.device("cuda", 0)) for _ in range(2))
    (record,) = caplog.records
    assert "its compute capability is 7.5, and they need 8.0" in record.getMessage()


def broken(x: Tensor, activation: str, up_first: bool) -> Tensor:
    raise RuntimeError("Failed to find C compiler")


@pytest.mark.usefixtures("unknown_yet")
@pytest.mark.parametrize(
    ("first", "why"),
    [
        (broken, "a first one raised RuntimeError: Failed to find C compiler"),
        (lambda x, activation, up_first: x[:, :32] * 0, "a first one gave values that differ by 5.7e"),
        (lambda x, activation, up_first: x[:, :32] * torch.nan, "differ by nan"),
    ],
)
def test_kernels_that_fail_or_are_wrong_are_not_used_and_said_once(
    first: Any, why: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(kernels, "gated", first)
    assert not any(kernels.available(torch.device("cpu")) for _ in range(2))
    (record,) = caplog.records
    assert why in record.getMessage()


@pytest.mark.usefixtures("unknown_yet")
def test_without_triton_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "bertstream.encoding.triton_kernels", raising=False)
    monkeypatch.delattr(bertstream.encoding, "triton_kernels", raising=False)
    assert not kernels.available(torch.device("cpu"))
    assert "a first one raised ModuleNotFoundError" in str(kernels._why_not(torch.device("cpu")))
