"""The denoisers of :mod:`zoo_video` inside their real diffusers pipelines, with their real schedulers.

Nothing is loaded, as in :mod:`zoo_image_pipelines`; a run ends with latents.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import torch
import zoo_image_pipelines
from torch import Tensor, nn
from zoo_image_pipelines import MASKED_PROMPT, PROMPT, assemble, prompts
from zoo_video import FRAMES, HEIGHT, WIDTH, ZOO_VIDEO

SIZE: Final = {"height": 8 * HEIGHT, "width": 8 * WIDTH, "num_frames": 4 * (FRAMES - 1) + 1, "output_type": "latent"}
"""Of a call, where latents are an 8th part of each frame and a 4th part of the frames."""


@dataclass(frozen=True, slots=True, eq=False)
class PipelineCase(zoo_image_pipelines.PipelineCase):
    """A pipeline ready to be called.

    Attributes:
        output_name: of the result, the part that holds the latents.
    """

    output_name: str = "frames"

    @property
    def denoiser(self) -> nn.Module:
        """The denoiser, where the pipeline has it now."""
        found = getattr(self.pipe, self.denoiser_name)
        assert isinstance(found, nn.Module)
        return found

    def run(self, steps: int = 4, seed: int = 0) -> Tensor:
        """The latents of a run."""
        generator = torch.Generator().manual_seed(seed)
        result = self.pipe(**{self.steps_kwarg: steps}, generator=generator, **self.kwargs)
        latents = getattr(result, self.output_name)
        assert isinstance(latents, Tensor)
        return latents


def latte() -> PipelineCase:
    """Latte with DDIM; half of the denoiser's channels are a variance, which is dropped."""
    from diffusers import DDIMScheduler, LattePipeline

    case = ZOO_VIDEO["latte"]()
    scheduler = DDIMScheduler(beta_schedule="linear", beta_start=0.0001, beta_end=0.02, clip_sample=False)
    pipe = assemble(LattePipeline, scheduler, case)
    kwargs = {"negative_prompt": None, "height": 96, "width": 96, "video_length": 5, "output_type": "latent"}
    return PipelineCase("latte", pipe, prompts(case, PROMPT) | kwargs, "transformer", case)


def cogvideox() -> PipelineCase:
    """CogVideoX-2B with its own DDIM."""
    from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline

    case = ZOO_VIDEO["cogvideox"]()
    scheduler = CogVideoXDDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=3.0, timestep_spacing="trailing"
    )
    pipe = assemble(CogVideoXPipeline, scheduler, case)
    return PipelineCase("cogvideox", pipe, prompts(case, PROMPT) | SIZE, "transformer", case)


def cogvideox_rotary() -> PipelineCase:
    """CogVideoX-5B with its own DPM-Solver++, which draws noise, and with guidance that grows during a run."""
    from diffusers import CogVideoXDPMScheduler, CogVideoXPipeline

    case = ZOO_VIDEO["cogvideox_rotary"]()
    scheduler = CogVideoXDPMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=1.0, timestep_spacing="trailing"
    )
    pipe = assemble(CogVideoXPipeline, scheduler, case)
    kwargs = prompts(case, PROMPT) | SIZE | {"use_dynamic_cfg": True}
    return PipelineCase("cogvideox_rotary", pipe, kwargs, "transformer", case)


def ltx() -> PipelineCase:
    """LTX-Video with flow matching; latents [B, N, C] are a 32nd part of each frame and an 8th part of the frames."""
    from diffusers import FlowMatchEulerDiscreteScheduler, LTXPipeline

    case = ZOO_VIDEO["ltx"]()
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024, shift_terminal=0.1
    )
    pipe = assemble(LTXPipeline, scheduler, case)
    sizes = {"height": 16 * HEIGHT, "width": 16 * WIDTH, "num_frames": 8 * (FRAMES - 1) + 1, "output_type": "latent"}
    return PipelineCase("ltx", pipe, prompts(case, MASKED_PROMPT) | sizes, "transformer", case)


def wan() -> PipelineCase:
    """Wan 2.1 with UniPC on flow sigmas; a call for the condition and a call without in each step."""
    from diffusers import UniPCMultistepScheduler, WanPipeline

    case = ZOO_VIDEO["wan"]()
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipe = assemble(WanPipeline, scheduler, case)
    return PipelineCase("wan", pipe, prompts(case, PROMPT) | SIZE, "transformer", case, calls_per_step=2)


def allegro() -> PipelineCase:
    """Allegro with Euler's ancestral method, which draws noise on every step; four frames to a latent one."""
    from diffusers import AllegroPipeline, EulerAncestralDiscreteScheduler

    case = ZOO_VIDEO["allegro"]()
    pipe = assemble(AllegroPipeline, EulerAncestralDiscreteScheduler(beta_schedule="linear"), case)
    found = {name: part.squeeze(1) for name, part in prompts(case, MASKED_PROMPT).items()}
    kwargs = {"negative_prompt": None, "num_frames": 4 * FRAMES}
    return PipelineCase("allegro", pipe, found | SIZE | kwargs, "transformer", case)


def hunyuan_video() -> PipelineCase:
    """HunyuanVideo with flow matching; guidance is an input, so that one call a step is enough."""
    from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline

    case = ZOO_VIDEO["hunyuan_video"]()
    pipe = assemble(HunyuanVideoPipeline, FlowMatchEulerDiscreteScheduler(shift=7.0), case)
    names = MASKED_PROMPT | {"pooled_projections": "pooled_prompt_embeds"}
    positive = {name: given for name, given in prompts(case, names).items() if "negative" not in name}
    return PipelineCase("hunyuan_video", pipe, positive | SIZE, "transformer", case)


def stable_audio() -> PipelineCase:
    """Stable Audio with DPM-Solver++ of EDM; its VAE, of random weights, tells how long the sound is."""
    from diffusers import (
        AutoencoderOobleck,
        EDMDPMSolverMultistepScheduler,
        StableAudioPipeline,
        StableAudioProjectionModel,
    )

    case = ZOO_VIDEO["stable_audio"]()
    with torch.random.fork_rng(devices=()), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # diffusers' own, of the way the VAE norms its weights
        torch.manual_seed(0)
        projection = StableAudioProjectionModel(20, 20, min_value=0, max_value=512)
        vae = AutoencoderOobleck(
            encoder_hidden_size=6,
            downsampling_ratios=[1, 2],
            channel_multiples=[1, 2],
            decoder_channels=3,
            decoder_input_channels=8,
            sampling_rate=4,
        )
    scheduler = EDMDPMSolverMultistepScheduler(
        sigma_min=0.3, sigma_max=500, sigma_data=1.0, prediction_type="v_prediction", sigma_schedule="exponential"
    )
    pipe = assemble(StableAudioPipeline, scheduler, case, projection_model=projection.eval(), vae=vae.eval())
    # The last two of the denoiser's text tokens are the start and the end of the sound.
    found = {name: part[:, :-2] for name, part in prompts(case, PROMPT).items()}
    kwargs = found | {"output_type": "latent"}
    return PipelineCase("stable_audio", pipe, kwargs, "transformer", case, output_name="audios")


VIDEO_PIPELINES: Final[Mapping[str, Callable[[], PipelineCase]]] = {
    "latte": latte,
    "cogvideox": cogvideox,
    "cogvideox_rotary": cogvideox_rotary,
    "ltx": ltx,
    "wan": wan,
    "allegro": allegro,
    "hunyuan_video": hunyuan_video,
    "stable_audio": stable_audio,
}
"""Name to builder."""
