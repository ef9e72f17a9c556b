"""All denoisers that are not written for one trap: diffusers' own, and other people's spellings of attention.

What a case does not say of itself stands here: which tokens are text, and which methods a site cannot do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final

import handwritten
import zoo_images
import zoo_recent_audio
import zoo_recent_images
import zoo_recent_video
import zoo_video
import zoo_video_unets
import zoo_wan
from models import Case

ZOO: Final[Mapping[str, Callable[[], Case]]] = {
    **zoo_images.ZOO_IMAGES,
    **zoo_recent_images.ZOO_RECENT_IMAGES,
    **zoo_video.ZOO_VIDEO,
    **zoo_recent_video.ZOO_RECENT_VIDEO,
    **zoo_wan.ZOO_WAN,
    **zoo_recent_audio.ZOO_RECENT_AUDIO,
    **zoo_video_unets.ZOO_VIDEO_UNETS,
    **handwritten.HANDWRITTEN,
}

UNGUIDED: Final = ("z_image", "stdit_ragged", "omnigen")
"""Cases whose halves of guidance cannot be told, since Dynamo breaks the graph between the latents and the sites."""

NO_SITES: Final = ("sana", "sana_video")
"""Cases without any attention that a plan may change: theirs is linear."""

TEXT_TOKENS: Final = {
    **zoo_images.TEXT_TOKENS,
    **zoo_recent_images.TEXT_TOKENS,
    **zoo_video.TEXT_TOKENS,
    **zoo_recent_video.TEXT_TOKENS,
    **zoo_recent_audio.TEXT_TOKENS,
    **handwritten.TEXT_TOKENS,
}

ALONE: Final = {**zoo_images.IMAGE_ONLY, **zoo_recent_images.IMAGE_ONLY, **zoo_recent_audio.VIDEO_ONLY}
"""Sites of image, video or sound alone in denoisers whose others join text."""

BATCH_LOST: Final = {
    "lumina2": ("layers.0.attn", "layers.1.attn"),
    "z_image": ("layers.0.attention", "layers.1.attention"),
}
"""Cases that put their batch together sample by sample, to the sites behind that: no half of it can be taken."""

NO_WINDOW: Final = ("kv_compressed", "prx")
"""Cases with other keys than queries: fewer, or those of text too."""

ORACLE: Final = (
    *("sd3", "sd35", "flux", "auraflow", "cogview4", "qwen_image", "lumina2", "hunyuan_dit", "unet"),
    *("latte", "cogvideox_rotary", "ltx", "wan", "hunyuan_video", "stable_audio"),
    *("ltx2", "cosmos", "cosmos2", "wan_i2v", "wan_ti2v", "skyreels", "skyreels_forcing", "wan_vace"),
    *("consisid", "easyanimate", "chronoedit", "ace_step", "longcat_audio", "kandinsky6", "anyflow", "helios"),
    *("motif_video", "svd", "animatediff", "text_to_video", "i2vgen"),
    *("masked_sdpa", "channels_first_sdpa"),
    *("stdit_fused", "timm_sdpa", "gqa_enabled", "joint_projections_last", "joint_source_first", "joint_shared_last"),
    *("hidream", "kandinsky5", "bria", "bria_fibo", "cogview3plus", "hunyuan_image", "glm_image", "ernie_image"),
    *("ideogram4", "joy_image", "ovis_image", "flux3", "flux3_given", "sdxl", "dreamlite"),
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
    alone = ALONE.get(name, ())
    beside = {"first": (count, 0), "last": (0, count), "both": (count, count)}[side]
    return {path: beside for path in ZOO[name]().sites if count and path not in alone}
