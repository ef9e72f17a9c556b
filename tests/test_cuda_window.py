"""The kernel for CUDA in Triton's interpreter, on the CPU: the numbers of attention written out; and who may have it.

The interpreter runs blocks of 32 queries and tiles of 16 keys.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from typing import Any

import pytest
import torch
from processes import HERE, run

from difa_fx import attention, cuda_launch, cuda_window
from difa_fx.cuda_launch import Operands, columns
from difa_fx.errors import OptionError


def triton_version() -> tuple[int, ...]:
    try:
        found = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return ()
    return tuple(int(part) for part in found.split("+")[0].split(".")[:2])


needs_triton = pytest.mark.skipif(
    triton_version() < (3, 7), reason="Triton's interpreter is missing, or too old for NumPy 2.4 (3.7 is not)"
)

CASES: dict[str, list[dict[str, Any]]] = {
    "windows": [
        {"image": 128, "window": 5},  # whole blocks; narrower than a tile
        {"image": 128, "window": 32},
        {"image": 128, "window": 33, "residual": False},
        {"image": 128, "window": 39},  # ends a key before a tile does, and so does the next in a refresh
        {"image": 128, "window": 46},
        {"image": 100, "window": 24},
        {"image": 101, "window": 60, "batch": 2},
        {"image": 70, "window": 0},
        {"image": 40, "window": 39},
        {"image": 49, "window": 1000},
        {"image": 50, "window": 48},  # a single key is missed, by two queries
        {"image": 1, "window": 0},
        {"image": 7, "window": 2},
    ],
    "text": [
        {"image": 70, "window": 9, "text": (3, 0)},
        {"image": 64, "window": 20, "text": (0, 5)},
        {"image": 61, "window": 17, "text": (7, 2)},
        {"image": 45, "window": 6, "text": (40, 33)},  # whole tiles of text, and more than a block
        {"image": 32, "window": 4, "text": (16, 32)},
        {"image": 30, "window": 99, "text": (20, 3)},
    ],
    "widths and layouts": [
        {"image": 50, "window": 9, "width": 72},
        {"image": 50, "window": 9, "width": 64, "layout": "packed"},
        {"image": 50, "window": 9, "width": 40, "layout": "contiguous", "scale": 0.3},
        {"image": 40, "window": 9, "width": 96, "layout": "shared"},
        {"image": 40, "window": 9, "width": 24, "layout": "columns", "scale": -0.2},
        {"image": 40, "window": 9, "width": 5, "layout": "packed", "batch": 2},  # its rows are not aligned
    ],
    "pointers": [  # without tensor maps
        {"image": 101, "window": 60, "batch": 2, "maps": False},
        {"image": 61, "window": 17, "text": (7, 2), "maps": False},
        {"image": 50, "window": 9, "width": 72, "maps": False},
        {"image": 40, "window": 9, "width": 96, "layout": "packed", "batch": 2, "maps": False},
    ],
    "numbers": [
        {"image": 70, "window": 3, "loud": 20.0},
        {"image": 70, "window": 20, "loud": 200.0},
        {"image": 40, "window": 6, "loud": 200.0, "text": (5, 3)},
    ],
}


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("kind", CASES)
def test_the_kernel_is_attention_written_out(kind: str) -> None:
    for case, found in zip(CASES[kind], interpreted(CASES[kind]), strict=True):
        assert found.pop("not zero", 0) == 0, case
        loud = case.get("loud", 1.0)
        assert max(found.values()) < (2e-6 if loud == 1.0 else 1e-5 * loud), (case, found)


@needs_triton
@pytest.mark.slow
def test_half_precision_is_rounded_no_more_than_it_must_be() -> None:
    (found,) = interpreted([{"image": 60, "window": 13, "width": 72, "text": (0, 4), "dtype": "float16"}])
    assert max(found.values()) < 2**-9, found  # the interpreter has no bfloat16


def interpreted(cases: list[dict[str, Any]]) -> list[dict[str, float]]:
    python = ["env", "TRITON_INTERPRET=1", sys.executable, "-W", "ignore"]
    return json.loads(run([*python, str(HERE / "interpreted_windows.py"), json.dumps(cases)]))


@pytest.mark.skipif(not triton_version(), reason="triton is missing")
@pytest.mark.slow
def test_a_later_launch_hands_over_what_triton_would() -> None:
    cases = json.loads(run([sys.executable, "-W", "ignore", str(HERE / "launched_windows.py")]))
    assert len(cases) == 7
    for name, found in cases.items():
        first, *later = found.pop("asked")
        assert first >= 1 and later == [0, 1], name
        assert found == {"one form": True, "as by Triton": True, "again": True}, name


def form(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **settings: Any) -> cuda_launch.Form:
    out = torch.zeros(q.shape[0], q.shape[2], q.shape[1], q.shape[3], dtype=q.dtype)
    how = {"window": 4, "text": (0, 0), "scale": 1.0, "maps": True} | settings
    return Operands(q, k, v, how.pop("residual", None), out, how.pop("missed", None)).form(**how)


def test_what_the_memory_unit_can_load() -> None:
    packed_BNK = torch.zeros(2, 30, 3 * 4 * 72, dtype=torch.float16)
    q_BHND = packed_BNK.unflatten(2, (3, 4, 72)).unbind(2)[1].transpose(1, 2)

    def mappable(t_BHND: torch.Tensor) -> bool:
        return cuda_launch.mappable(form(t_BHND, t_BHND, t_BHND), 1)

    assert mappable(q_BHND) and mappable(q_BHND.contiguous())
    assert mappable(q_BHND[:1, :1])
    assert not mappable(packed_BNK.flatten()[1:-71].view(1, 1, -1, 72)), "not at a multiple of 16 bytes"
    assert not mappable(q_BHND[:, :1].expand(-1, 4, -1, -1)), "a row twice"
    assert not mappable(torch.zeros(2, 4, 30, 5, dtype=torch.float16)), "rows of 10 bytes"


def test_tensors_of_one_form_share_a_launcher_and_others_do_not() -> None:
    packed_BNK = torch.zeros(2, 30, 4 * 72 + 8, dtype=torch.float16)
    q = packed_BNK[..., :-8].unflatten(2, (4, 72)).transpose(1, 2)
    like, shifted = torch.zeros_like(packed_BNK)[..., 8:].unflatten(2, (4, 72)).transpose(1, 2), packed_BNK[..., 1:-7]
    usual, other = form(q, q, q), torch.zeros(2, 30, 4, 72, dtype=torch.float16)
    assert form(like, q, like) == usual and hash(form(like, q, like)) == hash(usual)
    different = [
        form(q, q, shifted.unflatten(2, (4, 72)).transpose(1, 2)),
        form(q, other.transpose(1, 2), q),
        form(q[:1], q[:1], q[:1]),
        form(*[t.to(torch.bfloat16) for t in (q, q, q)]),
        form(q, q, q, residual=other),
        form(q, q, q, missed=other),
        *(form(q, q, q, **one) for one in ({"window": 5}, {"text": (1, 0)}, {"scale": 2.0}, {"maps": False})),
    ]
    assert len({usual, *different}) == 1 + len(different)


def test_a_width_is_two_powers_of_two_and_wastes_little() -> None:
    expected = {8: (16, 0), 40: (32, 16), 64: (64, 0), 72: (64, 16), 80: (64, 16), 96: (64, 32), 160: (128, 32)}
    assert {width: columns(width) for width in expected} == expected
    for width in range(1, 513):
        head, tail = columns(width)
        assert width <= head + tail < max(2 * width, 32)
        assert {size >= 16 and size.bit_count() == 1 for size in (head, tail or 16)} == {True}


def test_every_width_has_blocks_to_try() -> None:
    for width in range(1, 513):
        assert 1 <= len(cuda_launch.blocks(width)) <= 3


SITE = {"grid": (1024,), "size": (128,), "text": (0, 0), "masked": False}
HALF = torch.empty(0, dtype=torch.bfloat16)


def test_it_is_for_cuda_alone() -> None:
    with pytest.raises(OptionError, match=r"'triton' for torch.bfloat16 on cpu.*\n?.*with triton"):
        attention.choose_kernel("triton", like=HALF, **SITE)
    assert attention.choose_kernel("triton", like=HALF, **SITE | {"masked": True}) == "sdpa"


def test_who_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnCuda:
        device = torch.device("cuda")

        def __init__(self, dtype: torch.dtype) -> None:
            self.dtype = dtype

    monkeypatch.setattr(cuda_window, "has_triton", lambda: True)
    half, single = OnCuda(torch.float16), OnCuda(torch.float32)
    assert attention.choose_kernel("auto", like=half, **SITE) == "triton"
    assert attention.choose_kernel("auto", like=single, **SITE) == "flex"
    grid = SITE | {"grid": (32, 32), "size": (4, 4)}
    assert attention.choose_kernel("auto", like=half, **grid) == "flex"
    with pytest.raises(OptionError, match="one axis"):
        attention.choose_kernel("triton", like=half, **grid)
    monkeypatch.setattr(cuda_window, "has_triton", lambda: False)
    assert attention.choose_kernel("auto", like=half, **SITE) == "flex"
    with pytest.raises(OptionError, match="with triton"):
        attention.choose_kernel("triton", like=half, **SITE)
