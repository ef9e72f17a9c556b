"""All denoisers that are not written for one trap: diffusers' own, and other people's spellings of attention.

What a case does not say of itself stands here: which tokens are text, and which methods a site cannot do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final

import zoo_images
from models import Case

def _unguided(build: Callable[[], Case]) -> Case:
    """A case whose halves of guidance cannot be told: its batch is a list, and Dynamo breaks the graph behind it."""
    return replace(build(), cfg_order=None)


ZOO: Final[Mapping[str, Callable[[], Case]]] = {
    **zoo_images.ZOO_IMAGES,
    "z_image": functools.partial(_unguided, zoo_images.ZOO_IMAGES["z_image"]),
}

NO_SITES: Final = ("sana",)
"""Cases without any attention that a plan may change: theirs is linear."""

BATCH_LOST: Final = {
    "lumina2": ("layers.0.attn", "layers.1.attn"),
    "z_image": ("layers.0.attention", "layers.1.attention"),
}
"""Cases that put their batch together sample by sample, to the sites behind that: no half of it can be taken."""

ORACLE: Final = ("sd3", "sd35", "flux", "auraflow", "cogview4", "qwen_image", "lumina2", "hunyuan_dit", "unet")
"""Cases that the eager oracle can follow: every site calls scaled_dot_product_attention once."""


def zoo_case(name: str) -> Case:
    """The case of that name, a new one each time: where Dynamo breaks a graph, compiled code outlives a reset."""
    return replace(ZOO[name](), name=name)


def refused(name: str, path: str) -> frozenset[str]:
    """The methods that a site cannot do."""
    return frozenset({"full+cfg", "window+cfg"} if path in BATCH_LOST.get(name, ()) else ())


def text_of(name: str) -> dict[str, tuple[int, int]]:
    """How many text tokens stand before and after the image's, for each joint site."""
    count, side = zoo_images.TEXT_TOKENS.get(name, (0, "first"))
    alone = zoo_images.IMAGE_ONLY.get(name, ())
    beside = (count, 0) if side == "first" else (0, count)
    return {path: beside for path in ZOO[name]().sites if count and path not in alone}
