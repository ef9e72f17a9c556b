"""Every private torch API that difa_fx uses, in one place.

Each function names the API it wraps.  Nothing outside this package may import from a torch module whose name starts
with an underscore.
"""

from __future__ import annotations

from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from difa_fx._torch.cpu import build_cpp, cpu_codegen
from difa_fx._torch.cuda import copy_all, own_cublas_workspace, same_addresses
from difa_fx._torch.dynamo import (
    apart_from_dynamo,
    breaks_graph,
    compile_aot_eager,
    compile_limits,
    graph_break,
    input_sources,
    is_static_input,
    is_wrapped,
)
from difa_fx._torch.eager import noted_operators
from difa_fx._torch.flex import flex_band, flex_with_lse
from difa_fx._torch.inductor import (
    CUDA_GRAPHS,
    BoxedPiece,
    begin_lowering,
    cache_folder,
    compile_inductor,
    deferred_kernels,
    inductor_mode,
    inductor_option_names,
    uses_cuda_graphs,
)
from difa_fx._torch.tracing import (
    export_functional,
    fake_inputs,
    fake_like,
    has_autocast_kernel,
    is_composite,
    memory_of,
    mode_of,
    new_fake_mode,
    propagate,
    trace_aten,
    trace_functional,
)

TRIED_ON = ("2.11", "2.13")
"""The torch minor versions whose private APIs, as used here, were run."""

__all__ = [
    "CUDA_GRAPHS",
    "TRIED_ON",
    "BoxedPiece",
    "FakeTensor",
    "FakeTensorMode",
    "TorchDispatchMode",
    "WeakIdKeyDictionary",
    "apart_from_dynamo",
    "begin_lowering",
    "breaks_graph",
    "build_cpp",
    "cache_folder",
    "compile_aot_eager",
    "compile_inductor",
    "compile_limits",
    "copy_all",
    "cpu_codegen",
    "deferred_kernels",
    "export_functional",
    "fake_inputs",
    "fake_like",
    "flex_band",
    "flex_with_lse",
    "graph_break",
    "has_autocast_kernel",
    "inductor_mode",
    "inductor_option_names",
    "input_sources",
    "is_composite",
    "is_static_input",
    "is_wrapped",
    "memory_of",
    "mode_of",
    "new_fake_mode",
    "noted_operators",
    "own_cublas_workspace",
    "propagate",
    "same_addresses",
    "trace_aten",
    "trace_functional",
    "uses_cuda_graphs",
]
