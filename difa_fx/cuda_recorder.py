"""Recording: what a CUDA graph is made with, and what owns the memory that it writes to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from difa_fx._torch import own_cublas_workspace
from difa_fx.errors import GraphError

T = TypeVar("T")


class Recorder(Protocol):
    """Makes graphs that share one memory pool."""

    def record(self, run: Callable[[], T]) -> tuple[Callable[[], None], T]:
        """What replays ``run``, and what it gives: tensors whose values are those of the last replay."""
        ...

    def unowned(self, value: Tensor) -> Tensor:
        """The same memory as a tensor that does not keep it from being used for something else."""
        ...


class CudaRecorder:
    """Records with CUDA, in a pool of its own."""

    def __init__(self, device: torch.device) -> None:
        torch.cuda.empty_cache()  # what the warm-up left would lie idle beside the pool
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def record(self, run: Callable[[], T]) -> tuple[Callable[[], None], T]:
        """See :class:`Recorder`.

        Raises:
            GraphError: something in ``run`` cannot be in a CUDA graph.
        """
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self._stream.device)
        try:
            with torch.cuda.stream(self._stream), own_cublas_workspace():
                # Other threads may go on: loading data must not break a recording.
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    made = run()
                finally:
                    graph.capture_end()
        except RuntimeError as error:
            raise GraphError(
                "a call of the denoiser cannot be recorded as a CUDA graph",
                where="options['mode']",
                got=str(error).splitlines()[0],
                todo="leave the mode out, or use max-autotune-no-cudagraphs",
            ) from error
        return graph.replay, made

    def unowned(self, value: Tensor) -> Tensor:
        """See :class:`Recorder`."""
        extent = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
        if not value.numel():
            return value
        flat = torch.as_tensor(_Memory(value.data_ptr(), extent * value.element_size()), device=value.device)
        return flat.view(value.dtype).as_strided(value.shape, value.stride())


class _Memory:
    """Bytes on a CUDA device, as other libraries show theirs."""

    def __init__(self, address: int, count: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (count,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }
