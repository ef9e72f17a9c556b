"""How far a candidate's output is from the reference's: the measures that calibration compares with a threshold.

All are computed in float32, or in float64 for float64 outputs, whatever the denoiser runs in: a difference of two
nearly equal half-precision numbers is mostly rounding.  All are 0 for equal outputs, and NaN where an output is NaN.

O is the reference output, O' the candidate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, TypeAlias

import torch
from torch import Tensor

from difa_fx.errors import CalibrationError, OptionError, nearest

__all__ = ["LOSSES", "Loss", "loss", "paper", "reference", "rse", "ssim"]

#: ``(O, O')`` of equal shape to one number, a 0-d float32 or float64 tensor.
Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]

#: Keeps the relative losses finite where both outputs are 0.
_TINY: Final = 1e-6
#: No element counts for more than this in the relative losses.
_MOST: Final = 10.0
#: Elements that SSIM's Gaussian of sigma 1.5 reaches to either side; the border is reflected over as many.
_REACH: Final = 5


def paper(reference_output: Tensor, candidate: Tensor) -> Tensor:
    """Mean of ``clip(|O - O'| / (max(|O|, |O'|) + 1e-6), 0, 10)``: section 3.5 of arXiv 2406.08552."""
    ref, cand = _pair(reference_output, candidate)
    return _relative(ref - cand, torch.maximum(ref.abs(), cand.abs()))


def reference(reference_output: Tensor, candidate: Tensor) -> Tensor:
    """As :func:`paper` with ``max(O, O')`` instead: what the authors' code computes.

    It is never smaller than the paper's and 1.4 to 2 times as large on most outputs, since where both numbers are
    negative the smaller magnitude divides, and where the signs differ the positive one does.  A threshold for one is
    none for the other.
    """
    ref, cand = _pair(reference_output, candidate)
    return _relative(ref - cand, torch.maximum(ref, cand))


def rse(reference_output: Tensor, candidate: Tensor) -> Tensor:
    """Relative squared error, ``sum((O - O')^2) / sum(O^2)``; infinite where O alone is all zeros."""
    ref, cand = _pair(reference_output, candidate)
    error = (ref - cand).square().sum()
    return torch.where(error == 0, error, error / ref.square().sum())


def ssim(reference_output: Tensor, candidate: Tensor) -> Tensor:
    """One minus the structural similarity of images ``[B, C, H, W]``, or of each frame of a video.

    The range of the values is that of O.  A video has two dimensions between batch and rows, channels and frames in
    either order.

    Raises:
        OptionError: the outputs are no images, are too small, or torchmetrics is not installed.
    """
    ref, cand = _pair(reference_output, candidate)
    if ref.ndim not in (4, 5) or min(ref.shape[-2:]) <= _REACH:
        raise OptionError(
            "the loss ssim compares images, and the denoiser's output is none",
            where="loss",
            got=f"an output of shape {list(ref.shape)}",
            allowed=f"[B, C, H, W], or 5 dimensions for video, H and W above {_REACH}",
            todo='use the loss "paper", "reference" or "rse"',
        )
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError:
        raise OptionError(
            "the loss ssim needs torchmetrics, which is not installed",
            where="loss",
            got="ssim",
            allowed=[name for name in LOSSES if name != "ssim"],
            todo="pip install torchmetrics",
        ) from None
    # A constant reference has no range of its own, and a range of 0 would give 0/0 for equal outputs.
    span = (ref.amax() - ref.amin()).item() or 1.0
    # Channels are compared one by one, so it makes no difference which dimension is theirs and which the frames'.
    cand_N1HW, ref_N1HW = (x.flatten(0, -3).unsqueeze(1) for x in (cand, ref))
    similarity = structural_similarity_index_measure(cand_N1HW, ref_N1HW, data_range=span)
    assert isinstance(similarity, Tensor)
    return 1 - similarity


#: Every loss by the name that calibration's option ``loss`` takes.
LOSSES: Final[Mapping[str, Loss]] = {"paper": paper, "reference": reference, "rse": rse, "ssim": ssim}


def loss(name: str) -> Loss:
    """The loss of that name.

    Raises:
        OptionError: there is none.
    """
    if name not in tuple(LOSSES):
        close = nearest(str(name), LOSSES)
        raise OptionError(
            "unknown loss",
            where="loss",
            got=name,
            allowed=list(LOSSES),
            todo=f"did you mean {' or '.join(close)}?" if close else "use one of those names",
        )
    return LOSSES[name]


def _pair(ref: Tensor, cand: Tensor) -> tuple[Tensor, Tensor]:
    if ref.shape != cand.shape:
        raise CalibrationError(
            "two outputs of different shapes cannot be compared",
            where="loss",
            got=f"{list(cand.shape)}",
            allowed=f"{list(ref.shape)}, as the reference",
            todo="give both runs the same inputs",
        )
    dtype = torch.promote_types(torch.promote_types(ref.dtype, cand.dtype), torch.float32)
    return ref.detach().to(dtype), cand.detach().to(dtype)


def _relative(difference: Tensor, size: Tensor) -> Tensor:
    ratio = (difference / (size + _TINY)).abs().clamp(0, _MOST)
    # Both at exactly -1e-6 give 0/0 where the size has a sign.
    return torch.where(difference == 0, 0.0, ratio).mean()
