"""A plan that runs elsewhere than it was calibrated is told, once.

What a calibration found holds at its resolution, under its scheduler and, as far as speed goes, on its device.  A plan
may well do elsewhere, so this is a warning.  Provenance is free-form JSON: what is missing there, or of another form,
is not compared.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from difa_fx.plan import Plan

_CLOSE: Final = 0.02
"""Timesteps that differ by less, as a share of the largest, are rounded by a dtype, and not another schedule."""


class PlanWarning(UserWarning):
    """A plan runs elsewhere than it was calibrated."""


def calibrated_at(plan: Plan) -> Mapping[str, Any]:
    """What a plan says about its calibration, or about that of the plan it was derived from."""
    for name in ("calibration", "calibration of the original"):
        found = plan.provenance.get(name)
        if isinstance(found, Mapping):
            return found
    return {}


def other_tokens(plan: Plan, tokens: Mapping[str, int]) -> str | None:
    """How the sites' tokens differ from those of the calibration."""
    known = calibrated_at(plan).get("tokens")
    if not isinstance(known, Mapping):
        return None
    apart = [path for path, count in tokens.items() if isinstance(known.get(path), int) and known[path] != count]
    if not apart:
        return None
    largest = max(apart, key=lambda path: tokens[path])
    return f"{largest} has {tokens[largest]} tokens here, and had {known[largest]} there"


def other_device(plan: Plan, device: Mapping[str, Any]) -> str | None:
    """How the device differs from that of the calibration; of one kind, if the plan was chosen for its speed."""
    found = calibrated_at(plan)
    known = found.get("device")
    if not isinstance(known, Mapping):
        return None
    for name in ("type", *(("name", "threads") if "target_speedup" in found else ())):
        if name in known and known[name] != device.get(name):
            return f"it runs on {_device_line(device)}, and ran on {_device_line(known)} there"
    return None


def other_scheduler(plan: Plan, name: str) -> str | None:
    """How the scheduler's class differs from that of the calibration."""
    known = calibrated_at(plan).get("scheduler")
    return None if not isinstance(known, str) or known == name else f"the scheduler is {name} here, and was {known}"


def other_timesteps(plan: Plan, timesteps: Sequence[float]) -> str | None:
    """How a generation's timesteps differ from the plan's."""
    known = plan.timesteps
    if known is None or len(known) != len(timesteps):
        return None
    largest = max(map(abs, (*known, *timesteps)), default=0.0)
    for step, (mine, theirs) in enumerate(zip(timesteps, known, strict=True)):
        if abs(mine - theirs) > _CLOSE * largest:
            return f"step {step} has timestep {mine:g} here, and {theirs:g} in the plan"
    return None


def tell(plan: Plan, differences: Iterable[str | None], *, stacklevel: int = 3) -> None:
    """Warn of what differs."""
    found = [text for text in differences if text is not None]
    if found:
        warnings.warn(
            f"the plan for {plan.denoiser or 'a denoiser'} runs elsewhere than it was calibrated: {'; '.join(found)}. "
            "What it keeps of quality and gains in speed may be less; calibrate again to be sure",
            PlanWarning,
            stacklevel=stacklevel + 1,
        )


def _device_line(device: Mapping[str, Any]) -> str:
    threads = f", {device['threads']} threads" if "threads" in device else ""
    return f"{device.get('name', device.get('type'))}{threads}"
