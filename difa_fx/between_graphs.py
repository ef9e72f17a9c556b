"""What the graphs of a broken denoiser hand to one another: does it come from the latents, and which tokens are text?

Dynamo compiles each graph by itself.  What a graph made for the next one is known by the tensor's identity, when the
next one is compiled.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from difa_fx._torch import WeakIdKeyDictionary
from difa_fx.passes.sites import Origin


class BetweenGraphs:
    """Remembers what is known of tensors that graphs made, as long as these are alive."""

    def __init__(self) -> None:
        self._known = WeakIdKeyDictionary()

    def note(self, outputs: Iterable[Any], origins: Iterable[Origin]) -> None:
        """A graph made ``outputs``."""
        for value, origin in zip(outputs, origins, strict=False):
            if isinstance(value, Tensor):
                self._known[value] = origin

    def of(self, inputs: Sequence[Any], *, after: int) -> dict[int, Origin]:
        """What is known of a graph's inputs, by position among its placeholders; they come ``after`` so many others."""
        return {
            after + position: self._known[value]
            for position, value in enumerate(inputs)
            if isinstance(value, Tensor) and value in self._known
        }
