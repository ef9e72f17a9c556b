"""The outer boundary: what our stages do not foresee is a GraphError that tells its cause, and never a bare one."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import fx, nn

from difa_fx._torch import input_sources, is_wrapped
from difa_fx.errors import DifaError, GraphError


@contextlib.contextmanager
def unforeseen_is_typed(where: str) -> Iterator[None]:
    """Within, any error but our own, and those of a machine that is out of memory, becomes a GraphError.

    Raises:
        GraphError: something in the graph was not foreseen; the error that it led to is its cause.
    """
    try:
        yield
    except (DifaError, MemoryError):
        raise
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":
            raise
        first = str(error).splitlines()
        raise GraphError(
            "the graph holds something that difa_fx did not foresee",
            where=where,
            got=f"{type(error).__name__}: {first[0] if first else ''}",
            allowed="a denoiser that torch.compile(backend='aot_eager') takes; most others should work, too",
            todo="compile without a plan to go on, and report this with the denoiser's class and versions",
        ) from error


def refuse_wrapped(gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
    """Raise GraphError on weights that stand for other tensors: what a rewrite would make of them is not known."""
    _refuse_wrapped(zip(input_sources(gm), inputs, strict=True))


def refuse_wrapped_weights(denoiser: nn.Module) -> None:
    """The same for a denoiser that no graph was made of yet."""
    _refuse_wrapped(itertools.chain(denoiser.named_parameters(), denoiser.named_buffers()))


def _refuse_wrapped(named: Iterable[tuple[str, Any]]) -> None:
    wrapped = {name: value for name, value in named if is_wrapped(value)}
    if wrapped:
        name, value = next(iter(wrapped.items()))
        raise GraphError(
            "weights are spread over devices or quantized by a tensor subclass, and a plan cannot rewrite through that",
            where=f"{name} and {len(wrapped) - 1} others",
            got=type(value).__name__,
            allowed="plain tensors; several devices can share the prompts, each with the whole denoiser",
            todo="compile the denoiser without tensor parallel and without quantized weights, or without a plan",
        )


def refuse_collectives(gm: fx.GraphModule) -> None:
    """Raise GraphError on a graph in which devices exchange parts of one sample."""
    for node in gm.graph.nodes:
        name = str(node.target)
        if "c10d" in name or "_functional_collectives" in name or "all_to_all" in name:
            raise GraphError(
                "the denoiser exchanges parts of a sample with other devices, and a plan cannot rewrite through that",
                where=node.name,
                got=name,
                allowed="one whole denoiser on each device",
                todo="give each device the whole denoiser and a share of the prompts, or compile without a plan",
            )
