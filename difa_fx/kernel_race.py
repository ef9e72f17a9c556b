"""On CUDA, which kernel a window runs on is measured: once for a device, dtype and size, and remembered on disk.

Every kernel that can serve a site takes turns at what the site will do: a window step with its residual, or a step
that refreshes the residual.  Kernels that are graphs (flex, where our own cannot serve) are compiled by Inductor first,
as in a piece.

Letters: B batch, H heads, N tokens, D head width.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from difa_fx._torch import begin_lowering, cache_folder, fake_inputs, new_fake_mode, trace_aten
from difa_fx.attention import (
    WINDOW_KERNELS,
    WindowKernel,
    choose_kernel,
    refresh_tensors,
    refreshed_attention,
    refreshes_at_once,
    window_attention,
    window_residual,
    window_tensors,
)
from difa_fx.device_time import seconds_of
from difa_fx.errors import OptionError
from difa_fx.plan_io import write_text

_FILE: Final = "difa-window-kernels.json"

_found: dict[str, WindowKernel] = {}


def chosen_kernel(
    requested: str,
    *,
    like: Tensor,
    sizes: Sequence[int],
    grid: tuple[int, ...],
    size: tuple[int, ...],
    text: tuple[int, int],
    masked: bool,
    refresh: bool,
) -> WindowKernel:
    """The kernel of a site: as asked for, or for ``auto`` on CUDA the fastest, elsewhere by rule.

    Args:
        requested: the ``window_kernel`` option.
        like: of the site's dtype and device.
        sizes: of its queries, [B, H, N, D].
        grid: see :func:`difa_fx.attention.window_attention`.
        size: likewise.
        text: likewise.
        masked: whether the model has a mask of its own.
        refresh: whether the step computes full attention and a new residual, and not a window.

    Raises:
        OptionError: a kernel was asked for where it cannot run.
    """
    shape: dict[str, Any] = {"grid": grid, "size": size, "text": text}
    chosen = choose_kernel(requested, like=like, masked=masked, **shape)
    if requested != "auto" or chosen == "sdpa" or like.device.type != "cuda":
        return chosen
    key = _key(like, sizes, shape, refresh)
    if key not in _found:
        _found[key] = _remembered(key) or _remember(key, _fastest(like, sizes, shape, refresh))
    return _found[key]


def possible_kernels(*, like: Tensor, **shape: Any) -> tuple[WindowKernel, ...]:
    """The kernels that can serve a site without a mask of its own."""
    found = []
    for name in WINDOW_KERNELS[1:]:
        with contextlib.suppress(OptionError):
            if choose_kernel(name, like=like, masked=False, **shape) == name:
                found.append(name)
    return tuple(found)


def step_of(
    kernel: WindowKernel, inputs: Sequence[Tensor], *, refresh: bool, grid: tuple[int, ...], **shape: Any
) -> Callable[[], Sequence[Tensor]]:
    """What a site does with ``kernel``: attention in the window, or full attention and a new residual.

    Args:
        kernel: one of :func:`possible_kernels`.
        inputs: q, k, v, each [B, H, N, D], and a residual, [B, N, H, D].
        refresh: full attention and a new residual, or a window with the residual.
        grid: see :func:`difa_fx.attention.window_attention`; ``shape`` holds ``size`` and ``text``.
    """
    q, k, v, residual = inputs
    like = torch.empty(0, dtype=q.dtype, device=q.device)
    settings: dict[str, Any] = {"grid": grid, "kernel": kernel, **shape}
    at_once = refresh and refreshes_at_once(kernel, like=like)
    constants = (refresh_tensors if at_once else window_tensors)(kernel, like=like, grid=grid, **shape)

    def window(q: Tensor, k: Tensor, v: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        return (window_attention(q, k, v, None, *constants, residual_BNHD=residual, **settings),)

    def both(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        if at_once:
            return refreshed_attention(q, k, v, *constants, **settings)
        full = scaled_dot_product_attention(q, k, v)
        return full, window_residual(full, q, k, v, None, *constants, **settings)

    step, wanted = (both, (q, k, v)) if refresh else (window, (q, k, v, residual))
    if kernel == "flex":
        return _compiled(step, wanted)
    return lambda: step(*wanted)


def _compiled(step: Callable[..., Any], inputs: Sequence[Tensor]) -> Callable[[], Sequence[Tensor]]:
    """``step`` as Inductor compiles it in a piece."""
    fakes = fake_inputs(inputs, new_fake_mode())

    class Step(nn.Module):
        def forward(self, *values: Tensor) -> Any:
            return step(*values)

    graph = trace_aten(cast(Any, Step()), fakes)
    run = begin_lowering(graph, fakes, {"epilogue_fusion": inputs[0].is_cuda})()
    return lambda: run(list(inputs))


def _fastest(like: Tensor, sizes: Sequence[int], shape: Mapping[str, Any], refresh: bool) -> WindowKernel:
    inputs = _inputs(like, sizes)
    seconds: dict[WindowKernel, float] = {}
    possible = possible_kernels(like=like, **shape)
    if "triton" in possible:
        # Measured behind our own at every size, and the only one that takes seconds to compile.
        possible = tuple(kernel for kernel in possible if kernel != "flex")
    for kernel in possible:
        with _left_out_with_a_warning(kernel, shape):
            seconds[kernel] = seconds_of(step_of(kernel, inputs, refresh=refresh, **shape))
    return min(seconds, key=lambda kernel: seconds[kernel]) if seconds else possible[0]


def _inputs(like: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Queries, keys and values, [B, H, N, D], as projections yield them, and a residual, [B, N, H, D]."""
    batch, heads, tokens, width = sizes
    own = torch.Generator(like.device).manual_seed(0)  # the user's generators stay where they are
    form: dict[str, Any] = {"dtype": like.dtype, "device": like.device, "generator": own}
    made = [torch.randn(batch, tokens, heads, width, **form) for _ in range(4)]
    return [*(value.transpose(1, 2) for value in made[:3]), made[3]]


@contextlib.contextmanager
def _left_out_with_a_warning(kernel: str, shape: Mapping[str, Any]) -> Iterator[None]:
    """Whatever a kernel cannot do here, another one can."""
    try:
        yield
    except Exception as error:  # noqa: BLE001  the others are there in its place
        warnings.warn(f"the kernel {kernel!r} is left out for a window of {dict(shape)}: {error}", stacklevel=3)


def _key(like: Tensor, sizes: Sequence[int], shape: Mapping[str, Any], refresh: bool) -> str:
    device = torch.cuda.get_device_name(like.device)
    return (
        f"{torch.__version__} {device} {like.dtype} {tuple(sizes)} {dict(shape)} {'refresh' if refresh else 'window'}"
    )


def _remembered(key: str) -> WindowKernel | None:
    found = _known().get(key)
    return found if found in WINDOW_KERNELS else None


def _remember(key: str, kernel: WindowKernel) -> WindowKernel:
    _path().parent.mkdir(parents=True, exist_ok=True)
    write_text(_path(), json.dumps({**_known(), key: kernel}, indent=1) + "\n")
    return kernel


def _known() -> dict[str, Any]:
    """What was measured before; what cannot be read is measured anew."""
    try:
        found = json.loads(_path().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _path() -> Path:
    return cache_folder() / _FILE
