"""``images.json``: how the images of a folder were made, so that what is there can be gone on with and never mixed.

The file lies beside the images and is written before the first of them::

    {"format": "difa.images", "version": 1, "fingerprint": "...", "made by": "generate_images",
     "count": 50, "seed": 0, "samples": ["a red bus", ...], ...}
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from difa_fx.checkpoint import plain
from difa_fx.errors import EvaluationError
from difa_fx.evaluation.images import Folder, is_image
from difa_fx.plan_io import write_text

NAME = "images.json"
FORMAT = "difa.images"
VERSION = 1


def open_folder(folder: Path, settings: Mapping[str, Any]) -> None:
    """Make ``folder`` and its record, or see that it was made with these ``settings``.

    Raises:
        EvaluationError: the folder belongs to other settings, or holds images of which nothing is known.
        PlanFileError: the record cannot be written.
    """
    wanted = json.loads(json.dumps(plain(settings)))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for draft in folder.glob(".*.png.*.tmp"):  # of a run that was killed
            draft.unlink(missing_ok=True)
        strangers = sorted(path.name for path in folder.iterdir() if is_image(path.name))
    except OSError as error:
        raise EvaluationError(
            f"the folder for images cannot be made: {error.strerror}", where=str(folder), todo="choose another one"
        ) from error
    there = read_record(folder)
    if there is None:
        if strangers:
            raise EvaluationError(
                "the folder holds images of which nothing is known",
                where=str(folder),
                got=strangers[:3],
                allowed=f"an empty folder, or one with {NAME}",
                todo="use another folder",
            )
        head = {"format": FORMAT, "version": VERSION, "fingerprint": _fingerprint(wanted)}
        write_text(folder / NAME, json.dumps({**head, **wanted}, ensure_ascii=False, indent=1) + "\n")
    elif there["fingerprint"] != _fingerprint(wanted):
        raise _other_settings(folder, there, wanted)


def read_record(folder: Folder) -> dict[str, Any] | None:
    """What ``images.json`` of ``folder`` says, or None if there is none.

    Raises:
        EvaluationError: the file is not such a record.
    """
    path = Path(folder) / NAME
    if not path.exists():
        return None
    content = read_json(path)
    if not (isinstance(content, dict) and content.get("format") == FORMAT and content.get("version") == VERSION):
        raise EvaluationError(
            "the record of a folder of images is none of this version",
            where=str(path),
            allowed=f'"format": "{FORMAT}", "version": {VERSION}',
            todo="use another folder, or take the file away",
        )
    if not (isinstance(content.get("fingerprint"), str) and isinstance(content.get("count"), int)):
        raise EvaluationError(
            "the record of a folder of images lacks its fingerprint or count",
            where=str(path),
            todo="use another folder, or take the file away",
        )
    samples = content.get("samples")
    if samples is not None and not (isinstance(samples, list) and len(samples) == content["count"]):
        raise EvaluationError(
            "the record of a folder of images has not one sample for each image",
            where=f"{path}: samples",
            got=f"{len(samples)} samples" if isinstance(samples, list) else type(samples).__name__,
            allowed=f"a list of {content['count']}, as its count says",
            todo="use another folder, or take the file away",
        )
    return content


def read_json(path: Path) -> Any:
    """The JSON in a file of any size.

    Raises:
        EvaluationError: it cannot be read, or is not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise EvaluationError("a JSON file cannot be read", where=str(path), got=str(error), todo="mend it") from error


def _fingerprint(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _other_settings(folder: Path, there: Mapping[str, Any], wanted: Mapping[str, Any]) -> EvaluationError:
    names = [name for name in {**wanted, **there} if name not in ("format", "version", "fingerprint")]
    differ = [name for name in names if there.get(name) != wanted.get(name)]
    texts = [f"{name}: {_short(there.get(name))} there, {_short(wanted.get(name))} now" for name in differ]
    return EvaluationError(
        "the folder holds images that were made with other settings",
        where=str(folder),
        got="; ".join(texts) or "a record that was changed by hand",
        todo="use another folder, or the settings that it was made with",
    )


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:60]}..."
