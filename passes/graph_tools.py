"""Small readings of an FX graph that several passes share; :func:`remove_dead` alone edits one."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

_SEGMENT = re.compile(
    r"""\.__dict__\['_modules'\]\['(?P<dict>[^']+)'\]   # diffusers' ModelMixin
      | \._modules\['(?P<modules>[^']+)'\]
      | \['(?P<item>[^']+)'\]
      | \[(?P<index>\d+)\]
      | \.(?P<attribute>[A-Za-z_0-9]+)""",
    re.VERBOSE,
)
_ROOT = re.compile(r"^(?:L|G)\['[^']*'\]")
_HOOKED = re.compile(r"\.forward(?:\.(?:func|forward|cell_contents)|\.__closure__\[\d+\])*\.__self__")
"""A module found again through the ``forward`` that a hook has put in place of its own."""


def tensor_of(node: fx.Node) -> Tensor | None:
    """The fake tensor a node yields, or None when it yields something else."""
    value = node.meta.get("val")
    return value if isinstance(value, Tensor) else None


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Static shape of a node's tensor.  Raises ValueError when the node yields no tensor."""
    value = tensor_of(node)
    if value is None:
        raise ValueError(f"{node.name} yields no tensor")
    return tuple(int(size) for size in value.shape)


def clean_path(raw: str) -> str:
    """A module path as users write it, from the spelling in ``nn_module_stack``.

    >>> clean_path("L['self'].__dict__['_modules']['transformer_blocks'].0.attn1")
    'transformer_blocks.0.attn1'
    """
    rest = _HOOKED.sub("", _ROOT.sub("", raw))
    parts = [next(part for part in match.groups() if part) for match in _SEGMENT.finditer(rest)]
    return ".".join(part for part in parts if part != "_orig_mod")


def owner_path(source: str) -> str:
    """Path of the module that owns a parameter or buffer, from Dynamo's name of it.

    >>> owner_path("L['self']._modules['attn']._modules['to_q']._parameters['weight']")
    'attn.to_q'
    """
    module, known, _ = source.partition("._parameters[")
    module, known, _ = (module, known, "") if known else source.partition("._buffers[")
    return clean_path(module) if known else clean_path(source).rpartition(".")[0]


def module_path(node: fx.Node) -> str:
    """Path of the innermost module a node was traced in; empty for the root's own forward.

    A module that is called again in the same graph has ``@1``, ``@2`` ... at the end of its path.
    """
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    key, (raw, _) = list(stack.items())[-1]
    _, _, call = str(key).partition("@")
    path = clean_path(raw)
    return f"{path}@{call}" if call else path


def call_of(node: fx.Node, path: str) -> str:
    """Which call of the module at ``path`` a node was traced in: ``1`` for the second; empty for the first."""
    stack = node.meta.get("nn_module_stack") or {}
    return next((str(key).partition("@")[2] for key, (raw, _) in stack.items() if clean_path(raw) == path), "")


def block_of(path: str) -> str:
    """The repeated unit that the attention at ``path`` lies in: up to its last number; empty without one.

    >>> block_of("transformer_blocks.3.attn1")
    'transformer_blocks.3'
    """
    parts = path.partition("@")[0].split(".")
    last = max((i for i, part in enumerate(parts) if part.isdigit()), default=-1)
    return ".".join(parts[: last + 1])


def within(path: str, prefix: str) -> bool:
    """Whether a module path is ``prefix`` or lies below it."""
    path = path.partition("@")[0]
    return not prefix or path == prefix or path.startswith(f"{prefix}.")


def tensor_inputs(node: fx.Node) -> list[fx.Node]:
    """The nodes a node reads, in argument order, without repeats."""
    return list(dict.fromkeys(node.all_input_nodes))


_SHAPED_LIKE = {
    torch.ops.aten.new_zeros.default,
    torch.ops.aten.new_ones.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_full.default,
    torch.ops.aten.zeros_like.default,
    torch.ops.aten.ones_like.default,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.full_like.default,
}
"""Operations that read nothing but the shape of what they are given."""


def descendants(roots: Iterable[fx.Node], *, values: bool = False) -> set[fx.Node]:
    """``roots`` and every node that depends on one of them; with ``values``, on more than its shape."""
    found = set(roots)
    stack = list(found)
    while stack:
        node = stack.pop()
        for user in node.users:
            if user not in found and not (values and _takes_shape_alone(user, node)):
                found.add(user)
                stack.append(user)
    return found


def _takes_shape_alone(user: fx.Node, node: fx.Node) -> bool:
    overwritten = user.target is torch.ops.aten.copy.default and user.args[1] is not node
    return overwritten or user.target in _SHAPED_LIKE or takes_dtype_alone(user, node)


def takes_dtype_alone(user: fx.Node, node: fx.Node) -> bool:
    """Whether ``user`` casts another tensor to the dtype of ``node``, and reads nothing else of it."""
    return user.target is torch.ops.aten.type_as.default and user.args[0] is not node


def ancestors(roots: Iterable[fx.Node]) -> set[fx.Node]:
    """``roots`` and every node that one of them depends on."""
    found = set(roots)
    stack = list(found)
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in found:
                found.add(source)
                stack.append(source)
    return found


def arg(node: fx.Node, name: str, default: Any = None) -> Any:
    """An ATen node's argument by its schema name, wherever it was passed."""
    if name in node.kwargs:
        return node.kwargs[name]
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        for position, argument in enumerate(target._schema.arguments):
            if argument.name == name:
                if position < len(node.args):
                    return node.args[position]
                return argument.default_value if argument.has_default_value() else default
    return default


def axis_order(node: fx.Node) -> list[int]:
    """For each axis of what a permutation or transposition yields, the axis of its input that stands there."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    order = list(range(len(shape_of(source))))
    if node.target is torch.ops.aten.permute.default:
        return [dim % len(order) for dim in arg(node, "dims")]
    names = ("axis0", "axis1") if node.target is torch.ops.aten.swapaxes.default else ("dim0", "dim1")
    one, other = (0, 1) if node.target is torch.ops.aten.t.default else (arg(node, name) for name in names)
    order[one], order[other] = order[other], order[one]
    return order


def is_library_operator(node: fx.Node) -> bool:
    """Whether a node calls an operator that some library has registered with torch."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target.namespace not in ("aten", "prims")


def is_write(node: fx.Node) -> bool:
    """Whether a node of Dynamo's graph is known to write to its input; a trace may find others."""
    method = str(node.target) if node.op == "call_method" else ""
    return node.target in _IN_PLACE or (method.endswith("_") and not method.endswith("__"))


_IN_PLACE = {operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ipow}


def placeholders(graph: fx.Graph) -> list[fx.Node]:
    """The placeholders of a graph in order."""
    return list(graph.find_nodes(op="placeholder"))


def calls(graph: fx.Graph) -> Iterator[fx.Node]:
    """The nodes of a graph that compute something, in order."""
    return (node for node in graph.nodes if node.op in ("call_function", "get_attr"))


def output_values(graph: fx.Graph) -> tuple[Any, ...]:
    """What the graph returns, as a flat tuple."""
    (value,) = graph.output_node().args
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def evaluate(node: fx.Node) -> None:
    """Set ``meta["val"]`` of a new node by running it on its inputs' fake tensors."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    assert callable(node.target)
    with torch.no_grad():
        node.meta["val"] = node.target(*args, **kwargs)


def crossing_value(node: fx.Node) -> Any:
    """The fake of a value that is handed from one segment to another: contiguous, so that equal layers are equal.

    A tensor that is expanded (some stride is 0) keeps its layout: to fill it would cost memory.
    """
    value = node.meta.get("val")
    expanded = isinstance(value, Tensor) and any(
        stride == 0 and size > 1 for stride, size in zip(value.stride(), value.shape, strict=True)
    )
    if not isinstance(value, Tensor) or node.op == "placeholder" or expanded:
        return value
    return value.contiguous()


def spelled(node: fx.Node, name: Callable[[fx.Node], object]) -> str:
    """The arguments of a node, with their types; ``name``: what stands for a node."""

    def spell(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return f"%{name(value)}"
        if isinstance(value, (list, tuple)):
            return [spell(item) for item in value]
        if isinstance(value, Mapping):
            return [(key, spell(value[key])) for key in sorted(value)]
        return f"{type(value).__name__}:{value}"

    return repr((spell(node.args), spell(node.kwargs)))


def described(value: Any) -> str:
    """Shape, strides, dtype and device of a tensor; type and value of anything else."""
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {value.stride()} {value.dtype} {value.device}"
    return f"{type(value).__name__}:{value}"


def traced_from(node: fx.Node) -> dict[str, Any]:
    """What a node that is made for ``node`` keeps of its ``meta``: where in the denoiser's code it stands."""
    return {name: node.meta[name] for name in ("nn_module_stack", "stack_trace") if name in node.meta}


def takes_tensors(inputs: Iterable[Any]) -> bool:
    """Whether a graph with these inputs has a tensor among them; a table of constants has none."""
    return any(isinstance(value, Tensor) for value in inputs)


def remove_dead(graph: fx.Graph) -> None:
    """Drop every node that no output needs.

    torch counts attention among the impure operations, for its dropout, and would keep it; a canonical graph is
    functional, so nothing in it runs for its effect.
    """
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
