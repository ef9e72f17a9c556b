"""What the compiled kernel for CUDA is handed, launch by launch, with a driver that keeps it and launches nothing.

    python launched_windows.py
    python launched_windows.py --time

Triton compiles for sm_90 without a device.  Printed is JSON: for each case, whether a later launch hands to the kernel
what Triton would hand to it, and how often Triton was asked.  Or how many microseconds the host takes for a launch,
without those of the driver: with what is worked out anew each time, and with what is not.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import LazyDict
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from difa_fx import cuda_launch
from difa_fx.bench.timing import Contender, interleaved
from difa_fx.cuda_launch import Launcher, Operands

CASES: dict[str, dict[str, Any]] = {
    "window": {},
    "window without residual": {"adds": False},
    "refresh": {"adds": False, "refreshes": True},
    "window, a head of one part": {"width": 64},
    "window, text": {"text": (3, 2)},
    "window, pointers": {"maps": False},
    "refresh, packed rows that are not aligned": {"adds": False, "refreshes": True, "width": 9},
}


class RecordingDriver:
    """Triton's driver for a device that is not there; the second configuration is the fastest."""

    launches: tuple[tuple[Any, ...], ...] = ()

    def __init__(self) -> None:
        self.utils, self._trials = self, 0

    def launcher_cls(self, source: object, metadata: object) -> Callable[..., None]:
        def launch(*arguments: Any) -> None:
            self.launches = (*self.launches[-3:], tuple(map(_plain, arguments)))

        return launch

    def load_binary(self, *_: Any) -> tuple[int, ...]:
        return 1, 2, 128, 0, 1024

    def get_device_properties(self, _: int) -> dict[str, int]:
        return {"max_shared_mem": 232_448}

    def get_benchmarker(self) -> Callable[..., list[float]]:
        def bench(call: Callable[[], None], **_: Any) -> list[float]:
            call()
            self._trials += 1
            return [1.0 / self._trials] * 3

        return bench

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 7


def _plain(argument: Any) -> Any:
    """Something to compare: tensors and maps of tiles by where they are."""
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    if isinstance(argument, LazyDict):
        return argument.data
    if hasattr(argument, "block_shape"):
        return argument.base.data_ptr(), list(argument.shape), list(argument.strides), argument.padding
    return argument


@contextmanager
def asked() -> Iterator[list[int]]:
    """Counts what is launched through Triton."""
    count, run = [0], JITFunction.run

    def counted(self: Any, *arguments: Any, **options: Any) -> Any:
        count[0] += 1
        return run(self, *arguments, **options)

    JITFunction.run = counted
    try:
        yield count
    finally:
        JITFunction.run = run


def operands(width: int, adds: bool, refreshes: bool) -> Operands:
    """For 40 tokens and two heads; rows are packed."""
    q, k, v = torch.zeros(2, 40, 2, 3 * width, dtype=torch.bfloat16).transpose(1, 2).split(width, -1)
    residual, out, missed = torch.zeros(3, 2, 40, 2, width, dtype=torch.bfloat16)
    return Operands(q, k, v, residual if adds else None, out, missed if refreshes else None)


def found(
    *,
    width: int,
    adds: bool = True,
    refreshes: bool = False,
    text: tuple[int, int] = (0, 0),
    maps: bool = True,
) -> dict[str, Any]:
    """Launches of a form, twice with each of two sets of operands, and once more as if it were new."""
    kept = RecordingDriver()
    driver.set_active(kept)
    first, second = operands(width, adds, refreshes), operands(width, adds, refreshes)
    settings = {"window": 9, "text": text, "scale": 0.3, "maps": maps}
    here = torch.device("cuda", 0)
    form, other = (each.form(**settings)._replace(device=here) for each in (first, second))
    launch = Launcher(form)
    with asked() as at_first:
        launch(first)
    with asked() as later:
        launch(second)
        launch(first)
    with asked() as anew:
        Launcher(form)(second)
    ours, again, tritons = kept.launches[-3:]
    return {
        "one form": form == other,
        "as by Triton": ours == tritons,
        "again": again == kept.launches[-4] != ours,
        "asked": [at_first[0], later[0], anew[0]],
    }


def microseconds() -> dict[str, float]:
    """Of a launch for DiT-XL/2-512, median of 500: Triton's, and ours."""
    driver.set_active(RecordingDriver())
    q, k, v, residual, out = torch.zeros(5, 2, 1024, 16, 72, dtype=torch.bfloat16)
    tensors = Operands(*(t.transpose(1, 2) for t in (q, k, v)), residual, out, None)
    settings = {"window": 128, "text": (0, 0), "scale": 0.1, "maps": True}
    form = tensors.form(**settings)._replace(device=torch.device("cuda", 0))
    ready = Launcher(form)
    ready(tensors)

    def told(launcher: Callable[[], Launcher]) -> Callable[[], None]:
        def launch() -> None:
            tensors.form(**settings)
            launcher()(tensors)

        return launch

    contenders = [Contender("by Triton", told(lambda: Launcher(form))), Contender("later", told(lambda: ready))]
    seconds = interleaved(contenders, rounds=500, warmup=1, cuda=False)
    return {name: round(1e6 * statistics.median(found), 1) for name, found in seconds.items()}


if __name__ == "__main__":
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    if sys.argv[1:] == ["--time"]:
        sys.stdout.write(json.dumps(microseconds()))
        sys.exit()
    cuda_launch.blocks = lambda _: ((32, 32, 4, 2, None), (32, 16, 4, 1, 128))
    sys.stdout.write(json.dumps({name: found(**{"width": 72} | case) for name, case in CASES.items()}))
