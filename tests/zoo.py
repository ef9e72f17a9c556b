"""All denoisers that are not written for one trap: diffusers' own, and other people's spellings of attention.

What a case does not say of itself stands here: which tokens are text, and which methods a site cannot do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final

import handwritten
import zoo_images
import zoo_video
from models import Case

ZOO: Final[Mapping[str, Callable[[], Case]]] = {
    **zoo_images.ZOO_IMAGES,
    **zoo_video.ZOO_VIDEO,
    **handwritten.HANDWRITTEN,
}

UNGUIDED: Final = ("z_image", "stdit_ragged")
"""Cases whose halves of guidance cannot be told, since Dynamo breaks the graph between the latents and the sites."""

NO_SITES: Final = ("sana",)
"""Cases without any attention that a plan may change: theirs is linear."""

TEXT_TOKENS: Final = {**zoo_images.TEXT_TOKENS, **zoo_video.TEXT_TOKENS, **handwritten.TEXT_TOKENS}

BATCH_LOST: Final = {
    "lumina2": ("layers.0.attn", "layers.1.attn"),
    "z_image": ("layers.0.attention", "layers.1.attention"),
}
"""Cases that put their batch together sample by sample, to the sites behind that: no half of it can be taken."""

NO_WINDOW: Final = ("kv_compressed",)
"""Cases with fewer keys than queries."""

ORACLE: Final = (
    *("sd3", "sd35", "flux", "auraflow", "cogview4", "qwen_image", "lumina2", "hunyuan_dit", "unet"),
    *("latte", "cogvideox_rotary", "ltx", "wan", "hunyuan_video", "stable_audio"),
    *("stdit_fused", "timm_sdpa", "gqa_enabled", "joint_projections_last", "joint_source_first", "joint_shared_last"),
)
"""Cases that the eager oracle can follow: every site calls scaled_dot_product_attention once."""


def zoo_case(name: str) -> Case:
    """The case of that name, a new one each time: where Dynamo breaks a graph, compiled code outlives a reset."""
    found = replace(ZOO[name](), name=name)
    return replace(found, cfg_order=None) if name in UNGUIDED else found


def refused(name: str, path: str) -> frozenset[str]:
    """The methods that a site cannot do."""
    if name in NO_WINDOW:
        return frozenset({"window", "window+cfg"})
    return frozenset({"full+cfg", "window+cfg"} if path in BATCH_LOST.get(name, ()) else ())


def text_of(name: str) -> dict[str, tuple[int, int]]:
    """How many text tokens stand before and after the image's, for each joint site."""
    count, side = TEXT_TOKENS.get(name, (0, "first"))
    alone = zoo_images.IMAGE_ONLY.get(name, ())
    beside = (count, 0) if side == "first" else (0, count)
    return {path: beside for path in ZOO[name]().sites if count and path not in alone}
