"""What a calibration was asked for, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from difa_fx.errors import CalibrationError
from difa_fx.greedy import CANDIDATES
from difa_fx.plan import CFGOrder, Method
from difa_fx.plan_words import Window


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """Everything that the result of a calibration depends on but the denoiser and the samples."""

    steps: int
    threshold: float | None
    target_speedup: float | None
    target_flops: float | None
    window: Window
    candidates: tuple[Method, ...]
    loss: str
    cfg: str | None
    seed: int
    compiler: str
    window_kernel: str
    inductor: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        given = [self.threshold, self.target_speedup, self.target_flops]
        if sum(value is not None for value in given) != 1:
            raise wrong("one goal is needed", "goal", given, "one of threshold, target_speedup and target_flops")
        limits = {"threshold": (0.0, 10.0), "target_speedup": (1.0, 100.0), "target_flops": (0.0, 1.0)}
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if value is not None and not (number and low <= value <= high):
                raise wrong("a goal is out of range", name, value, f"a number from {low:g} to {high:g}")
        given_cfg: object = self.cfg
        if given_cfg is not None and not (isinstance(given_cfg, str) and given_cfg in ("auto", *get_args(CFGOrder))):
            orders = ", ".join(map(repr, get_args(CFGOrder)))
            raise wrong("the order of the CFG halves is unknown", "cfg", self.cfg, f"'auto', {orders} or None")
        if Method.FULL in self.candidates:
            raise wrong("'full' is no candidate: it is what is left", "candidates", self.candidates, CANDIDATES)

    @property
    def search(self) -> str:
        """``greedy`` or ``budget``."""
        return "budget" if self.threshold is None else "greedy"


def wrong(what: str, where: str, got: object, allowed: object) -> CalibrationError:
    """The error for an argument of ``calibrate``."""
    return CalibrationError(what, where=f"calibrate({where}=...)", got=got, allowed=allowed, todo="mend the argument")


def given(**values: Any) -> dict[str, Any]:
    """Those that are not None."""
    return {name: value for name, value in values.items() if value is not None}
