"""What commands share: ``module:function`` that makes what a command works on, and where its output goes."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from difa_fx.errors import DifaError, OptionError, short


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
        OptionError: it cannot be imported, raises, or returns something else.
    """
    made = called(target, returns)
    if not (isinstance(made, tuple) and len(made) in sizes):
        raise OptionError(
            "the target returned something else",
            where=target,
            got=f"{type(made).__name__}" + (f" of {len(made)}" if isinstance(made, tuple) else ""),
            allowed=returns,
            todo="return a tuple of these",
        )
    return made


def called(target: str, returns: str) -> Any:
    """What the function ``target`` returns, which must be ``returns``.

    Raises:
        OptionError: it cannot be imported, or raises.
    """
    module, _, name = target.partition(":")
    sys.path.insert(0, "")
    try:
        function = getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as error:
        raise _wrong_target("the target cannot be loaded", target, error, returns) from error
    finally:
        sys.path.remove("")
    try:
        return function()
    except DifaError:
        raise
    except (Exception, SystemExit) as error:
        raise _wrong_target("the target raised an error", target, error, returns) from error


def _wrong_target(what: str, target: str, error: BaseException, returns: str) -> OptionError:
    return OptionError(
        what,
        where=target,
        got=f"{type(error).__name__}: {error}",
        allowed="module:function, importable from here and called without arguments",
        todo=f"name a function that returns {returns}",
    )


@contextmanager
def on_examples(model: str) -> Iterator[None]:
    """Within, a denoiser runs on example inputs; what it raises is its own.

    Raises:
        OptionError: it raised an error.
    """
    try:
        yield
    except DifaError:
        raise
    except Exception as error:
        raise OptionError(
            "the denoiser does not run on these inputs",
            where=model,
            got=f"{type(error).__name__}: {error}",
            allowed="inputs that the denoiser takes",
            todo="give module:function that returns (model, args, kwargs), or other sizes",
        ) from error


def count(text: str) -> int:
    """A whole number of 1 or more, for argparse."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{short(text, 40)!r} is not a whole number of 1 or more")
    return value


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
