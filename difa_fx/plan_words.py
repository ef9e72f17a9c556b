"""The words of a plan: methods, windows, and the order of guidance; :mod:`difa_fx.plan_rules` checks them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal, TypeAlias

CFGOrder: TypeAlias = Literal["cond_first", "uncond_first", "cond_call_first", "uncond_call_first"]
#: Where the conditional half of classifier-free guidance is: in a batch of two halves the first or the second; or,
#: in a sampler that calls the denoiser twice a step, the first or the second call.


@dataclass(frozen=True, slots=True)
class GridWindow:
    """A window over a grid of tokens: those at most ``size[i]`` away along every axis ``i``.

    Attributes:
        grid: rows and columns of the (image) tokens, or frames, rows and columns, in the order in which they are
            flattened.
        size: how far it reaches along each axis, to either side.
    """

    grid: tuple[int, ...]
    size: tuple[int, ...]

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.size))} of {'x'.join(map(str, self.grid))}"


#: Tokens to either side of a query, or a window over a grid.  Made by :func:`difa_fx.plan_rules.as_window` alone.
Window: TypeAlias = int | GridWindow


class Method(str, Enum):
    """What a site does at a step (in the paper: full, WA-RS, AST, ASC, WA-RS+ASC)."""

    FULL = "full"
    WINDOW = "window"
    CACHED = "cached"
    FULL_CFG = "full+cfg"
    WINDOW_CFG = "window+cfg"

    def __str__(self) -> str:
        return self.value

    @property
    def shares_cfg(self) -> bool:
        """Whether the conditional half of the batch is computed and used for both halves."""
        return self in (Method.FULL_CFG, Method.WINDOW_CFG)

    @property
    def alone(self) -> Method:
        """The same for one half by itself."""
        return {Method.FULL_CFG: Method.FULL, Method.WINDOW_CFG: Method.WINDOW}.get(self, self)

    @property
    def computes(self) -> bool:
        """Whether anything is computed, so that there is a new output to keep."""
        return self is not Method.CACHED

    @property
    def windowed(self) -> bool:
        """Whether attention is cut to the window and the kept residual is added."""
        return self in (Method.WINDOW, Method.WINDOW_CFG)

    @property
    def refreshes(self) -> bool:
        """Whether attention is computed in full, so that a new residual can be kept."""
        return self in (Method.FULL, Method.FULL_CFG)


def window_json(window: Window) -> Any:
    """A window as a plan's file has it."""
    return window if isinstance(window, int) else {"grid": list(window.grid), "size": list(window.size)}


def calls_per_step(cfg: CFGOrder | None) -> int:
    """How often a step calls the denoiser: twice where the halves of guidance are calls of their own."""
    return 2 if cfg is not None and cfg.endswith("call_first") else 1


def window_follows(methods: Sequence[Method], step: int) -> bool:
    """Whether, at one site, a window step reads a residual after ``step`` and before the next refresh."""
    for method in methods[step + 1 :]:
        if method.refreshes:
            return False
        if method.windowed:
            return True
    return False
