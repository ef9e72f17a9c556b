"""Functions for ``module:function``, most of them faulty."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn


def raises() -> Any:
    """A fault of the user's."""
    raise ZeroDivisionError("no\x1b[31m luck")


def exits() -> Any:
    """Leaves the program."""
    sys.exit(7)


def interrupted() -> Any:
    """The user has had enough."""
    raise KeyboardInterrupt


def nothing() -> Any:
    """Returns something else."""


def faulty_denoiser() -> Any:
    """A denoiser that does not take its inputs."""
    return nn.Linear(4, 4), (torch.ones(3, 5),), {}


def denoiser() -> Any:
    """One without attention."""
    return nn.Linear(4, 4), (torch.ones(3, 4),), {}
