"""How a sampler guides, and which half is the conditional one, told from the inputs of its calls.

Under classifier-free guidance the latents are the same twice, in one batch or in two calls, and the unconditional half
is conditioned on the same thing for every sample (an empty prompt, a null class, one negative prompt) where the
conditional half is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from difa_fx.errors import CalibrationError
from difa_fx.passes.inputs import DenoiserInputs
from difa_fx.plan import CFGOrder


def is_guided(args: Sequence[Any], inputs: DenoiserInputs) -> bool:
    """Whether the latents are the same twice."""
    if inputs.latents is None or inputs.batch is None or inputs.batch % 2:
        return False
    first, second = args[inputs.latents].chunk(2)
    return torch.equal(first, second)


def guidance_order(args: Sequence[Any], inputs: DenoiserInputs, dynamic: Sequence[int]) -> CFGOrder:
    """The order of a guided batch.

    Args:
        args: the graph's inputs at a call.
        inputs: what they mean.
        dynamic: positions of those that are no parameters.

    Raises:
        CalibrationError: the inputs do not tell.
    """
    found: set[CFGOrder] = set()
    for position in dynamic:
        value = args[position]
        told = position not in (inputs.latents, inputs.timestep)
        if told and isinstance(value, Tensor) and value.ndim and value.shape[0] == inputs.batch:
            first, second = (_alike(half) for half in value.chunk(2))
            if first != second:
                found.add("uncond_first" if first else "cond_first")
    return _only(found, "cond_first")


def two_calls(first: Sequence[Any], second: Sequence[Any], inputs: DenoiserInputs) -> bool:
    """Whether the second call of a generation belongs to the step of the first: the same latents at the same time."""
    if inputs.latents is None or inputs.timestep is None or inputs.time(first) != inputs.time(second):
        return False
    return torch.equal(first[inputs.latents], second[inputs.latents])


def call_order(first: Sequence[Any], second: Sequence[Any]) -> CFGOrder:
    """The order of a step's two calls.

    Raises:
        CalibrationError: their inputs do not tell.
    """
    found: set[CFGOrder] = set()
    for value, other in zip(first, second, strict=True):
        if isinstance(value, Tensor) and isinstance(other, Tensor) and value is not other and value.ndim:
            alike = _alike(value), _alike(other)
            if alike[0] != alike[1]:
                found.add("uncond_call_first" if alike[0] else "cond_call_first")
    return _only(found, "cond_call_first")


def _only(found: set[CFGOrder], example: str) -> CFGOrder:
    if len(found) == 1:
        return found.pop()
    raise CalibrationError(
        "which half of guidance is the conditional one cannot be told from the inputs",
        where="calibrate",
        got="halves that differ in contradictory ways" if found else "halves of which neither is the same throughout",
        allowed=f"'{example}', 'un{example}', or None to leave the +cfg methods out",
        todo="pass cfg=, or calibrate with two or more different samples",
    )


def _alike(rows: Tensor) -> bool:
    """Whether all rows are equal."""
    return bool((rows == rows[:1]).all())
