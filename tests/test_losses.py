"""The losses, against numbers worked out by hand."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from difa_fx.errors import CalibrationError, OptionError
from difa_fx.losses import LOSSES, loss

NAMES = list(LOSSES)


def value(name: str, ref: list[float], cand: list[float]) -> float:
    double = torch.float64
    return loss(name)(torch.tensor(ref, dtype=double), torch.tensor(cand, dtype=double)).item()


# By hand


def test_paper():
    # 1/2 of the larger, 0, both negative 1/4 of the larger magnitude, opposite signs 3/2
    got = value("paper", [1.0, 5.0, -4.0, 2.0], [2.0, 5.0, -3.0, -1.0])
    assert got == pytest.approx((1 / 2 + 0 + 1 / 4 + 3 / 2) / 4, rel=1e-5)


def test_reference():
    # As the paper's, but -3 divides the third and 2 the fourth; the fifth is 100/1, cut to 10
    got = value("reference", [1.0, 5.0, -4.0, 2.0, 1.0], [2.0, 5.0, -3.0, -1.0, -99.0])
    assert got == pytest.approx((1 / 2 + 0 + 1 / 3 + 3 / 2 + 10) / 5, rel=1e-5)


def test_rse():
    assert value("rse", [3.0, 4.0], [3.0, 2.0]) == pytest.approx(4 / 25)


def test_small_numbers_are_held_up_by_the_constant():
    assert value("paper", [0.0], [1e-6]) == pytest.approx(0.5)
    assert value("reference", [-1e-6], [-1e-6]) == 0
    assert value("reference", [-1e-6], [-2e-6]) == 10


def test_ssim_of_a_shifted_constant():
    # Without variance the structure term is 1, and what is left is (2ab + c) / (a^2 + b^2 + c), c = (0.01 range)^2.
    # The range of a constant reference counts as 1.
    a, b, c = 0.5, 0.7, 0.01**2
    got = loss("ssim")(torch.full((1, 2, 16, 16), a), torch.full((1, 2, 16, 16), b))
    assert got.item() == pytest.approx(1 - (2 * a * b + c) / (a * a + b * b + c), rel=1e-3)


def test_ssim_takes_the_range_of_the_reference():
    ref = torch.rand(2, 4, 16, 16, dtype=torch.float64)
    cand = ref + 0.1 * torch.randn_like(ref)
    small = loss("ssim")(ref, cand)
    torch.testing.assert_close(loss("ssim")(100 * ref, 100 * cand), small)
    cand[0, 0, 0, 0] = 1e3  # a range that the candidate set would make everything alike
    assert loss("ssim")(ref, cand) > small
    assert 0 < small < 1


def test_ssim_of_a_video_is_that_of_its_frames():
    ref, cand = torch.rand(2, 3, 4, 8, 8), torch.rand(2, 3, 4, 8, 8)
    frames = [loss("ssim")(ref[:, :, i], cand[:, :, i]).item() for i in range(4)]
    # The range is that of the whole video.
    assert loss("ssim")(ref, cand).item() == pytest.approx(sum(frames) / 4, rel=0.02)
    torch.testing.assert_close(loss("ssim")(ref, cand), loss("ssim")(ref.transpose(1, 2), cand.transpose(1, 2)))


# What all have in common


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_nothing_is_computed_in_half_precision(name, dtype):
    ref = torch.randn(2, 4, 16, 16).to(dtype)
    cand = (ref + 0.05 * torch.randn(2, 4, 16, 16)).to(dtype)
    got = loss(name)(ref, cand)
    assert got.shape == ()
    assert got.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
    torch.testing.assert_close(got.double(), loss(name)(ref.double(), cand.double()), rtol=1e-4, atol=1e-6)


def test_large_half_precision_numbers_do_not_overflow():
    ref = torch.full((8,), 6e4, dtype=torch.float16)
    assert loss("paper")(ref, -ref).item() == pytest.approx(2)
    assert loss("rse")(ref, -ref).item() == pytest.approx(4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fill", [0.0, -1e-6, 3.0])
def test_equal_outputs_have_no_loss(name, fill):
    ref = torch.full((1, 4, 8, 8), fill)
    assert loss(name)(ref, ref.clone()).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_outputs_that_are_no_numbers_have_no_loss_below_a_threshold(name):
    ref = torch.rand(1, 4, 8, 8)
    cand = ref.clone()
    cand[0, 0, 0, 0] = float("nan")
    assert loss(name)(ref, cand).isnan()


def test_zeros():
    zeros, ones = torch.zeros(4), torch.ones(4)
    assert loss("rse")(zeros, ones).item() == float("inf")
    assert loss("rse")(ones, zeros).item() == 1
    assert loss("paper")(zeros, ones).item() == pytest.approx(1, rel=1e-5)


@given(st.lists(st.tuples(*[st.floats(-100, 100)] * 2), min_size=1, max_size=20))
@settings(deadline=None)
def test_the_code_is_never_below_the_paper(pairs):
    ref, cand = [a for a, _ in pairs], [b for _, b in pairs]
    assert value("reference", ref, cand) >= value("paper", ref, cand) - 1e-12


def test_the_code_is_above_the_paper_on_mixed_signs():
    ref = torch.randn(4, 1000)
    cand = ref + 0.2 * torch.randn(4, 1000)
    ratio = loss("reference")(ref, cand) / loss("paper")(ref, cand)
    assert 1.2 < ratio < 3


# What is refused


@pytest.mark.parametrize(("name", "nearby"), [("papr", "paper"), ("mse", "rse"), ("", "one of"), (["paper"], "")])
def test_unknown_names(name, nearby):
    with pytest.raises(OptionError) as caught:
        loss(name)
    assert "allowed: paper, reference, rse, ssim" in str(caught.value)
    assert nearby in str(caught.value)


@pytest.mark.parametrize("shape", [(2, 8), (2, 16, 8), (1, 4, 5, 16), (1, 2, 3, 4, 16, 16)])
def test_ssim_refuses_what_is_no_image(shape):
    with pytest.raises(OptionError, match=r"none[\s\S]*shape \[[\s\S]*\[B, C, H, W\]"):
        loss("ssim")(torch.rand(shape), torch.rand(shape))


def test_ssim_without_torchmetrics(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.image", None)
    with pytest.raises(OptionError, match="pip install torchmetrics"):
        loss("ssim")(torch.rand(1, 1, 8, 8), torch.rand(1, 1, 8, 8))


@pytest.mark.parametrize("name", NAMES)
def test_shapes_must_agree(name):
    with pytest.raises(CalibrationError, match=r"different shapes[\s\S]*\[1, 1, 8, 8\]"):
        loss(name)(torch.rand(1, 1, 8, 8), torch.rand(2, 1, 8, 8))
