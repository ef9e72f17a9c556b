"""inline: the body of an operator that does nothing but call it takes the operator's place.

``torch.utils.checkpoint`` and the like reach a backend as higher-order operators with a graph for a body.  Without
gradients they are their body::

    y = tag_activation_checkpoint(body, x)        becomes        y = body(x)
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

_CALLS_ITS_BODY = ("tag_activation_checkpoint", "wrap", "wrap_activation_checkpoint", "invoke_subgraph")
"""Names of such operators: the body first, then its inputs; what ``invoke_subgraph`` has between is a name."""


def inline_bodies(gm: fx.GraphModule) -> fx.GraphModule:
    """``gm``, or a copy of it in which bodies stand where operators called them."""
    if not any(_body(gm, node) is not None for node in gm.graph.nodes):
        return gm
    graph = fx.Graph()
    graph.output(_copied(gm, graph, {}))
    made = fx.GraphModule(gm, graph)
    made.meta.update(gm.meta)
    return made


def _copied(gm: fx.GraphModule, graph: fx.Graph, values: dict[fx.Node, Any]) -> Any:
    """Append ``gm``'s nodes to ``graph``; gives what it yields.

    Args:
        gm: a graph, or a body.
        graph: where it goes.
        values: of a body's placeholders, and by and by of its nodes.
    """
    for node in gm.graph.nodes:
        body = _body(gm, node)
        if node.op == "output":
            return fx.node.map_arg(node.args[0], values.__getitem__)
        if node in values or _is_body(gm, node):
            continue
        if body is not None:
            inputs = fx.node.map_arg(tuple(_inputs(node)), values.__getitem__)
            given = dict(zip(body.graph.find_nodes(op="placeholder"), inputs, strict=True))
            values[node] = _copied(body, graph, given)
        elif node.target is operator.getitem and isinstance(values[node.args[0]], (tuple, list)):
            values[node] = values[node.args[0]][node.args[1]]
        else:
            values[node] = graph.node_copy(node, values.__getitem__)
    raise AssertionError("a graph without an output")


def _is_body(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether ``node`` is a body that is called and nothing else."""
    return node.op == "get_attr" and bool(node.users) and all(_body(gm, user) is not None for user in node.users)


def _body(gm: fx.GraphModule, node: fx.Node) -> fx.GraphModule | None:
    """The graph that ``node`` calls, if that is all that it does."""
    if not isinstance(node.target, torch._ops.HigherOrderOperator) or node.target.__name__ not in _CALLS_ITS_BODY:
        return None
    first = node.args[0] if node.args else None
    if not isinstance(first, fx.Node) or first.op != "get_attr":
        return None
    body = _attribute(gm, str(first.target))
    own_state = isinstance(body, fx.GraphModule) and any(n.op == "get_attr" for n in body.graph.nodes)
    return body if isinstance(body, fx.GraphModule) and not own_state else None


def _inputs(node: fx.Node) -> list[Any]:
    """What an operator gives to its body."""
    rest = list(node.args[1:])
    return [value for value in rest if not isinstance(value, str)]


def _attribute(gm: fx.GraphModule, path: str) -> Any:
    value: Any = gm
    for name in path.split("."):
        value = getattr(value, name, None)
    return value
