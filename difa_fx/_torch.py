"""Every private torch API that difa_fx uses, in one place.

Each function names the API it wraps and the torch versions it was tried on.  Nothing outside this module
may import from a torch module whose name starts with an underscore.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import inspect
import platform
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.fx
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._functorch.aot_autograd import aot_export_module
from torch._guards import TracingContext, tracing
from torch._higher_order_ops.flex_attention import flex_attention as flex_attention_hop
from torch._inductor import config as inductor_config
from torch._inductor import list_mode_options, list_options
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import CppCodeCache
from torch._inductor.compile_fx import compile_fx, compile_fx_forward, create_compiler_config_extra
from torch._inductor.cpu_vec_isa import pick_vec_isa, supported_vec_isa_list, x86_isa_checker
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.nn.attention.flex_attention import BlockMask, _apply_kernel_options, _identity
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.weak import WeakIdKeyDictionary

TRIED_ON = ("2.11", "2.13")
"""The torch minor versions whose private APIs, as used here, were run."""

__all__ = [
    "CUDA_GRAPHS",
    "TRIED_ON",
    "BoxedPiece",
    "FakeTensor",
    "FakeTensorMode",
    "WeakIdKeyDictionary",
    "apart_from_dynamo",
    "begin_lowering",
    "breaks_graph",
    "build_cpp",
    "cache_folder",
    "compile_inductor",
    "copy_all",
    "cpu_codegen",
    "deferred_kernels",
    "export_aten",
    "fake_inputs",
    "flex_band",
    "flex_with_lse",
    "inductor_mode",
    "inductor_option_names",
    "input_sources",
    "is_static_input",
    "is_wrapped",
    "new_fake_mode",
    "own_cublas_workspace",
    "propagate",
    "same_addresses",
    "trace_aten",
    "uses_cuda_graphs",
]


def new_fake_mode() -> FakeTensorMode:
    """A mode for fake tensors beside real constants.

    It has a shape environment, though all shapes are static: Inductor's cache on disk does not work without one.
    """
    return FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())


def fake_inputs(inputs: Sequence[Any], mode: FakeTensorMode) -> list[Any]:
    """``inputs`` with every tensor replaced by a fake of the same static shape, stride, dtype and device.

    Wraps ``FakeTensorMode.from_tensor``.
    """
    return [mode.from_tensor(value, static_shapes=True) if isinstance(value, Tensor) else value for value in inputs]


def _mode_of(values: Sequence[Any]) -> FakeTensorMode:
    return next(value.fake_mode for value in values if isinstance(value, FakeTensor))


def export_aten(gm: torch.fx.GraphModule, fakes: Sequence[Any]) -> tuple[torch.fx.GraphModule, list[str]]:
    """Functional pre-dispatch ATen graph of ``gm``, and the inputs that it writes to.

    Composites such as linear and scaled_dot_product_attention stay whole.  ``make_fx`` traces once, which is
    enough for most denoisers; one that writes in place is functionalised by ``aot_export_module``, which traces
    twice.  Placeholders are ``gm``'s, after any parameter or buffer that ``gm`` itself owns.
    """
    mode = _mode_of(fakes)
    with torch.no_grad(), torch.fx.traceback.preserve_node_meta(), mode:
        run = torch.fx.Interpreter(gm).run
        traced = make_fx(run, pre_dispatch=True, decomposition_table=_SPELLED_OUT)(*fakes)
        if not any(_writes(node) for node in traced.graph.nodes):
            return traced, []
        exported, signature = aot_export_module(
            gm, list(fakes), trace_joint=False, pre_dispatch=True, decompositions=_SPELLED_OUT
        )
    assert isinstance(exported, torch.fx.GraphModule)
    written = [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]
    return exported, written


def _einsum(equation: str, operands: Sequence[Tensor], *, path: Any = None) -> Any:
    return torch.ops.aten.einsum.default.decompose(equation, operands, path=path)


_SPELLED_OUT = {torch.ops.aten.einsum.default: _einsum}
"""Operations that hide what they do in a string; eager runs just what they are spelled out to."""


def _writes(node: torch.fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def trace_aten(gm: torch.fx.GraphModule, fakes: Sequence[Any]) -> torch.fx.GraphModule:
    """``gm`` with the Python functions in it inlined to pre-dispatch ATen.  Wraps ``make_fx``."""
    mode = _mode_of(fakes)
    with torch.no_grad(), mode:
        return make_fx(gm, pre_dispatch=True)(*fakes)


def propagate(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> tuple[Any, ...]:
    """What ``gm`` yields for fake ``inputs``, as fakes; wraps ``FakeTensorProp``."""
    mode = _mode_of(inputs)
    with torch.no_grad():
        return tuple(FakeTensorProp(gm, mode).propagate_dont_convert_inputs(*inputs))


def compile_inductor(gm: torch.fx.GraphModule, inputs: Sequence[Any], patches: Mapping[str, Any]) -> Callable[..., Any]:
    """``gm`` compiled by AOTAutograd and Inductor.  Wraps ``compile_fx``, which may edit ``gm``."""
    return compile_fx(gm, list(inputs), config_patches=dict(patches))  # type: ignore[return-value]


BoxedPiece = Callable[[list[Any]], Sequence[Any]]
"""A compiled graph that takes its inputs as one list, which it empties."""


def begin_lowering(
    gm: torch.fx.GraphModule, inputs: Sequence[Any], patches: Mapping[str, Any]
) -> Callable[[], BoxedPiece]:
    """Trace ``gm`` to Inductor's own operators; call the result to lower it.

    AOTAutograd would trace the graph twice and wrap the result in layers that check, at every call, for things that
    a functional graph does not have: aliases, mutations, gradients.  Here it is traced once.  Constants of ``gm``
    become inputs, bound to the result, so that Inductor's cache on disk can hold it.  What needs no vector units comes
    first, while they are found out.  Wraps ``compile_fx_forward``.
    """
    mode = _mode_of(inputs)
    with _lowering(mode, patches):
        traced = _decomposed(gm, inputs, mode)
        constants = _lift_constants(traced, mode)

    def lower() -> BoxedPiece:
        if any(isinstance(value, Tensor) and value.device.type == "cpu" for value in inputs):
            cpu_codegen()()
        fakes = [node.meta["val"] for node in traced.graph.find_nodes(op="placeholder")]
        (outputs,) = traced.graph.output_node().args
        assert isinstance(outputs, (tuple, list))
        # 2.13 asks for the graph, 2.11 for the settings.
        by_graph = "gm" in inspect.signature(create_compiler_config_extra).parameters
        about: Any = traced if by_graph else inductor_config
        with _lowering(mode, patches):
            lowered = compile_fx_forward(
                traced,
                fakes,
                num_orig_model_outputs=len(outputs),
                num_example_inputs=len(inputs),
                compiler_config_extra=create_compiler_config_extra(about),
                is_inference=True,
            )
        run: BoxedPiece = lowered.current_callable  # type: ignore[attr-defined]
        return (lambda values: run([*constants, *values])) if constants else run

    return lower


@contextlib.contextmanager
def _lowering(mode: FakeTensorMode, patches: Mapping[str, Any]) -> Iterator[None]:
    """Within, Inductor has these settings and works on the fake tensors of ``mode``."""
    with inductor_config.patch(dict(patches)), torch.no_grad(), tracing(TracingContext(mode)), V.set_fake_mode(mode):
        yield


def _decomposed(gm: torch.fx.GraphModule, inputs: Sequence[Any], mode: FakeTensorMode) -> torch.fx.GraphModule:
    table = select_decomp_table()
    run = torch.fx.Interpreter(gm).run
    with mode, enable_python_dispatcher(), torch.fx.traceback.preserve_node_meta():
        traced = make_fx(run, decomposition_table=table)(*inputs)
        if any(_writes(node) for node in traced.graph.nodes):
            traced = make_fx(torch.func.functionalize(run, remove="mutations"), decomposition_table=table)(*inputs)
    traced.graph.eliminate_dead_code()
    return traced


def _lift_constants(gm: torch.fx.GraphModule, mode: FakeTensorMode) -> list[Tensor]:
    """Turn the tensors that ``gm`` owns into its first inputs; returns them."""
    constants: dict[str, Tensor] = {}
    nodes: dict[str, torch.fx.Node] = {}
    first = next(iter(gm.graph.nodes))
    for node in gm.graph.find_nodes(op="get_attr"):
        value = getattr(gm, str(node.target), None)
        if not isinstance(value, Tensor):
            continue
        name = str(node.target)
        if name not in nodes:
            with gm.graph.inserting_before(first):
                nodes[name] = gm.graph.placeholder(name)
            nodes[name].meta["val"] = mode.from_tensor(value, static_shapes=True)
            constants[name] = value
        node.replace_all_uses_with(nodes[name])
        gm.graph.erase_node(node)
    gm.recompile()
    return list(constants.values())


@contextlib.contextmanager
def deferred_kernels() -> Iterator[None]:
    """Within, kernels are built in the background while the next graph is lowered; at the end all are ready.

    Inductor waits for a graph's kernels as soon as its module is loaded.  Here that wait is put off: pieces that
    share two cores take turns at Python and at the C++ compiler.  Not for CUDA: Triton's kernels are built by a pool of
    processes, and of one that two graphs share the result can be fetched once.  Replaces ``AsyncCompile.wait`` for the
    time.
    """
    waiting: list[tuple[AsyncCompile, dict[str, Any]]] = []
    wait = AsyncCompile.wait
    AsyncCompile.wait = lambda self, scope: waiting.append((self, scope))  # type: ignore[method-assign]
    try:
        yield
    finally:
        AsyncCompile.wait = wait  # type: ignore[method-assign]
        for compiler, scope in waiting:
            wait(compiler, scope)


def apart_from_dynamo() -> contextlib.AbstractContextManager[object]:
    """Within, compilations do not see Dynamo's own tracing context and its fake tensors.  Wraps ``tracing``."""
    return tracing(None)


@functools.cache
def cpu_codegen() -> Callable[[], None]:
    """Begin, in the background, to find out what the CPU's vector units are; call the result to wait for it.

    Inductor runs a compiler to do so, for one unit after the other, and takes a smaller one where two threads try the
    same at once: here all are tried side by side, and all that needs the answer waits.  Wraps ``pick_vec_isa``, which
    remembers it, and the list that it goes through.
    """
    thread = threading.Thread(target=_find_vector_units, name="difa-vec-isa", daemon=True)
    thread.start()
    return thread.join


def _find_vector_units() -> None:
    if platform.machine() in ("x86_64", "AMD64"):
        flags = x86_isa_checker()
        units = [unit for unit in supported_vec_isa_list if all(flag in flags for flag in str(unit).split())]
        with ThreadPoolExecutor(max(1, len(units))) as pool:
            list(pool.map(bool, units))
    pick_vec_isa()


def inductor_mode(mode: str | None) -> dict[str, Any]:
    """Inductor's settings for ``torch.compile(mode=...)``.  Raises RuntimeError on an unknown mode."""
    return dict(list_mode_options(mode)) if mode else {}


def inductor_option_names() -> list[str]:
    """The names Inductor takes in ``options``."""
    return list_options()


def uses_cuda_graphs(patches: Mapping[str, Any]) -> bool:
    """Whether Inductor's settings ask for CUDA graphs.  Reads ``triton.cudagraphs``."""
    return bool(patches.get(CUDA_GRAPHS, inductor_config.triton.cudagraphs))


CUDA_GRAPHS = "triton.cudagraphs"
"""The setting, as Inductor names it."""


@contextlib.contextmanager
def own_cublas_workspace() -> Iterator[None]:
    """Within, what cuBLAS needs as workspace is allocated anew, and given back at the end.

    A CUDA graph that is recorded within owns it then, as all else that it writes to: torch would keep one workspace for
    several graphs, and anyone may have torch give it up.  Wraps ``_cuda_clearCublasWorkspaces``.
    """
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


def copy_all(places: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy each value to its place, at once.  Wraps ``_foreach_copy_``."""
    if places:
        torch._foreach_copy_(list(places), list(values))


def same_addresses(values: Sequence[Any], addresses: Sequence[int | None], positions: Sequence[int]) -> bool:
    """Whether the tensors at ``positions`` lie at their ``addresses``, which has one for each of ``values``.

    Wraps ``_tensors_data_ptrs_at_indices_equal``, which builds of torch without CUDA do not have.
    """
    if _compare_addresses is None:
        return all(values[i].data_ptr() == addresses[i] for i in positions)
    same: bool = _compare_addresses(list(values), addresses, positions)
    return same


_compare_addresses = getattr(torch._C, "_tensors_data_ptrs_at_indices_equal", None)


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
    """Whether Dynamo had to end this graph before the end of what it compiles, so that more graphs follow.

    Reads ``compile_subgraph_reason``, which Dynamo sets on every graph that it hands to a backend.
    """
    return bool(getattr(getattr(gm, "compile_subgraph_reason", None), "graph_break", False))


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


def flex_band(q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask, scale: float | None) -> Tensor:
    """flex_attention as the operator Inductor lowers, without Dynamo.  Tensors are [B, H, N, D]."""
    return _flex(q, k, v, block_mask, scale, lse=False)[0]


def flex_with_lse(q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask, scale: float | None) -> tuple[Tensor, Tensor]:
    """The same with the binary logarithm of each query's sum of exponentials, [B, H, N]; not on CPU.

    A query that sees no key gets zeros, and minus infinity.
    """
    return _flex(q, k, v, block_mask, scale, lse=True)


def _flex(
    q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask, scale: float | None, *, lse: bool
) -> tuple[Tensor, Tensor]:
    """Calls the higher-order operator with the options the public function would give it.

    The public function would start a compilation of its own.
    """
    options = _apply_kernel_options(q, k, v, lse, {})
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if q.device.type == "cpu":
        # The C++ template reads the sizes of q's and k's buffers, so they must be no views of a projection's.
        q, k, scale = q * scale**0.5, k * scale**0.5, 1.0
    out, log_sum, *_ = flex_attention_hop(q, k, v, _identity, block_mask.as_tuple(), scale, dict(options))
    return out, log_sum


def cache_folder() -> Path:
    """Where Inductor keeps what it compiled.  Wraps ``cache_dir``."""
    return Path(cache_dir())


def build_cpp(source: str) -> ctypes.CDLL:
    """C++ ``source`` built for this CPU, with OpenMP and torch's libraries, and loaded; kept in Inductor's cache.

    Raises RuntimeError or OSError where there is no compiler, or the source does not compile.
    Wraps ``CppCodeCache``.
    """
    cpu_codegen()()
    asks = "needs_vec_isa" in inspect.signature(CppCodeCache.load_async).parameters  # 2.13; before, it always has one
    settings: dict[str, Any] = {"needs_vec_isa": True} if asks else {}
    # Inductor writes vector code itself and turns the compiler's own off.
    load = CppCodeCache.load_async(source, extra_flags=["-ftree-loop-vectorize", "-fno-math-errno"], **settings)
    found: ctypes.CDLL = load()
    return found
