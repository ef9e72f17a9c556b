"""The kernel for CPUs, and full attention with the residual at once: the numbers of attention written out."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import relative
from oracle import dense_attention
from torch import Tensor

from difa_fx import attention
from difa_fx import cpu_window as own
from difa_fx.errors import OptionError
from difa_fx.window_ops import near_refresh, near_window


def qkv(tokens: int, *, heads: int = 2, width: int = 8, batch: int = 2, loud: float = 1.0) -> list[Tensor]:
    """Queries, keys and values as a projection gives them: views of [B, N, H, D]."""
    generator = torch.Generator().manual_seed(tokens)
    shape = (batch, tokens, heads, width)
    return [loud * torch.randn(shape, generator=generator).transpose(1, 2) for _ in range(3)]


IMAGES = st.integers(1, 90) | st.integers(200, 700)
"""Tokens: less than a block, and several, of more than one product each."""


@settings(max_examples=60, deadline=None)
@given(
    image=IMAGES,
    window=st.integers(0, 95) | st.integers(100, 800),
    text=st.tuples(st.integers(0, 5), st.integers(0, 5)) | st.tuples(st.integers(60, 140), st.integers(0, 140)),
    scale=st.sampled_from([None, 0.3]),
    residual=st.booleans(),
)
def test_the_kernel_is_attention_written_out(
    image: int, window: int, text: tuple[int, int], scale: float | None, residual: bool
) -> None:
    q, k, v = qkv(image + sum(text))
    stored = torch.ones(q.transpose(1, 2).shape) if residual else None
    expected = dense_attention(q, k, v, scale=scale)
    windowed = dense_attention(q, k, v, scale=scale, window=window, text=text)
    got = near_window(q, k, v, stored, window, list(text), scale)
    torch.testing.assert_close(got.transpose(1, 2), windowed + residual, rtol=0, atol=5e-6)
    full, missed = near_refresh(q, k, v, window, list(text), scale)
    torch.testing.assert_close(full.transpose(1, 2), expected, rtol=0, atol=5e-6)
    torch.testing.assert_close(missed.transpose(1, 2), expected - windowed, rtol=0, atol=5e-6)


@pytest.mark.parametrize("loud", [20.0, 200.0])
def test_scores_that_differ_by_hundreds_are_merged_without_overflow(loud: float) -> None:
    q, k, v = (t / (loud if i == 2 else 1) for i, t in enumerate(qkv(300, loud=loud)))
    full, missed = near_refresh(q, k, v, 3, [0, 0], None)
    expected = dense_attention(q.double(), k.double(), v.double())
    assert relative(full.transpose(1, 2), expected) < 1e-3 * loud / 200
    windowed = dense_attention(q.double(), k.double(), v.double(), window=3)
    assert relative(missed.transpose(1, 2), expected - windowed) < 1e-3 * loud / 200


def test_nan_is_not_swallowed() -> None:
    q, k, v = qkv(64)
    k[0, 0, 10] = torch.nan
    assert near_window(q, k, v, None, 5, [0, 0], None)[0, 10, 0].isnan().all()
    assert near_refresh(q, k, v, 5, [0, 0], None)[0][0, 60, 0].isnan().all()


def test_any_strides_will_do() -> None:
    q, k, v = (t.transpose(2, 3).contiguous().transpose(2, 3) for t in qkv(64))
    assert q.stride(-1) != 1
    shared = k[:, :1].expand(-1, 2, -1, -1)
    got = near_window(q, shared, v, None, 8, [0, 0], None)
    assert relative(got.transpose(1, 2), dense_attention(q, shared, v, window=8)) < 1e-5


def test_the_operators_are_what_they_tell_the_compiler() -> None:
    q, k, v = qkv(40)
    torch.library.opcheck(near_window, (q, k, v, None, 5, [0, 0], None), test_utils="test_faketensor")
    torch.library.opcheck(near_refresh, (q, k, v, 5, [1, 2], 0.2), test_utils="test_faketensor")


def test_without_a_compiler_windows_are_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(source: str, folder: object) -> None:
        raise RuntimeError("no g++")

    shape = {"like": torch.empty(0), "grid": (512,), "size": (4,), "text": (0, 0), "masked": False}
    assert attention.choose_kernel("auto", **shape) == "cpp"
    own._kernel.cache_clear()
    monkeypatch.setattr(own, "build_cpp", missing)
    with pytest.warns(UserWarning, match=r"run as tiles.*no g\+\+"):
        assert attention.choose_kernel("auto", **shape) == "sdpa"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert attention.choose_kernel("auto", **shape) == "sdpa"
    with pytest.raises(OptionError, match="a C\\+\\+ compiler"):
        attention.choose_kernel("cpp", **shape)
    own._kernel.cache_clear()


FLEX = [((200,), (20,), (0, 0)), ((8, 10), (2, 3), (0, 0)), ((70,), (9,), (3, 5))]


@pytest.mark.parametrize(("grid", "size", "text"), FLEX)
def test_flex_merges_what_is_in_the_window_with_what_is_not(
    grid: tuple[int, ...], size: tuple[int, ...], text: tuple[int, int]
) -> None:
    tokens = torch.Size(grid).numel() + sum(text)
    q, k, v = qkv(tokens, width=16)
    shape = {"grid": grid, "size": size, "text": text}
    lists = attention.refresh_tensors("flex", like=q, **shape)
    full, missed = attention.refreshed_attention(q, k, v, *lists, **shape, kernel="flex")
    assert relative(full, dense_attention(q, k, v)) < 1e-5
    lists = attention.window_tensors("flex", like=q, **shape)
    windowed = attention.window_attention(q, k, v, None, *lists, **shape, kernel="flex", residual_BNHD=missed)
    assert relative(windowed, full) < 1e-5
