"""What numbers were measured on, and with what."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch


def hardware() -> dict[str, Any]:
    """CPU, cores and threads, torch and Python; on CUDA the device, too; and what tunes all that Inductor compiles."""
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
    tuned = {name: value for name, value in os.environ.items() if name.startswith("TORCHINDUCTOR_MAX_AUTOTUNE")}
    if tuned:
        found["environment"] = tuned
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(torch.cuda.current_device())
        found |= {"gpu": device.name, "gpu_bytes": device.total_memory, "cuda": torch.version.cuda}
    return found


def versions() -> dict[str, str]:
    """Versions of the packages that decide what is measured."""
    return {name: _version(name) for name in ("difa_fx", "torch", "diffusers", "triton")}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
