"""The processes of ``torchrun``, as far as evaluation needs them: who is who, and waiting for all."""

from __future__ import annotations

import torch.distributed as dist

from difa_fx.workers import Workers


def workers_here() -> Workers:
    """The processes of the current group, or this one alone."""
    if not (dist.is_available() and dist.is_initialized()):
        return Workers()
    return Workers(dist.get_rank(), dist.get_world_size())


def wait_for_all(workers: Workers) -> None:
    """Return when every process got here."""
    if workers.size > 1:
        dist.barrier()
