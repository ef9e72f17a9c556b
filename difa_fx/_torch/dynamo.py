"""What Dynamo says of its graphs and their inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx
from torch import Tensor
from torch._guards import tracing
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def apart_from_dynamo() -> contextlib.AbstractContextManager[object]:
    """Within, compilations do not see Dynamo's own tracing context and its fake tensors.  Wraps ``tracing``."""
    return tracing(None)


def input_sources(gm: torch.fx.GraphModule) -> list[str]:
    """Where Dynamo read each placeholder from, for instance ``L['timestep']``, in order.

    Reads ``_dynamo_source``, which Dynamo sets on placeholders; falls back to the placeholder's name.
    """
    names = []
    for node in gm.graph.find_nodes(op="placeholder"):
        source = getattr(node, "_dynamo_source", None)
        name = getattr(source, "name", None)
        name = name() if callable(name) else name
        names.append(name if isinstance(name, str) else node.name)
    return names


def breaks_graph(gm: torch.fx.GraphModule) -> bool:
    """Whether Dynamo had to end this graph before the end of what it compiles, so that more graphs follow."""
    return graph_break(gm) is not None


def graph_break(gm: torch.fx.GraphModule) -> Any:
    """Why Dynamo had to end this graph, with ``reason`` and ``user_stack``; None where nothing follows it.

    Reads ``compile_subgraph_reason``, which Dynamo sets on every graph that it hands to a backend.
    """
    reason = getattr(gm, "compile_subgraph_reason", None)
    return reason if getattr(reason, "graph_break", False) else None


def is_static_input(value: object) -> bool:
    """Whether Dynamo lifted ``value`` from a module: a parameter or a registered buffer.

    Reads ``_dynamo_static_input_type``, which Dynamo sets on module buffers.
    """
    return isinstance(value, torch.nn.Parameter) or (
        isinstance(value, Tensor) and getattr(value, "_dynamo_static_input_type", None) is not None
    )


def is_wrapped(value: object) -> bool:
    """Whether ``value`` is a tensor that stands for others: a DTensor, or torchao's quantized weights.

    Wraps ``is_traceable_wrapper_subclass``.
    """
    return is_traceable_wrapper_subclass(value)


def compile_limits() -> tuple[int, bool]:
    """How often Dynamo compiles one function anew, and whether it hides its errors.  Reads ``torch._dynamo.config``."""
    from torch._dynamo import config

    return int(config.recompile_limit), bool(config.suppress_errors)


def compile_aot_eager(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """``gm`` as ``backend="aot_eager"`` runs it.  Wraps ``lookup_backend``."""
    from torch._dynamo.backends.registry import lookup_backend

    return lookup_backend("aot_eager")(gm, list(inputs))
