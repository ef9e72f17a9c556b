"""Launches of the kernel for windows on CUDA, without what Triton would work out anew at each of them.

Triton binds a kernel's arguments by name, asks the autotuner for what it found, and looks for the compiled kernel by
the types and alignments of all arguments.  That takes the host longer than the kernel takes the device over a
thousand tokens.  All of it follows from the :class:`Form` of the tensors, so the first launch with a form is Triton's;
later ones give the kernel that was compiled then nothing but its arguments.

Letters: B batch, H heads, N tokens, D head width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

Blocks = tuple[int, int, int, int, int | None]
"""Queries of a block, keys of a tile, warps, stages of the pipeline that loads tiles, and registers if few."""

TRACED: Final[Blocks] = (32, 16, 4, 1, None)
"""For Triton's interpreter, which is what runs kernels on tensors of the CPU: small, so that small tests have many."""

_LEAST_TILE: Final = 16
_ALIGNMENT: Final = 16
"""Bytes: what Triton compiles another kernel for, and what the memory unit of sm_90 wants."""


class Form(NamedTuple):
    """All that a launch is compiled and tuned for.

    Attributes:
        shape: of queries, keys and values, [B, H, N, D].
        strides: theirs, in this order; rows are contiguous.
        dtype: of all tensors.
        device: where they are.
        aligned: which of :class:`Operands` lie at multiples of 16 bytes; those that are missing do.
        adds: whether a residual is added.
        refreshes: whether full attention is computed, and what the window misses of it.
        window: tokens to either side.
        text: text tokens before and after the image.
        scale: of the scores, above 0.
        maps: whether tiles may be loaded through tensor maps.
    """

    shape: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    device: torch.device
    aligned: tuple[bool, ...]
    adds: bool
    refreshes: bool
    window: int
    text: tuple[int, ...]
    scale: float
    maps: bool


class Operands(NamedTuple):
    """The tensors of a launch: [B, H, N, D] the first three, [B, N, H, D] and contiguous the others."""

    q: Tensor
    k: Tensor
    v: Tensor
    residual: Tensor | None
    out: Tensor
    missed: Tensor | None

    def form(self, *, window: int, text: tuple[int, ...], scale: float, maps: bool) -> Form:
        """What a launch with them is compiled for."""
        q, k, v, residual, _, missed = self
        return Form(
            q.shape,
            (q.stride(), k.stride(), v.stride()),
            q.dtype,
            q.device,
            tuple([t is None or t.data_ptr() % _ALIGNMENT == 0 for t in self]),
            residual is not None,
            missed is not None,
            window,
            text,
            scale,
            maps,
        )


def columns(width: int) -> tuple[int, int]:
    """A head's width as two powers of two, the second filled up, or 0."""
    head = max(16, 1 << (width.bit_length() - 1))
    rest = max(0, width - head)
    return head, max(16, 1 << (rest - 1).bit_length()) if rest else 0


def blocks(width: int) -> tuple[Blocks, ...]:
    """What is worth a try; up to width 80 each was the fastest somewhere, on an H200.

    Up to width 256 the loops keep all that they need in registers (compiled for sm_90), and use its wgmma.  With 128
    registers a multiprocessor has two blocks of eight warps or four of four: one computes weights while another's
    products run.
    """
    if width <= 80:
        return (128, 64, 8, 3, 128), (64, 64, 4, 2, 128), (128, 64, 4, 3, None)
    if width <= 128:
        return (128, 64, 8, 3, None), (128, 32, 8, 3, None), (64, 64, 4, 2, None)
    if width <= 160:
        return (128, 32, 8, 3, None), (64, 64, 8, 2, None)
    return ((64, 32, 8, 2, None),) if width <= 256 else ((64, 16, 8, 2, None),)


def mappable(form: Form, which: int) -> bool:
    """Whether sm_90's memory unit can load tiles of operand ``which``: rows at multiples of 16 bytes, none twice."""
    if form.device.type == "cuda" and torch.cuda.get_device_capability(form.device) < (9, 0):
        return False
    steps = [step for step, length in zip(form.strides[which][:3], form.shape[:3], strict=True) if length > 1]
    size = form.dtype.itemsize
    return form.aligned[which] and all(step > 0 and step * size % _ALIGNMENT == 0 for step in steps)


class Launcher:
    """Launches the kernel with operands of one form, through Triton the first time."""

    def __init__(self, form: Form) -> None:
        batch, heads, tokens, width = form.shape
        steps = [s if n > 1 else 0 for t in form.strides for s, n in zip(t[:3], form.shape[:3], strict=True)]
        unit = math.gcd(8, *steps)
        head, tail = columns(width)
        self._form, self._traced = form, form.device.type == "cpu"
        self._images, self._texts = tokens - sum(form.text), sum(form.text)
        self._sequences = batch * heads
        scale = form.scale * math.log2(math.e)
        numbers = (heads, tokens, min(form.window, tokens), *form.text, scale)
        self._numbers = (*(step // unit for step in steps), *numbers)
        self._settings = {"UNIT": unit, "WIDTH": width, "HEAD": head, "TAIL": tail, "TEXT": any(form.text)}
        maps = form.maps and mappable(form, 1) and mappable(form, 2)
        self._map_widths = (head, tail) if maps else (0, 0)
        self._maps: tuple[Any, ...] = ()
        self._compiled: Callable[..., None] | None = None
        self._constants: tuple[Any, ...] = ()

    def __call__(self, operands: Operands) -> None:
        """Compute ``out`` and ``missed``, which are overwritten."""
        q, k, v, *rest = operands
        if self._compiled is None:
            self._launch_first(operands)
            return
        maps = [_moved(tiles, t) for t, tiles in zip((k, k, v, v), self._maps, strict=True)]
        self._compiled(q, k, v, *maps, *rest, *self._numbers, *self._constants)

    def _launch_first(self, operands: Operands) -> None:
        q, k, v, *rest = operands
        kernel, options = self._kernel()
        length = options.get("BLOCK_L", _LEAST_TILE)
        maps = [_tiles(t, self._form, size, length) for t in (k, v) for size in self._map_widths]
        compiled = kernel[self._grid](q, k, v, *maps, *rest, *self._numbers, **self._settings, **options)
        if compiled is None:  # Triton's interpreter compiles nothing
            return
        found = kernel.best_config.kwargs
        self._maps = tuple(_moved(tiles, None) for tiles in maps)
        self._constants = (*self._settings.values(), *found.values())
        grid = (*self._grid(found), 1, 1)
        self._compiled = compiled[grid]

    def _grid(self, meta: dict[str, Any]) -> tuple[int]:
        block = meta["BLOCK_M"]
        return (self._sequences * (-(-self._images // block) + -(-self._texts // block)),)

    def _kernel(self) -> tuple[Any, dict[str, Any]]:
        """The kernel, and how it is to be compiled."""
        options: dict[str, Any] = {"enable_fp_fusion": True}  # newer versions of triton ask to be told
        if not self._traced:
            return tuned(self._form.shape[-1], self._form.refreshes, any(self._map_widths)), options
        from difa_fx.cuda_kernels import near_kernel

        names = ("BLOCK_M", "BLOCK_L", "num_warps", "num_stages", "maxnreg")
        return near_kernel, options | dict(zip(names, TRACED, strict=True))


@functools.cache
def launcher(form: Form) -> Launcher:
    """The launcher for a form."""
    return Launcher(form)


@functools.cache
def tuned(width: int, refresh: bool, maps: bool) -> Any:
    """The kernel, with what the autotuner may try; what it found for windows says nothing of refreshing steps."""
    import triton

    from difa_fx.cuda_kernels import near_kernel

    configs = [
        triton.Config(
            {"BLOCK_M": queries, "BLOCK_L": keys},
            num_warps=warps,
            num_stages=stages,
            maxnreg=registers,
            pre_hook=_cut if maps else None,
        )
        for queries, keys, warps, stages, registers in blocks(width)
    ]
    return triton.autotune(configs, key=["heads", "tokens", "window", "WIDTH"])(near_kernel)


def _cut(arguments: dict[str, Any]) -> None:
    """Let tiles be as long as the autotuner wants them."""
    for name in ("k_map", "k_tail_map", "v_map", "v_tail_map"):
        if arguments[name] is not None:
            arguments[name].block_shape[2] = arguments["BLOCK_L"]


def _tiles(tensor: Tensor, form: Form, columns: int, length: int) -> Any:
    """A map of tiles of keys or values, so many columns and keys; what lies outside the tensor is zeros."""
    if not columns:
        return None
    from triton.tools.tensor_descriptor import TensorDescriptor

    # An axis of size 1 may have any stride; 16 is one that serves.
    strides = [step if size > 1 else 16 for step, size in zip(tensor.stride()[:3], form.shape[:3], strict=True)]
    return TensorDescriptor(tensor, list(form.shape), [*strides, 1], [1, 1, length, columns])


def _moved(tiles: Any, tensor: Tensor | None) -> Any:
    """The same map of another tensor of the form: what its constructor checks, it has checked for the form."""
    if tiles is None:
        return None
    moved = object.__new__(type(tiles))
    vars(moved).update(vars(tiles), base=tensor)
    return moved
