"""Inductor: a graph compiled, pieces lowered, its settings and its cache."""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.fx
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import TracingContext, tracing
from torch._inductor import config as inductor_config
from torch._inductor import list_mode_options, list_options
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.compile_fx import compile_fx, compile_fx_forward, create_compiler_config_extra
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from difa_fx._torch.cpu import cpu_codegen
from difa_fx._torch.tracing import mode_of, writes


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
    mode = mode_of(inputs)
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
        if any(writes(node) for node in traced.graph.nodes):
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

    Inductor waits for a graph's kernels as soon as its module is loaded.  Here that wait is put off, in this thread
    alone: pieces that share two cores take turns at Python and at the C++ compiler.  Not for CUDA: Triton's kernels are
    built by a pool of processes, and of one that two graphs share the result can be fetched once.  Wraps
    ``AsyncCompile.wait`` as long as any thread is within.
    """
    before, _own.waiting = getattr(_own, "waiting", None), []
    with _deferring.lock:
        if not _deferring.threads:
            _deferring.wait = AsyncCompile.wait
            AsyncCompile.wait = _wait_or_defer  # type: ignore[method-assign]
        _deferring.threads += 1
    try:
        yield
    finally:
        waiting, _own.waiting = _own.waiting, before
        try:
            for compiler, scope in waiting:
                compiler.wait(scope)
        finally:
            with _deferring.lock:
                _deferring.threads -= 1
                if not _deferring.threads and AsyncCompile.wait is _wait_or_defer:
                    AsyncCompile.wait = _deferring.wait  # type: ignore[method-assign]


class _Deferring:
    """How many threads put off waiting, and what waits; to be changed under the lock alone."""

    def __init__(self) -> None:
        self.threads = 0
        self.wait = AsyncCompile.wait
        self.lock = threading.Lock()


_deferring = _Deferring()
_own = threading.local()


def _wait_or_defer(self: AsyncCompile, scope: dict[str, Any]) -> None:
    waiting = getattr(_own, "waiting", None)
    if waiting is None:
        _deferring.wait(self, scope)
    else:
        waiting.append((self, scope))


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


def cache_folder() -> Path:
    """Where Inductor keeps what it compiled.  Wraps ``cache_dir``."""
    return Path(cache_dir())
