"""What commands share: ``module:function`` that makes what a command works on, and where its output goes."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from difa_fx.errors import OptionError


def is_function(target: str) -> bool:
    """Whether ``target`` reads as ``module:function``."""
    module, separator, name = target.partition(":")
    return bool(separator) and module.replace(".", "").isidentifier() and name.isidentifier()


def made_by(target: str, sizes: Collection[int], returns: str) -> tuple[Any, ...]:
    """What the function ``target`` returns.

    Args:
        target: ``module:function``, importable from the working folder.
        sizes: how many things it may return.
        returns: what it must return, for messages.

    Raises:
        OptionError: it cannot be imported, or returns something else.
    """
    module, _, name = target.partition(":")
    sys.path.insert(0, "")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise OptionError(
            "the target cannot be loaded",
            where=target,
            got=str(error),
            allowed="module:function, importable from here",
            todo=f"name a function that returns {returns}",
        ) from error
    made = function()
    if not (isinstance(made, tuple) and len(made) in sizes):
        raise OptionError(
            "the target returned something else",
            where=target,
            got=f"{type(made).__name__}" + (f" of {len(made)}" if isinstance(made, tuple) else ""),
            allowed=returns,
            todo="return a tuple of these",
        )
    return made


def check_folder_of(output: Path, what: str, form: str) -> None:
    """Check, before anything is computed, that there is a folder for it.

    Args:
        output: the command's ``--output``.
        what: whose folder it is, for messages.
        form: what ``output`` names.

    Raises:
        OptionError: there is none.
    """
    if not output.parent.is_dir():
        raise OptionError(
            f"{what} folder does not exist",
            where="--output",
            got=str(output),
            allowed=f"{form} in a folder that exists",
            todo=f"mkdir -p {output.parent}",
        )
