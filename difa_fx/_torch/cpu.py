"""The C++ side of Inductor: the CPU's vector units, and C++ of our own."""

from __future__ import annotations

import ctypes
import functools
import inspect
import platform
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch._inductor.codecache import CppCodeCache
from torch._inductor.cpu_vec_isa import pick_vec_isa, supported_vec_isa_list, x86_isa_checker


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


def build_cpp(source: str) -> ctypes.CDLL:
    """C++ ``source`` built for this CPU, with OpenMP and torch's libraries, and loaded; kept in Inductor's cache.

    Raises RuntimeError or OSError where there is no compiler, or the source does not compile.
    Wraps ``CppCodeCache``.
    """
    cpu_codegen()()
    asks = "needs_vec_isa" in inspect.signature(CppCodeCache.load_async).parameters  # 2.13; before, it always has one
    settings: dict[str, Any] = {"needs_vec_isa": True} if asks else {}
    # Inductor writes vector code itself and turns the compiler's own off, and with it products fused with sums.
    flags = ["-ftree-loop-vectorize", "-fno-math-errno", "-ffp-contract=fast"]
    load = CppCodeCache.load_async(source, extra_flags=flags, **settings)
    found: ctypes.CDLL = load()
    return found
