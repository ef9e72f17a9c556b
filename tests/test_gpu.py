"""On CUDA: every window kernel and dtype agrees with the eager oracle, and CUDA graphs keep the state."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from compiled import compiled, make_plan, run
from models import Case, dit, relative, tensor_of
from oracle import Oracle

from difa_fx.cuda_launch import launcher
from difa_fx.window_ops import near_refresh, near_window

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),  # float32 stays exact here
]

ROWS = ["full", "window+cfg", "cached", "full+cfg", "window", "cached", "window+cfg", "full", "window+cfg"]
ROUNDING = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@pytest.fixture(autouse=True)
def exact_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle's convolution would round to TensorFloat32 where Inductor makes a matrix product of it."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def on_cuda(found: Case, dtype: torch.dtype) -> Case:
    return replace(found, model=found.model.to("cuda", dtype))


def calls_on_cuda(found: Case, steps: int, dtype: torch.dtype) -> list[Any]:
    def moved(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.to("cuda", dtype if value.is_floating_point() else None)

    calls = found.generation(steps)
    return [(tuple(map(moved, args)), {k: moved(v) for k, v in kwargs.items()}) for args, kwargs in calls]


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("kernel", ["triton", "flex", "sdpa", "flash"])
def test_kernels_and_dtypes_agree_with_the_oracle(kernel: str, dtype: torch.dtype) -> None:
    if kernel in ("triton", "flash") and dtype is torch.float32:
        pytest.skip("it takes half precision")
    found = on_cuda(dit(layers=2, width=144, heads=2, sample_size=32), dtype)
    plan = make_plan(found, ROWS, window=128)
    calls = calls_on_cuda(found, plan.steps, dtype)
    got = run(compiled(found, plan, "inductor", window_kernel=kernel), calls)
    for step, (ours, theirs) in enumerate(zip(got, Oracle(found.model, plan).run(calls), strict=True)):
        assert relative(ours.float(), tensor_of(theirs).float()) < ROUNDING[dtype], f"step {step}"


def test_state_survives_cuda_graphs() -> None:
    found = on_cuda(dit(layers=2, sample_size=16), torch.float32)
    plan = make_plan(found, ROWS, window=32)
    calls = calls_on_cuda(found, plan.steps, torch.float32)
    expected = run(compiled(found, plan, "inductor"), calls)
    torch._dynamo.reset()
    options = {"plan": plan, "mode": "reduce-overhead"}
    model = torch.compile(found.model, backend="difa", options=options, dynamic=False)
    for _ in range(3):
        outputs = run(model, calls)
    for step, (ours, theirs) in enumerate(zip(outputs, expected, strict=True)):
        assert relative(ours, theirs) < 1e-4, f"step {step}"


@pytest.mark.parametrize("refresh", [False, True])
def test_a_later_launch_computes_what_the_first_does(refresh: bool) -> None:
    attend, wide = near_refresh if refresh else near_window, torch.randn(3, 2, 300, 2, 88, device="cuda")
    for first in (0, 8, 1):  # rows of 72 columns at multiples of 16 bytes, again, and not
        q, k, v = wide.bfloat16()[..., first : first + 72].transpose(2, 3)
        how = (16, [2, 0], None)
        residual = torch.randn(2, 300, 2, 72, device="cuda", dtype=torch.bfloat16)
        inputs = (q, k, v) if refresh else (q, k, v, residual)
        launcher.cache_clear()
        once = attend(*inputs, *how)
        for _ in range(2):
            for ours, theirs in zip(_tuple(attend(*inputs, *how)), _tuple(once), strict=True):
                assert torch.equal(ours, theirs)
        moved = [t.clone() for t in inputs]
        for ours, theirs in zip(_tuple(attend(*moved, *how)), _tuple(once), strict=True):
            assert relative(ours.float(), theirs.float()) < 1e-2


def _tuple(values: Any) -> tuple[torch.Tensor, ...]:
    return values if isinstance(values, tuple) else (values,)
