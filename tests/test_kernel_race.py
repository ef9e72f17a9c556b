"""Which kernel a window runs on: measured on CUDA, remembered, and open to packages that may not be there."""

from __future__ import annotations

import json
import sys
import types
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from difa_fx import attention, flash_window, kernel_race
from difa_fx.errors import OptionError

SHAPE: dict[str, Any] = {"grid": (96,), "size": (12,), "text": (0, 0)}


class OnCuda:
    """Looks like an empty tensor on a CUDA device."""

    device = torch.device("cuda")
    dtype = torch.bfloat16


@pytest.fixture
def race(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> dict[str, Any]:
    """A race of kernels with these seconds, whose winners are kept in a folder of its own."""
    seconds: dict[str, Any] = {"triton": 3.0, "flash_attn": 2.0, "flash": 5.0, "sdpa": 9.0}
    monkeypatch.setattr(kernel_race, "_found", {})
    monkeypatch.setattr(kernel_race, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(kernel_race, "_inputs", lambda *_: ())
    monkeypatch.setattr(kernel_race, "step_of", lambda kernel, *_, **__: kernel)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a device")
    monkeypatch.setattr(attention.cuda_window, "serves", lambda *_: True)

    def seconds_of(kernel: str) -> float:
        seconds[f"asked {kernel}"] = seconds.get(f"asked {kernel}", 0) + 1
        if isinstance(seconds[kernel], Exception):
            raise seconds[kernel]
        return float(seconds[kernel])

    monkeypatch.setattr(kernel_race, "seconds_of", seconds_of)
    monkeypatch.setattr(
        kernel_race, "possible_kernels", lambda **_: tuple(k for k in list(seconds) if not k.startswith("asked"))
    )
    return seconds


def chosen(requested: str = "auto", *, refresh: bool = False, like: Any = OnCuda, **shape: Any) -> str:
    settings = {"sizes": (2, 4, 96, 72), "masked": False, "refresh": refresh, **SHAPE, **shape}
    return kernel_race.chosen_kernel(requested, like=like, **settings)


def test_the_fastest_serves_and_is_measured_once(race: dict[str, Any], tmp_path: Any) -> None:
    assert chosen() == "flash_attn"
    race["triton"] = 1.0
    assert chosen() == "flash_attn"
    assert race["asked triton"] == 1
    assert chosen(refresh=True) == "triton"
    assert chosen(size=(13,)) == "triton"
    kernel_race._found.clear()  # as in another process
    assert [chosen(), chosen(refresh=True)] == ["flash_attn", "triton"]
    assert race["asked triton"] == 3
    (path,) = (tmp_path / "cache").iterdir()
    assert sorted(json.loads(path.read_text()).values()) == ["flash_attn", "triton", "triton"]


@pytest.mark.parametrize("found", ["", "[]", "{", '{"x": 3}', "null"])
def test_a_broken_memory_is_measured_anew(race: dict[str, Any], tmp_path: Any, found: str) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "difa-window-kernels.json").write_text(found)
    assert chosen() == "flash_attn"
    kernel_race._found.clear()
    race["triton"] = 1.0
    assert chosen() == "flash_attn"


def test_a_kernel_that_fails_is_left_out_with_a_warning(race: dict[str, Any]) -> None:
    race["flash_attn"] = RuntimeError("out of registers")
    with pytest.warns(UserWarning, match="'flash_attn' is left out.*out of registers"):
        assert chosen() == "triton"
    kernel_race._found.clear()
    race.update(dict.fromkeys(["triton", "flash", "sdpa"], RuntimeError("no")))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert chosen(size=(14,)) == "triton"  # it says itself what is wrong


def test_flex_takes_part_where_our_own_cannot_serve(race: dict[str, Any]) -> None:
    race["flex"] = 1.0
    assert chosen() == "flash_attn"
    assert "asked flex" not in race
    del race["triton"]
    assert chosen(size=(13,)) == "flex"


def test_what_is_asked_for_is_not_measured(race: dict[str, Any]) -> None:
    assert chosen("triton") == "triton"
    assert chosen(masked=True) == "sdpa"
    assert chosen(size=(96,)) == "sdpa"
    assert chosen(like=torch.empty(0)) == "sdpa"
    assert not any(name.startswith("asked") for name in race)


@pytest.mark.parametrize("refresh", [False, True])
def test_steps_agree_with_each_other(refresh: bool) -> None:
    q, k, v = (torch.randn(2, 2, 96, 16) for _ in range(3))
    residual = torch.randn(2, 96, 2, 16)
    kernels = kernel_race.possible_kernels(like=q, **SHAPE)
    assert set(kernels) >= {"flex", "sdpa"}
    expected, *others = (
        kernel_race.step_of(kernel, (q, k, v, residual), refresh=refresh, **SHAPE)() for kernel in kernels
    )
    for got in others:
        for ours, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


# flash-attn


def dense_window(q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float | None, window_size: tuple[int, int]) -> Any:
    """What flash-attn computes, [B, N, H, D], in plain torch."""
    at = torch.arange(q.shape[1])
    near = at[None] - at[:, None]
    mask = (near >= -window_size[0]) & (near <= window_size[1])
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=softmax_scale).transpose(1, 2)


@pytest.mark.parametrize("version", [2, 3])
def test_the_package_is_used_where_it_is_installed(version: int, monkeypatch: pytest.MonkeyPatch) -> None:
    name = flash_window.PACKAGES[3 - version]
    module = types.ModuleType(name)
    module.__spec__ = types.SimpleNamespace(name=name)  # type: ignore[assignment]
    module.flash_attn_func = dense_window if version == 2 else lambda *a, **k: (dense_window(*a, **k), None)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name, module)
    for found in (flash_window.package, flash_window._attend):
        found.cache_clear()
    try:
        assert flash_window.package() == name
        assert attention.choose_kernel("flash_attn", like=OnCuda, masked=False, **SHAPE) == "flash_attn"
        q, k, v = (torch.randn(2, 2, 96, 16) for _ in range(3))
        got = flash_window._flash_window(q, k, v, 12, 0.3)
        (expected,) = kernel_race.step_of("sdpa", (q, k, v, torch.zeros(2, 96, 2, 16)), refresh=False, **SHAPE)()
        assert got.is_contiguous()
        assert not torch.allclose(got.transpose(1, 2), expected)
        got = flash_window._flash_window(q, k, v, 12, None)
        torch.testing.assert_close(got.transpose(1, 2), expected, atol=1e-5, rtol=1e-4)
    finally:
        for found in (flash_window.package, flash_window._attend):
            found.cache_clear()


@pytest.mark.parametrize("kernel", ["flash", "flash_attn"])
@pytest.mark.parametrize("wrong", [{"grid": (8, 12), "size": (2, 2)}, {"text": (0, 3)}, {"like": torch.empty(0)}])
def test_flash_attention_is_refused_where_it_cannot_run(kernel: str, wrong: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="FlashAttention cannot run here"):
        attention.choose_kernel(kernel, **{"like": OnCuda, "masked": False, **SHAPE, **wrong})


def test_a_package_that_is_missing_is_named() -> None:
    if flash_window.package() is not None:
        pytest.skip("flash-attn is installed")
    with pytest.raises(OptionError, match="flash-attn is not installed"):
        attention.choose_kernel("flash_attn", like=OnCuda, masked=False, **SHAPE)  # type: ignore[arg-type]
