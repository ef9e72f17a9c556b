"""What CUDA graphs need beside the public API."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


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
