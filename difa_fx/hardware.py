"""What numbers were measured on, and with what."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch

_TUNING: Final = ("TORCHINDUCTOR_MAX_AUTOTUNE", "MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD", "PYTORCH_CUDA_ALLOC_CONF")
"""How variables begin that tune all that Inductor compiles, or how memory is allocated."""


def hardware() -> dict[str, Any]:
    """CPU, cores and threads, torch and Python; on CUDA the device, too; and what the environment tunes."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    found: dict[str, Any] = {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    tuned = {name: value for name, value in os.environ.items() if name.startswith(_TUNING)}
    if tuned:
        found["environment"] = tuned
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(torch.cuda.current_device())
        found |= {"gpu": device.name, "gpu_bytes": device.total_memory, "cuda": torch.version.cuda}
    return found


def device_of(kind: str) -> dict[str, Any]:
    """The device of a kind that tensors lie on: its name and, of a CPU, torch's threads."""
    found = hardware()
    if kind == "cuda" and "gpu" in found:
        return {"type": kind, "name": found["gpu"]}
    return {"type": kind, "name": found["cpu"], "threads": found["threads"]} if kind == "cpu" else {"type": kind}


def machine_line(machine: Mapping[str, Any]) -> str:
    """A :func:`hardware` record in a line, for people: the processor, its threads, and the environment."""
    found = f"{machine['cpu']}, {machine['threads']} threads"
    return ", ".join([found, *(f"{name}={value}" for name, value in sorted(machine.get("environment", {}).items()))])


def versions() -> dict[str, str]:
    """Versions of the packages that decide what is measured."""
    return {name: _version(name) for name in ("difa_fx", "torch", "diffusers", "triton")}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
