"""Plans of xDiT: their JSON, ``{"block0": {"step0": "FULL_ATTN", ...}, ...}``, as methods and sites."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Final

from difa_fx.errors import PlanError
from difa_fx.plan_io import read_json, seen
from difa_fx.plan_rules import as_method, fault
from difa_fx.plan_words import Method

#: xDiT writes the member names of its ``FastAttnMethod``.
_METHODS: Final = {
    "FULL_ATTN": Method.FULL,
    "RESIDUAL_WINDOW_ATTN": Method.WINDOW,
    "OUTPUT_SHARE": Method.CACHED,
    "FULL_ATTN_CFG_SHARE": Method.FULL_CFG,
    "RESIDUAL_WINDOW_ATTN_CFG_SHARE": Method.WINDOW_CFG,
}


def read_xdit(
    source: str | os.PathLike[str] | Mapping[str, Any], site: str
) -> tuple[tuple[tuple[Method, ...], ...], tuple[str, ...]]:
    """The rows of methods, one per step, and the sites of a plan of xDiT.

    Args:
        source: the file, or what is in it.
        site: module path of a block's self-attention, ``{block}`` standing for its number.

    Raises:
        PlanError: it is none, or ``site`` has no place for the number.
    """
    where = "xDiT plan" if isinstance(source, Mapping) else os.fspath(source)
    value = source if isinstance(source, Mapping) else read_json(source)
    if "{block}" not in site:
        raise fault(
            "the site pattern does not say where the block's number goes",
            "site",
            site,
            "text with {block} in it, such as transformer_blocks.{block}.attn1",
        )
    columns = [
        [as_method(m, f"{where}: block{b}.step{i}", _METHODS) for i, m in enumerate(col)]
        for b, col in enumerate(xdit_columns(value, where))
    ]
    sites = tuple(site.replace("{block}", str(block)) for block in range(len(columns)))
    return tuple(zip(*columns, strict=True)), sites


def xdit_columns(value: object, where: str) -> list[list[object]]:
    """The cells of xDiT's JSON, ``{"block0": {"step0": "FULL_ATTN", ...}, ...}``, block by block.

    Raises:
        PlanError: not of that form, a block or a step is missing, or blocks differ in length.
    """
    columns = [_numbered(steps, "step", at) for at, steps in _xdit_blocks(value, where)]
    for index, column in enumerate(columns):
        if len(column) != len(columns[0]):
            raise PlanError(
                "the blocks of an xDiT plan have different numbers of steps",
                where=f"{where}: block{index}",
                got=f"{len(column)} steps",
                allowed=f"{len(columns[0])} steps, as in block0",
                todo="calibrate again in xDiT, or mend the file",
            )
    return columns


def _xdit_blocks(value: object, where: str) -> list[tuple[str, object]]:
    return [(f"{where}: block{i}", steps) for i, steps in enumerate(_numbered(value, "block", where))]


def _numbered(value: object, name: str, where: str) -> list[object]:
    """The values of ``{"<name>0": ..., "<name>1": ...}`` in number order."""
    form = f'an object with the keys "{name}0", "{name}1" and so on, none missing'
    if not isinstance(value, Mapping) or not value:
        raise PlanError(
            "this is not a plan of xDiT",
            where=where,
            got=seen(value),
            allowed=form,
            todo="give the JSON that xDiT keeps in its cache folder",
        )
    expected = [f"{name}{index}" for index in range(len(value))]
    given = {key if isinstance(key, str) else seen(key) for key in value}
    if wrong := sorted(given - set(expected)):
        raise PlanError(
            f'an xDiT plan counts its {name}s from "{name}0" without a gap',
            where=where,
            got=wrong[:5],
            allowed=form,
            todo="give the JSON that xDiT keeps in its cache folder",
        )
    return [value[key] for key in expected]
