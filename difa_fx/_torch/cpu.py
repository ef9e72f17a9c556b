"""The C++ side of Inductor: the CPU's vector units, and C++ of our own."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import platform
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch._inductor.cpp_builder import CppBuilder, CppTorchDeviceOptions
from torch._inductor.cpu_vec_isa import pick_vec_isa, supported_vec_isa_list, x86_isa_checker

from difa_fx.private_folder import is_private


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


def build_cpp(source: str, folder: Path) -> ctypes.CDLL:
    """C++ ``source`` built for this CPU, with OpenMP and torch's libraries, and loaded; kept in ``folder``.

    What lies in ``folder`` is loaded as it is, so nobody else may be able to write to it.

    Raises RuntimeError or OSError where there is no compiler, or the source does not compile.
    Wraps ``CppBuilder``.
    """
    cpu_codegen()()
    # Inductor writes vector code itself and turns the compiler's own off, and with it products fused with sums.
    flags = ["-ftree-loop-vectorize", "-fno-math-errno", "-ffp-contract=fast"]
    settings = CppTorchDeviceOptions(vec_isa=pick_vec_isa(), device_type="cpu", extra_flags=flags)
    command = CppBuilder("kernel", "kernel.cpp", settings).get_command_line()
    built = folder / f"{hashlib.sha256(f'{command} {source}'.encode()).hexdigest()[:32]}.so"
    if not (built.exists() and is_private(built)):
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            code = Path(scratch, "kernel.cpp")
            code.write_text(source, encoding="utf-8")
            builder = CppBuilder("kernel", str(code), settings, output_dir=scratch)
            builder.build()
            target = Path(builder.get_target_file_path())
            target.chmod(0o700)
            target.replace(built)
    return ctypes.CDLL(str(built))
