"""What a generation's inputs tell: whether a call belongs to it where timesteps alone do not say.

Throughout a generation most conditions stay the same and the latents change a little from step to step.  Another
generation has other latents, and often other conditions.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

_RELATED: Final = 0.5
"""Cosine of two latents of one generation at least; independent noise has one near 0."""


class Verdict(enum.Enum):
    """What inputs say of a call and a generation."""

    OWN = enum.auto()
    """A condition is the generation's, or there is none, and the latents are related to its last ones."""
    UNRELATED = enum.auto()
    """Conditions do not contradict, but the latents have nothing in common with its last ones."""
    OTHER = enum.auto()
    """There are conditions, and not one is the generation's."""
    UNKNOWN = enum.auto()
    """There is nothing to compare."""


@dataclass(frozen=True, slots=True)
class Seen:
    """The inputs of one call.

    Attributes:
        latents: the noisy sample [B, ...]; None where it is not known.
        conditions: all other tensors but the timestep and the weights, by name.
        branch: which of a step's calls it is; each half of guidance has conditions of its own.
    """

    latents: Tensor | None = None
    conditions: Mapping[str, Tensor] = field(default_factory=dict)
    branch: int = 0


@dataclass(frozen=True, slots=True)
class _Kept:
    """A tensor as it was: itself, while nobody has written to it since."""

    value: Tensor
    version: int

    @classmethod
    def of(cls, value: Tensor) -> _Kept:
        if value.is_inference():
            return cls(value.clone(), -1)
        return cls(value, value._version)

    def now(self) -> Tensor | None:
        """The tensor; None once it was written to."""
        return self.value if self.version < 0 or self.value._version == self.version else None

    def equals(self, value: Tensor) -> bool | None:
        """Whether ``value`` is the same; None where that cannot be said, as of another batch."""
        before = self.now()
        if before is None or before.shape != value.shape or before.device != value.device:
            return None
        return before is value or torch.equal(before, value)


@dataclass(slots=True)
class Witness:
    """The inputs of a generation so far: its last latents, and the conditions of its first step's calls.

    They are kept as they are and compared when there is a doubt, so that a call costs nothing and waits for no device.
    """

    _latents: _Kept | None = None
    _conditions: dict[int, dict[str, _Kept]] = field(default_factory=dict)
    _steady: dict[int, set[str]] = field(default_factory=dict)

    def note(self, seen: Seen) -> None:
        """Remember a call of the generation."""
        self._latents = None if seen.latents is None else _Kept.of(seen.latents)
        kept = self._conditions.get(seen.branch)
        if kept is None:
            self._conditions[seen.branch] = {name: _Kept.of(value) for name, value in seen.conditions.items()}
            return
        same = {name for name, value in seen.conditions.items() if name in kept and kept[name].value is value}
        self._steady[seen.branch] = self._steady.get(seen.branch, same) & same

    def departs(self, seen: Seen) -> bool:
        """Whether a call has none of the conditions that were the same tensors in all calls of the generation so far.

        There are none where a sampler makes its conditions anew at each step, or where each step has its own.
        """
        kept, names = self._conditions.get(seen.branch, {}), self._steady.get(seen.branch, set())
        pairs = [(kept[name], value) for name, value in seen.conditions.items() if name in names]
        return _all_differ(pairs)

    def contradicts(self, seen: Seen) -> bool:
        """Whether a call has none of the generation's conditions."""
        kept = self._conditions.get(seen.branch, {})
        pairs = [(kept[name], value) for name, value in seen.conditions.items() if name in kept]
        return _all_differ(pairs)

    def foreign(self, seen: Seen) -> bool:
        """Whether a call has none of the generation's conditions, and latents that are not like its last."""
        if seen.latents is None or not self.contradicts(seen):
            return False
        before = None if self._latents is None else self._latents.now()
        return before is not None and before.shape == seen.latents.shape and not _related(before, seen.latents)

    def judge(self, seen: Seen) -> Verdict:
        """Whether a call belongs to the generation, as far as its inputs tell."""
        before = None if self._latents is None else self._latents.now()
        if before is None or seen.latents is None or before.shape != seen.latents.shape:
            return Verdict.UNKNOWN
        if self.contradicts(seen):
            return Verdict.OTHER
        return Verdict.OWN if _related(before, seen.latents) else Verdict.UNRELATED


def _all_differ(pairs: list[tuple[_Kept, Tensor]]) -> bool:
    """Whether there are tensors to compare and none is as it was; where one is the same tensor, none is compared."""
    if not pairs or any(before.value is value for before, value in pairs):
        return False
    return all(before.equals(value) is False for before, value in pairs)


def _related(before: Tensor, value: Tensor) -> bool:
    if before.device != value.device:
        return False
    if not value.is_floating_point():  # tokens of a codebook
        return float((before == value).float().mean()) > _RELATED
    first, second = before.flatten().float(), value.flatten().float()
    scale = float(first.norm() * second.norm())
    return torch.equal(first, second) if not scale else float(first @ second) > _RELATED * scale
