"""Two calls of the denoiser as one step: both are known when the first comes.

A sampler that calls the denoiser once for each half of guidance shows it the same latents and timestep twice, each time
with conditions that stay what they are throughout.  So after the first step the second call's inputs can be told
from the first's, a step can be tried as a whole, and the second call is answered from what was computed at the first,
once its inputs proved to be those that were foretold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from difa_fx.errors import CalibrationError

Args = Sequence[Any]
"""A graph's inputs at one call."""


@dataclass(slots=True)
class TwoCalls:
    """Answers a denoiser's calls, two a step.

    Attributes:
        own: what the second call has for itself, by position; None until it was seen.
    """

    own: dict[int, Any] | None = None
    _first: Args = ()
    _foretold: Args = ()
    _answer: tuple[Any, ...] = field(default=())

    def first(
        self, args: Args, alone: Callable[[Args], tuple[Any, ...]], both: Callable[[Sequence[Args]], Sequence[Any]]
    ) -> tuple[Any, ...]:
        """The graph's outputs for a step's first call: of ``both`` calls together, or of this one ``alone``."""
        self._first, self._foretold = args, ()
        if self.own is None:
            return alone(args)
        self._foretold = [self.own.get(position, value) for position, value in enumerate(args)]
        outputs, self._answer = both((args, self._foretold))
        return tuple(outputs)

    def second(self, args: Args, both: Callable[[Sequence[Args]], Sequence[Any]]) -> tuple[Any, ...]:
        """The graph's outputs for a step's second call.

        Raises:
            CalibrationError: its inputs are not what the steps before foretold.
        """
        if self.own is None:
            pairs = enumerate(zip(self._first, args, strict=True))
            self.own = {position: value for position, (other, value) in pairs if not same(other, value)}
            _, self._answer = both((self._first, args))
        elif not all(same(a, b) for a, b in zip(self._foretold, args, strict=True)):
            raise CalibrationError(
                "the second call of a step has other inputs than it had at the first step",
                where="calibrate",
                allowed="two calls a step with the same latents and timestep, each with conditions that stay the same",
                todo="use a sampler that batches the two halves of guidance, or make the plan by hand",
            )
        answer, self._answer, self._foretold = self._answer, (), ()
        return answer


def same(a: object, b: object) -> bool:
    """Whether two inputs are equal."""
    if a is b:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and bool(a == b)
