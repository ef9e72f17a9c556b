"""canonicalize: one spelling per operation, without a change of a single bit.

Dynamo hands over torch-level IR: functions, methods and in-place writes mixed.  Pre-dispatch ATen spells a
function, its method and its module alike (``x.softmax``, ``F.softmax``, ``nn.Softmax``), keeps linear,
layer norm and scaled_dot_product_attention whole, carries ``nn_module_stack`` along, and is functional: a
``setitem`` is a ``slice_scatter`` whose edge a later pass can follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from difa_fx._torch import export_functional, fake_inputs, is_static_input, new_fake_mode, trace_functional
from difa_fx.errors import GraphError
from difa_fx.passes.autocast import spell_out_autocast, without_autocast
from difa_fx.passes.graph_tools import arg, evaluate, is_write, output_values, placeholders, remove_dead, takes_tensors
from difa_fx.passes.inline import inline_bodies
from difa_fx.passes.retrace import retrace

aten = torch.ops.aten

_ASSERTIONS = {aten._assert_tensor_metadata.default, aten._assert_async.msg}

_VIEWS = {aten.view.default, aten._unsafe_view.default}

_MOVES = {aten.movedim.int, aten.movedim.intlist, aten.moveaxis.int, aten.moveaxis.intlist, aten.swapaxes.default}

_CASTS = {aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other}


@dataclass(frozen=True, slots=True)
class CanonicalGraph:
    """A functional ATen graph of one denoiser at static shapes.

    Attributes:
        gm: the graph; every node's ``meta["val"]`` is a fake tensor.
        sources: Dynamo's name of each placeholder, in order.
        static: for each placeholder, whether it is a parameter or buffer of the denoiser.
        written: positions among Dynamo's inputs of those that the graph writes to.  It yields what to write, in this
            order, before its own outputs: whoever calls it writes.
    """

    gm: fx.GraphModule
    sources: tuple[str, ...]
    static: tuple[bool, ...]
    written: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        count = len(placeholders(self.gm.graph))
        assert count == len(self.sources) == len(self.static), "one source and one flag a placeholder"

    @property
    def parameters(self) -> frozenset[fx.Node]:
        """The placeholders that hold parameters and buffers."""
        nodes = placeholders(self.gm.graph)
        return frozenset(n for n, is_static in zip(nodes, self.static, strict=True) if is_static)


def canonicalize(gm: fx.GraphModule, inputs: Sequence[Any], *, sources: Sequence[str]) -> CanonicalGraph:
    """Dynamo's graph as a :class:`CanonicalGraph`, specialised to the shapes of ``inputs``.

    Args:
        gm: what Dynamo handed over; parameters are placeholders.
        inputs: one value a placeholder: tensors (real or fake) and Python numbers.
        sources: Dynamo's name of each placeholder.

    Raises:
        GraphError: the graph writes to parameters or buffers, which a plan cannot replay, or has sizes that depend
            on values.
    """
    with torch.no_grad():
        fakes = fake_inputs(inputs, new_fake_mode())
    if not takes_tensors(fakes):
        raise GraphError("the graph has no tensor input", where="canonicalize")
    exported, written = _exported(inline_bodies(gm), fakes)
    owned = len(placeholders(exported.graph)) - len(fakes)
    static = [True] * owned + [is_static_input(value) for value in inputs]
    positions = [i for name in written for i, node in enumerate(placeholders(exported.graph)) if node.name == name]
    if len(positions) < len(written) or any(static[position] for position in positions):
        raise GraphError(
            "the denoiser writes to its own parameters or buffers",
            where="canonicalize",
            got=written,
            allowed="a denoiser whose forward only reads",
            todo="put the module in eval mode, or compile it without a plan",
        )
    graph = exported.graph
    _refuse_unknown_sizes(graph)
    spell_out_autocast(graph)
    for node in list(graph.nodes):
        if node.target in _ASSERTIONS:
            graph.erase_node(node)
        elif node.target in _VIEWS:
            # The same on what is here, and still right when a rewrite gives its input another layout.
            node.target = aten.reshape.default
        elif node.target in _MOVES:
            node.target, node.args, node.kwargs = aten.permute.default, (node.args[0], _order(node)), {}
    _fold_noops(graph)
    with without_autocast():
        _unfold_linears(graph)
    remove_dead(graph)
    graph.lint()
    exported.recompile()
    return CanonicalGraph(
        gm=exported,
        sources=(*(f"graph constant {i}" for i in range(owned)), *sources),
        static=tuple(static),
        written=tuple(position - owned for position in positions),
    )


def _order(node: fx.Node) -> list[int]:
    """The permutation that a ``movedim`` is."""
    count = len(node.meta["val"].shape)
    given = [
        arg(node, name) for name in (("axis0", "axis1") if "swap" in str(node.target) else ("source", "destination"))
    ]
    sources, targets = ([d % count for d in (v if isinstance(v, (list, tuple)) else [v])] for v in given)
    if node.target is aten.swapaxes.default:
        sources, targets = [*sources, *targets], [*targets, *sources]
    order = dict(zip(targets, sources, strict=True))
    rest = iter(d for d in range(count) if d not in sources)
    return [order[place] if place in order else next(rest) for place in range(count)]


def _exported(gm: fx.GraphModule, fakes: Sequence[Any]) -> tuple[fx.GraphModule, list[str]]:
    """Functional ATen graph of ``gm`` and the inputs that it writes to, the cheapest way there is."""
    traced = retrace(gm, fakes)
    if traced is None and not any(is_write(node) for node in gm.graph.nodes):
        traced = trace_functional(gm, fakes)
    return export_functional(gm, fakes) if traced is None else (traced, [])


def _refuse_unknown_sizes(graph: fx.Graph) -> None:
    """Raise GraphError where a tensor's size depends on values: a plan is for sizes known before the run."""
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and not all(isinstance(size, int) for size in value.shape):
            raise GraphError(
                "the size of a tensor depends on values, so it is not known before the run",
                where=f"{node.name} ({node.target})",
                got=f"shape {tuple(value.shape)}",
                allowed="sizes that follow from those of the inputs",
                todo="let the denoiser mask tokens instead of dropping them, or give it samples without padding; make "
                "sizes that modules keep as numbers of numpy int(...); "
                "with torch._dynamo.config.capture_dynamic_output_shape_ops and capture_scalar_outputs off, which "
                "they are by default, Dynamo breaks the graph there",
            )


def _fold_noops(graph: fx.Graph) -> None:
    """Drop operations that are the identity bit for bit: dropout off, a division by one, alias."""
    returned = set(output_values(graph))
    for node in list(graph.nodes):
        source = _identity_of(node)
        if source is not None and node not in returned:
            node.replace_all_uses_with(source)
            graph.erase_node(node)


def _unfold_linears(graph: fx.Graph) -> None:
    """Let a linear work on the axes that were merged for it and are parted again behind it.

    ``nn.MultiheadAttention`` merges tokens and batch, tokens first, into which no half of the batch can be followed::

        x_NBE -> reshape [N B, E] -> linear -> reshape [N, B, F]    becomes    x_NBE -> linear -> [N, B, F]
    """
    for linear in list(graph.find_nodes(op="call_function", target=aten.linear.default)):
        merged, users = linear.args[0], list(linear.users)
        if merged.target is not aten.reshape.default or len(users) != 1 or len(merged.users) != 1:
            continue
        (parted,) = users
        if parted.target is not aten.reshape.default or len(parted.meta["val"].shape) < 3:
            continue
        lead = list(parted.meta["val"].shape[:-1])
        same_last = parted.meta["val"].shape[-1] == linear.meta["val"].shape[-1]
        if len(merged.meta["val"].shape) != 2 or not same_last:
            continue
        merged.args = (merged.args[0], [*lead, int(merged.meta["val"].shape[-1])])
        for node in (merged, linear):
            evaluate(node)
        parted.replace_all_uses_with(linear)
        graph.erase_node(parted)


def _identity_of(node: fx.Node) -> fx.Node | None:
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    source, rest = node.args[0], node.args[1:]
    if node.target is aten.dropout.default:
        probability, training = (*rest, True)[:2]
        return source if probability == 0 or not training else None
    if node.target in (aten.div.Tensor, aten.mul.Tensor) and not node.kwargs:
        same = isinstance(rest[0], (int, float)) and rest[0] == 1
        return source if same and _same_kind(source, node) else None
    if node.target is aten.alias.default:
        return source
    if node.target in _CASTS:
        copies = arg(node, "copy") or arg(node, "memory_format") is not None
        return source if not copies and _same_kind(source, node) else None
    return None


def _same_kind(before: fx.Node, after: fx.Node) -> bool:
    old, new = before.meta.get("val"), after.meta.get("val")
    if not isinstance(old, Tensor) or not isinstance(new, Tensor):
        return False
    return old.dtype == new.dtype and old.device == new.device and old.layout == new.layout
