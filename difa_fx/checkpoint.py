"""What a calibration has found so far, on disk: killed at any moment, it goes on from there.

A record is one JSON file, named by a fingerprint of everything that the result depends on and replaced in one move at
every step.  A record that is whole is a finished calibration and is found again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from difa_fx.errors import PlanFileError
from difa_fx.plan_io import default_folder, read_json, write_text

FORMAT = "difa.calibration"
VERSION = 2

_DIGEST_VALUES = 4096


@dataclass(slots=True)
class Record:
    """A calibration's findings, and the file they are kept in.

    Attributes:
        path: the file; None keeps nothing.
        fingerprint: what the findings belong to.
        found: name to JSON value.
    """

    path: Path | None
    fingerprint: str
    found: dict[str, Any] = field(default_factory=dict)

    def keep(self, **findings: Any) -> None:
        """Add findings and write the file, whole or not at all.

        Raises:
            PlanFileError: the file cannot be written, for instance on a full disk; the old one is still there.
        """
        self.found.update(findings)
        if self.path is None:
            return
        content = {"format": FORMAT, "version": VERSION, "fingerprint": self.fingerprint}
        found = json.dumps(self.found)
        write_text(self.path, json.dumps(content | {"digest": _digest(found), "found": json.loads(found)}) + "\n")


def open_record(fingerprint: str, folder: str | os.PathLike[str] | None, *, fresh: bool, readonly: bool) -> Record:
    """The record of ``fingerprint`` in ``folder``, empty when there is none, or when it is not as it was written.

    Args:
        fingerprint: see :func:`fingerprint_of`.
        folder: where records lie; None: ``$DIFA_CACHE_DIR``, else ``difa_fx`` in the user's cache folder.
        fresh: begin anew, whatever is there.
        readonly: never write; for the processes that do not lead.
    """
    place = Path(folder) if folder is not None else default_folder()
    path = place / f"calibration-{fingerprint[:24]}.json"
    record = Record(None if readonly else path, fingerprint)
    if not readonly:
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PlanFileError(
                "the folder for calibrations cannot be made",
                where=str(place),
                got=str(error),
                todo="pass cache_dir, or set DIFA_CACHE_DIR",
            ) from error
    if fresh or not path.exists():
        return record
    try:
        content = read_json(path)
    except PlanFileError:
        return record
    fits = isinstance(content, dict) and content.get("format") == FORMAT and content.get("version") == VERSION
    found = content.get("found") if fits and content.get("fingerprint") == fingerprint else None
    if isinstance(found, dict) and content.get("digest") == _digest(json.dumps(found)):
        record.found = found
    return record


def _digest(found: str) -> str:
    """Tells findings that were written here from any others, which are not to be gone on with."""
    return hashlib.sha256(found.encode()).hexdigest()


def fingerprint_of(settings: Mapping[str, Any], denoiser: nn.Module) -> str:
    """Digest of a calibration's settings and of the denoiser: structure, config and weights."""
    digest = hashlib.sha256()
    digest.update(json.dumps({name: plain(value) for name, value in settings.items()}, sort_keys=True).encode())
    digest.update(type(denoiser).__qualname__.encode())
    digest.update(repr(sorted(dict(getattr(denoiser, "config", {}) or {}).items(), key=str)).encode())
    for name, value in [*denoiser.named_parameters(), *denoiser.named_buffers()]:
        digest.update(f"{name} {tuple(value.shape)} {value.dtype} {value.device.type}".encode())
        digest.update(_some_bytes(value))
    return digest.hexdigest()


def plain(value: Any) -> Any:
    """``value`` as JSON; tensors and arrays as digests of their content, unknown objects as their ``repr``."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "__array__") or isinstance(value, Tensor):
        tensor = torch.as_tensor(value).detach().cpu().contiguous()
        content = tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        return [str(tensor.dtype), list(tensor.shape), hashlib.sha256(content).hexdigest()]
    return repr(value)


def _some_bytes(value: Tensor) -> bytes:
    """The first values, the last ones and a spread of those between: enough to tell two trainings apart."""
    flat = value.detach().reshape(-1)
    step = max(1, flat.numel() // _DIGEST_VALUES)
    picked = torch.cat([flat[::step][:_DIGEST_VALUES], flat[-1:]])
    if picked.is_complex():
        picked = torch.view_as_real(picked)
    return picked.cpu().double().numpy().tobytes()
