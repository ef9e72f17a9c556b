"""Where the scripts' prompts come from: a file of the user's, MS-COCO's captions, or a few sentences of our own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from difa_fx.errors import OptionError

PROMPTS: Final = (
    "a red fox asleep in fresh snow",
    "an old lighthouse in a storm at night",
    "a bowl of ripe cherries on a wooden table",
    "a paper boat that drifts down a city gutter in the rain",
    "a steam train on a stone bridge in the mountains",
    "a child who flies a yellow kite on a beach",
    "a market street with lanterns after sunset",
    "a cat on a window sill that watches the traffic",
)
"""Enough to try a script; judge by more."""


def read_prompts(path: Path | None) -> list[str]:
    """The lines of a file that are not empty; :data:`PROMPTS` when there is none.

    Raises:
        OptionError: the file cannot be read, or is empty.
    """
    if path is None:
        return list(PROMPTS)
    found = [line.strip() for line in _text(path, "--prompts").splitlines() if line.strip()]
    if not found:
        raise OptionError(
            "there are no prompts",
            where=f"--prompts {path}",
            allowed="a prompt a line",
            todo="write some into the file",
        )
    return found


def coco_captions(folder: Path) -> list[str]:
    """The captions of MS-COCO's validation images of 2014, in their order in ``captions_val2014.json``.

    Raises:
        OptionError: the file is not there, or is another.
    """
    path = folder / "annotations" / "captions_val2014.json"
    text = _text(path, "--coco_path")
    try:
        return [str(item["caption"]) for item in json.loads(text)["annotations"]]
    except (ValueError, KeyError, TypeError) as error:
        raise OptionError(
            "this is no file of captions",
            where=str(path),
            got=f"{type(error).__name__}: {error}",
            allowed='{"annotations": [{"caption": ...}, ...]}',
            todo="download annotations_trainval2014.zip from cocodataset.org again",
        ) from error


def _text(path: Path, flag: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(
            "the prompts cannot be read",
            where=flag,
            got=str(error),
            allowed="--prompts FILE with a prompt a line, or --coco_path with annotations/captions_val2014.json in it",
            todo="mend the path; MS-COCO's annotations_trainval2014.zip is on cocodataset.org",
        ) from error
