"""A folder for code that will be loaded: one that the user owns, and that nobody else can write to.

What is loaded runs with the user's rights, so a shared temporary folder, in which another user can put a file under a
name that is known beforehand, is no place to load it from.
"""

from __future__ import annotations

import functools
import os
import stat
import tempfile
from collections.abc import Iterable
from pathlib import Path

from difa_fx.plan_io import default_folder


def is_private(place: Path) -> bool:
    """Whether ``place`` is the user's own, and nobody else can write to it or put something else in its place.

    On systems without numbers for users nothing is known, and nothing is refused.
    """
    if not hasattr(os, "getuid"):
        return True
    try:
        real = place.resolve(strict=True)
        found = real.lstat()
        if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return False
        return all(_keeps_what_is_in_it(parent.lstat()) for parent in real.parents)
    except (OSError, RuntimeError):
        return False


def private_folder(wanted: Iterable[Path]) -> Path:
    """The first of ``wanted`` that is private, made where it is missing; else one for this process alone."""
    for place in wanted:
        try:
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:
            continue
        real = place.resolve()  # a link may lead elsewhere later
        if is_private(real) and os.access(real, os.W_OK | os.X_OK):
            return real
    return _of_this_process()


def kernels_folder(inductors: Path) -> Path:
    """Where built kernels lie: with what Inductor built, or in the user's own cache."""
    return private_folder([inductors / "difa_fx", default_folder() / "kernels"])


@functools.cache
def _of_this_process() -> Path:
    return Path(tempfile.mkdtemp(prefix="difa_fx-"))  # mode 0700


def _keeps_what_is_in_it(found: os.stat_result) -> bool:
    """Whether nobody but the user and root can rename what is in a folder."""
    if found.st_uid not in (0, os.getuid()):
        return False
    shared = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return not shared or bool(found.st_mode & stat.S_ISVTX)
