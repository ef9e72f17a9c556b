"""The two halves of classifier-free guidance in a batch: a method that shares one needs the same latents in both."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from difa_fx.errors import CFGError
from difa_fx.schedule import Schedule, SiteStep
from difa_fx.sessions import Session


def shares(row: Sequence[SiteStep]) -> bool:
    """Whether a site computes one half of the batch for both."""
    return any(entry.runs and entry.action.method.shares_cfg for entry in row)


def check_halves(session: Session, schedule: Schedule, samples: Sequence[Tensor]) -> None:
    """A CFG batch holds the same latents twice; anything else must not share a half.

    They are compared at the first call, so that a fault is told early, and wherever a half is shared.  On CUDA the
    answer is read when the next call's timestep is there, or at the last call, so that the device need not be waited
    for.

    Args:
        session: of the generation; its clock has counted the call.
        schedule: what the generation runs.
        samples: the noisy samples of the call, each [B, ...].

    Raises:
        CFGError: the halves differ, here or on CUDA in the call before.
    """
    before, session.unequal = session.unequal, None
    if before is not None and bool(before):
        raise _unequal_halves()
    call = session.clock.position
    rows = schedule.rows if call == 0 else schedule.rows[call : call + 1]
    if schedule.calls_per_step != 1 or not any(map(shares, rows)):
        return
    for sample in samples:
        first, second = sample.chunk(2)
        if first.is_cuda:
            unequal = (first != second).any()
            session.unequal = unequal if session.unequal is None else session.unequal | unequal
        elif not torch.equal(first, second):
            raise _unequal_halves(sample.shape[0])
    last = session.clock.position == session.clock.count - 1
    if last and session.unequal is not None and bool(session.unequal):
        raise _unequal_halves()


def _unequal_halves(batch: int | None = None) -> CFGError:
    return CFGError(
        "the plan shares the conditional half of the batch, but the two halves hold different latents",
        where="a step with a '+cfg' method",
        got=f"a batch {f'of {batch} ' if batch else ''}that is not the same latents twice",
        allowed="latents repeated for the conditional and the unconditional half",
        todo="turn classifier-free guidance on, or use a plan without '+cfg' methods",
    )
