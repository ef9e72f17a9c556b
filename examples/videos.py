"""Videos to files, and how far each frame is from the uncompressed one.

Letters: N videos, T frames, C channels, H, W pixels; values from 0 to 1.
"""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

from torch import Tensor


def save_video(frames_TCHW: Tensor, path: Path, *, fps: int = 8) -> Path:
    """Write a video: ``.mp4`` where imageio and its ffmpeg are installed, else ``.gif``.

    Args:
        frames_TCHW: the frames.
        path: without a suffix.
        fps: frames a second.

    Returns:
        The path with its suffix.
    """
    from diffusers.utils import export_to_gif, export_to_video
    from PIL import Image

    film = all(importlib.util.find_spec(name) for name in ("imageio", "imageio_ffmpeg"))
    pixels_THWC = (frames_TCHW.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    images = [Image.fromarray(pixels_HWC) for pixels_HWC in pixels_THWC]
    path = path.with_name(f"{path.name}.{'mp4' if film else 'gif'}")
    draft = path.with_name(f".draft-{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    (export_to_video if film else export_to_gif)(images, str(draft), fps=fps)
    draft.replace(path)
    return path


def frame_distances(videos_NTCHW: Tensor, reference_NTCHW: Tensor) -> dict[str, list[float | None]]:
    """PSNR in dB, SSIM and relative L1 of each frame to the reference's, over all videos.

    Returns:
        Name to T values; a PSNR of equal frames, which is infinite, is None.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    found: dict[str, list[float | None]] = {"psnr": [], "ssim": [], "relative_l1": []}
    frames = zip(videos_NTCHW.unbind(1), reference_NTCHW.unbind(1), strict=True)
    for frame_NCHW, reference_NCHW in frames:
        psnr = float(peak_signal_noise_ratio(frame_NCHW, reference_NCHW, data_range=1.0))
        found["psnr"].append(psnr if math.isfinite(psnr) else None)
        ssim = structural_similarity_index_measure(frame_NCHW, reference_NCHW, data_range=1.0)
        assert isinstance(ssim, Tensor)
        found["ssim"].append(float(ssim))
        found["relative_l1"].append(
            float((frame_NCHW - reference_NCHW).abs().mean() / reference_NCHW.abs().mean().clamp(min=1e-12))
        )
    return found
