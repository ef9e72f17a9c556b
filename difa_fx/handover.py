"""State that goes from one runner to another in the middle of a generation.

The next call may come with other strides, so that another graph runs it, or with the conditional half of the batch
alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from difa_fx.attention import cfg_half
from difa_fx.cfg_halves import shares
from difa_fx.clock import Clock
from difa_fx.compile import PieceCompiler
from difa_fx.cost import SiteShape
from difa_fx.passes.rewrite import residual_axis
from difa_fx.passes.sites import AttentionSite
from difa_fx.program import StateKey, output_number
from difa_fx.runner_context import Company
from difa_fx.schedule import Schedule

Kinds = Mapping[str, list[tuple[torch.dtype, torch.device]]]


class Holder(Protocol):
    """A runner, as far as its state can be handed over.

    Attributes:
        schedule: what its sites do.
        kinds: of each site dtype and device of each output, and of the residual.
        shapes: of each site its sizes.
        sites_by_path: its sites.
        compiler: of its pieces.
        company: of the runners of its compilation.
    """

    schedule: Schedule
    compiler: PieceCompiler
    company: Company

    @property
    def kinds(self) -> Kinds: ...  # noqa: D102

    @property
    def shapes(self) -> Mapping[str, SiteShape]: ...  # noqa: D102

    @property
    def sites_by_path(self) -> Mapping[str, AttentionSite]: ...  # noqa: D102

    def part(self, first: int) -> tuple[Schedule, Sequence[Any]]:
        """What a generation runs that begins at the plan's step ``first``."""
        ...


def kinds_of(site: AttentionSite) -> list[tuple[torch.dtype, torch.device]]:
    """Dtype and device of each output, and of the residual."""
    values = [node.meta["val"] for node in (*site.outputs, site.call.q)]
    return [(value.dtype, value.device) for value in values]


def fit_from(mine: Holder, other: Holder, clock: Clock) -> Callable[[StateKey, Tensor], Tensor] | None:
    """How a tensor of another runner's state before ``clock``'s call becomes one of this runner's, if it can."""
    if other.kinds != mine.kinds:
        return None
    if other.shapes == mine.shapes and other.schedule == mine.schedule:
        return lambda _, value: value
    doubled = {path: replace(shape, **_twice(shape)) for path, shape in mine.shapes.items()}
    if other.shapes != doubled or any(map(shares, mine.schedule.rows)) or not mine.company.guided:
        return None
    schedule, _ = other.part(clock.first)
    row, second = schedule.row(clock.position - 1), mine.compiler.settings.second

    def conditional(key: StateKey, value: Tensor) -> Tensor:
        site, entry, residual = other.sites_by_path[key[0]], row[key[0]], key[1].startswith("residual")
        if entry.residual_half if residual else entry.output_half:
            return value
        axis = residual_axis(site) if residual else site.output_axes[output_number(key)]
        return cfg_half(value, axis=axis, second=second).contiguous()

    return conditional


def _twice(shape: SiteShape) -> dict[str, int]:
    """The sizes of a site at twice the batch."""
    sizes = ("batch", "projection_flops", "output_numel", "residual_numel")
    return {name: 2 * getattr(shape, name) for name in sizes}
