"""The file side of plans: JSON text in, checked; JSON text out, whole or not at all.

Nothing here knows what a plan means.  :func:`read_json` turns a file into Python values or into a
:class:`~difa_fx.errors.PlanFileError`; :func:`write_text` replaces a file in one move;
:func:`plan_text` lays a plan out so that people can read it; :class:`FrozenDict` and :func:`freeze` keep free-form
JSON unchangeable in memory.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import reprlib
import secrets
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from difa_fx.errors import PlanError, PlanFileError

#: Largest plan file that is read.  1 000 steps x 1 000 sites take about 11 MB.
MAX_FILE_BYTES = 16 * 2**20

#: What a file starts with when it is something else than text.
_MAGIC = {
    b"\x80\x02": "a Python pickle",
    b"\x80\x03": "a Python pickle",
    b"\x80\x04": "a Python pickle",
    b"\x80\x05": "a Python pickle",
    b"PK\x03\x04": "a zip archive (torch.save writes those)",
    b"\x1f\x8b": "gzip data",
}


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 160

_MOST_VALUES = 1_000_000
"""Values in a plan's provenance: more than a file of ``MAX_FILE_BYTES`` can hold of lists of lists."""
_MOST_BITS = 4096
"""Of a whole number in it; JSON of thousands of digits is not read again."""


class FrozenDict(Mapping[str, Any]):
    """An unchangeable mapping that can be hashed, copied and pickled, and equals equal mappings."""

    __slots__ = ("_items",)

    def __init__(self, items: Mapping[str, Any]) -> None:
        self._items = dict(items)

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(frozenset(self._items.items()))

    def __repr__(self) -> str:
        return repr(self._items)


def seen(value: object) -> str:
    """``value`` as an error shows it: its JSON kind first, so that ``20`` and ``"20"`` differ."""
    kinds = {bool: "a boolean", int: "a whole number", float: "a number", str: "text"}
    kinds |= {dict: "an object", list: "a list", tuple: "a list"}
    if value is None:
        return "null"
    kind = kinds.get(type(value), type(value).__name__)
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        return f"a number of {value.bit_length()} bits ({kind})"
    try:
        return f"{_REPR.repr(value)} ({kind})"
    except Exception:  # noqa: BLE001  whoever wrote a faulty repr
        return kind


def freeze(value: object, where: str) -> Any:
    """``value`` as unchangeable JSON: objects as :class:`FrozenDict`, lists as tuples.

    Raises:
        PlanError: it holds something that cannot be written as JSON, or too much; the message gives its path.
    """
    return _freeze(value, where, itertools.count(1))


def _freeze(value: object, where: str, counted: Iterator[int]) -> Any:
    """``counted`` goes on with every value, so that lists that hold one another many times over have an end."""
    if next(counted) > _MOST_VALUES:
        raise PlanError(
            "the plan's provenance is too large",
            where=where,
            got=f"more than {_MOST_VALUES:,} values",
            allowed=f"at most {_MOST_VALUES:,}",
            todo="keep large records in a file of their own",
        )
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int) and value.bit_length() <= _MOST_BITS:
        return int(value)
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise _not_json(key, f"{where}, a key")
        return FrozenDict({key: _freeze(item, f"{where}.{key}", counted) for key, item in value.items()})
    if isinstance(value, (list, tuple)):
        return tuple(_freeze(item, f"{where}[{index}]", counted) for index, item in enumerate(value))
    raise _not_json(value, where)


def thaw(value: Any) -> Any:
    """A plain JSON value again: the opposite of :func:`freeze`."""
    if isinstance(value, Mapping):
        return {key: thaw(item) for key, item in value.items()}
    return [thaw(item) for item in value] if isinstance(value, tuple) else value


def read_json(path: str | os.PathLike[str]) -> Any:
    """The JSON value in the file at ``path``.

    Stricter than :mod:`json`: no NaN or Infinity, no key twice, UTF-8 alone, at most
    ``MAX_FILE_BYTES`` (looked up before a byte is read).

    Raises:
        PlanFileError: the file cannot be read, or does not hold such JSON.
    """
    where = os.fspath(path)
    data = _read_bytes(where)
    for magic, kind in _MAGIC.items():
        if data.startswith(magic):
            raise PlanFileError(
                f"the plan file is {kind}, not JSON",
                where=where,
                got=data[:16],
                allowed="JSON text; a pickle runs code when it is opened, so none is ever loaded",
                todo="write the plan with Plan.save(path)",
            )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PlanFileError(
            "the plan file is not UTF-8 text",
            where=f"{where}, byte {error.start}",
            got=data[error.start : error.start + 8],
            allowed="UTF-8",
            todo="save it again as UTF-8",
        ) from None
    return _parse(text, where)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """:func:`write_bytes`, for text."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write ``content`` to ``path`` so that the file holds all of it or what it held before.

    Raises:
        PlanFileError: the file cannot be written; nothing is left behind.
    """
    try:
        target = Path(os.path.realpath(path))  # a link stays a link
        draft = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
        # Opened by hand and not by tempfile: the mode then follows the umask, as for any new file.
        handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(target)
        finally:
            draft.unlink(missing_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the path
        raise PlanFileError(
            f"the file cannot be written: {getattr(error, 'strerror', None) or error}",
            where=os.fspath(path),
            allowed="a file in a folder that exists and can be written, on a disk with room",
            todo="the file is as it was before; choose another path or make room",
        ) from error


def plan_text(fields: Mapping[str, Any]) -> str:
    """A plan's JSON text: one step per line of ``methods``, ``timesteps`` on one line."""
    lines = []
    for name, value in fields.items():
        if name == "methods":
            rows = ",\n".join(f"  {json.dumps(row)}" for row in value)
            text = f"[\n{rows}\n ]"
        elif name == "timesteps":
            text = json.dumps(value, allow_nan=False)
        else:
            # JSON text holds no raw line end inside a string, so each one here ends a line.
            text = json.dumps(value, indent=1, allow_nan=False).replace("\n", "\n ")
        lines.append(f" {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def looks_like_xdit(value: object) -> bool:
    """Whether ``value`` has the outer form of xDiT's JSON."""
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(key, str) and re.fullmatch(r"block\d+", key) for key in value)
    )


def _read_bytes(where: str) -> bytes:
    try:
        about = Path(where).stat()
        _check_stat(about, where)
        with open(where, "rb") as file:
            return file.read(MAX_FILE_BYTES)
    except PlanFileError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the path
        raise PlanFileError(
            f"the plan file cannot be read: {getattr(error, 'strerror', None) or error}",
            where=where,
            allowed="a JSON file, as Plan.save(path) writes it",
            todo="check the path (a relative one starts at the folder the program runs in)",
        ) from error


def _check_stat(about: os.stat_result, where: str) -> None:
    if not stat.S_ISREG(about.st_mode):
        kind = "a folder" if stat.S_ISDIR(about.st_mode) else "not a plain file"
        raise PlanFileError(
            f"the plan file is {kind}",
            where=where,
            allowed="a JSON file, as Plan.save(path) writes it",
            todo="give the path of the file itself",
        )
    if about.st_size > MAX_FILE_BYTES:
        raise PlanFileError(
            "the plan file is too large to be a plan; it was not read",
            where=where,
            got=f"{about.st_size:,} bytes",
            allowed=f"at most {MAX_FILE_BYTES:,} bytes",
            todo="check the path; a plan for 50 steps and 28 sites takes about 20,000 bytes",
        )


def _parse(text: str, where: str) -> Any:
    def constant(name: str) -> NoReturn:
        raise _fault(f"the plan file holds {name}, which is not JSON", where, name, "finite numbers")

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) != len(items):
            twice = sorted(key for key, n in Counter(key for key, _ in items).items() if n > 1)
            raise _fault("the plan file has a key twice in one object", where, twice, "each key once")
        return found

    try:
        return json.loads(text, parse_constant=constant, object_pairs_hook=pairs)
    except json.JSONDecodeError as error:
        raise _fault(
            f"the plan file is not valid JSON: {error.msg}",
            f"{where}, line {error.lineno}, column {error.colno}",
            repr(text[error.pos : error.pos + 20]) if error.pos < len(text) else "end of file",
            "JSON, as Plan.save(path) writes it",
        ) from None
    except RecursionError:
        raise _fault("the plan file is nested too deep", where, None, "a few levels") from None
    except PlanFileError:
        raise
    except ValueError as error:  # a whole number of thousands of digits
        raise _fault(f"the plan file holds a value that cannot be read: {error}", where, None, "JSON") from None


def _fault(what: str, where: str, got: object, allowed: str) -> PlanFileError:
    return PlanFileError(what, where=where, got=got, allowed=allowed, todo="mend the file, or save the plan again")


def _not_json(value: object, where: str) -> PlanError:
    return PlanError(
        "the plan's provenance holds a value that JSON cannot express",
        where=where,
        got=seen(value),
        allowed="null, booleans, finite numbers, text, lists, and objects whose keys are text",
        todo="convert it first, for example with float(value) or str(value)",
    )


def default_folder() -> Path:
    """Where files lie that can be made again, when nothing is said."""
    own = os.environ.get("DIFA_CACHE_DIR")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(own) if own else Path(base) / "difa_fx"
