"""The denoisers of :mod:`zoo_images` inside their real diffusers pipelines, with their real schedulers.

Nothing is loaded: text encoders, tokenizers and the VAE are None. Prompts are embeddings, drawn as the
denoiser's :class:`~models.Case` draws them, and a run ends with latents.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from models import Case, pixart
from torch import Tensor
from zoo_images import ZOO_IMAGES


@dataclass(frozen=True, slots=True, eq=False)
class PipelineCase:
    """A pipeline ready to be called.

    Attributes:
        name: for messages.
        pipe: the pipeline.
        kwargs: of a call; the number of steps and the generator are still to come.
        denoiser_name: attribute of the pipeline that holds the denoiser.
        case: what to know of the denoiser.
        steps_kwarg: of a call, the number of steps.
        calls_per_step: of the denoiser; two where CFG is not batched.
        extra_calls: of the denoiser in a whole run, where the scheduler adds some.
    """

    name: str
    pipe: Any
    kwargs: Mapping[str, Any]
    denoiser_name: str
    case: Case
    steps_kwarg: str = "num_inference_steps"
    calls_per_step: int = 1
    extra_calls: int = 0

    def calls(self, steps: int) -> int:
        """How often a run of so many steps calls the denoiser."""
        return self.calls_per_step * steps + self.extra_calls

    def run(self, steps: int = 4, seed: int = 0) -> Tensor:
        """The latents of a run."""
        generator = torch.Generator().manual_seed(seed)
        images = self.pipe(**{self.steps_kwarg: steps}, generator=generator, **self.kwargs).images
        assert isinstance(images, Tensor)
        return images


PROMPT: Final = {"encoder_hidden_states": "prompt_embeds"}
MASKED_PROMPT: Final = {**PROMPT, "encoder_attention_mask": "prompt_attention_mask"}
POOLED_PROMPT: Final = {**PROMPT, "pooled_projections": "pooled_prompt_embeds"}


def prompts(case: Case, names: Mapping[str, str], images: int = 2) -> dict[str, Tensor]:
    """Prompts for a pipeline, and negative ones.

    Args:
        case: of the denoiser, which draws them.
        names: argument of the denoiser to argument of the pipeline.
        images: of a run.
    """
    generator = torch.Generator().manual_seed(0)
    if case.cfg_order is None:
        halves = [case.inputs(999, images, generator)[1] for _ in range(2)]
    else:
        both = case.inputs(999, 2 * images, generator)[1]
        halves = [{name: both[name][part] for name in names} for part in (slice(images), slice(images, None))]
    cond, uncond = reversed(halves) if case.cfg_order == "uncond_first" else halves
    found = {pipe_name: cond[name] for name, pipe_name in names.items()}
    return found | {f"negative_{pipe_name}": uncond[name] for name, pipe_name in names.items()}


def assemble(kind: type[Any], scheduler: Any, case: Case, denoiser_name: str = "transformer", **modules: Any) -> Any:
    """A pipeline of that class around the denoiser; whatever else it needs and is not given is None."""
    needed = inspect.signature(kind.__init__).parameters.values()
    nothing = {part.name: None for part in needed if part.default is part.empty and part.name != "self"}
    pipe = kind(**(nothing | {denoiser_name: case.model, "scheduler": scheduler} | modules))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pixart_alpha() -> PipelineCase:
    """PixArt-Alpha with DPM-Solver++."""
    from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline

    case = pixart()
    pipe = assemble(PixArtAlphaPipeline, DPMSolverMultistepScheduler(), case)
    kwargs = {"negative_prompt": None, "use_resolution_binning": False, "output_type": "latent"}
    return PipelineCase("pixart_alpha", pipe, prompts(case, MASKED_PROMPT) | kwargs, "transformer", case)


def pixart_sigma() -> PipelineCase:
    """PixArt-Sigma with DPM-Solver++."""
    from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline

    case = ZOO_IMAGES["pixart_sigma"]()
    pipe = assemble(PixArtSigmaPipeline, DPMSolverMultistepScheduler(), case)
    kwargs = {"negative_prompt": None, "use_resolution_binning": False, "output_type": "latent"}
    return PipelineCase("pixart_sigma", pipe, prompts(case, MASKED_PROMPT) | kwargs, "transformer", case)


def hunyuan_dit() -> PipelineCase:
    """Hunyuan-DiT with DDPM, which draws noise on every step."""
    from diffusers import DDPMScheduler, HunyuanDiTPipeline

    case = ZOO_IMAGES["hunyuan_dit"]()
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.03, steps_offset=1)
    pipe = assemble(HunyuanDiTPipeline, scheduler, case, requires_safety_checker=False)
    names = PROMPT | {
        "text_embedding_mask": "prompt_attention_mask",
        "encoder_hidden_states_t5": "prompt_embeds_2",
        "text_embedding_mask_t5": "prompt_attention_mask_2",
    }
    kwargs = {"use_resolution_binning": False, "output_type": "latent"}
    return PipelineCase("hunyuan_dit", pipe, prompts(case, names) | kwargs, "transformer", case)


def sd3(name: str = "sd3") -> PipelineCase:
    """Stable Diffusion 3, or by its name 3.5, with flow matching."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    case = ZOO_IMAGES[name]()
    pipe = assemble(StableDiffusion3Pipeline, FlowMatchEulerDiscreteScheduler(shift=3.0), case)
    return PipelineCase(name, pipe, prompts(case, POOLED_PROMPT) | {"output_type": "latent"}, "transformer", case)


def sd35() -> PipelineCase:
    """Stable Diffusion 3.5."""
    return sd3("sd35")


def flux() -> PipelineCase:
    """FLUX.1-dev with flow matching whose shift depends on the number of tokens; no CFG."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    case = ZOO_IMAGES["flux"]()
    pipe = assemble(FluxPipeline, FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True), case)
    positive = {name: given for name, given in prompts(case, POOLED_PROMPT).items() if "negative" not in name}
    kwargs = {"height": 128, "width": 128, "output_type": "latent"}
    return PipelineCase("flux", pipe, positive | kwargs, "transformer", case)


def auraflow() -> PipelineCase:
    """AuraFlow with flow matching; it insists on masks and ignores them."""
    from diffusers import AuraFlowPipeline, FlowMatchEulerDiscreteScheduler

    case = ZOO_IMAGES["auraflow"]()
    pipe = assemble(AuraFlowPipeline, FlowMatchEulerDiscreteScheduler(shift=1.73), case)
    found = prompts(case, PROMPT)
    mask = torch.ones(found["prompt_embeds"].shape[:2], dtype=torch.long)
    kwargs = {
        "prompt_attention_mask": mask,
        "negative_prompt_attention_mask": mask,
        "height": 128,
        "width": 128,
        "output_type": "latent",
    }
    return PipelineCase("auraflow", pipe, found | kwargs, "transformer", case)


def lumina_next() -> PipelineCase:
    """Lumina-Next with flow matching; the conditional half comes first."""
    from diffusers import FlowMatchEulerDiscreteScheduler, LuminaPipeline

    case = ZOO_IMAGES["lumina_next"]()
    pipe = assemble(LuminaPipeline, FlowMatchEulerDiscreteScheduler(), case)
    names = PROMPT | {"encoder_mask": "prompt_attention_mask"}
    return PipelineCase("lumina_next", pipe, prompts(case, names) | {"output_type": "latent"}, "transformer", case)


def lumina2() -> PipelineCase:
    """Lumina 2 with flow matching; a call for the condition and a call without in each step."""
    from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline

    case = ZOO_IMAGES["lumina2"]()
    pipe = assemble(Lumina2Pipeline, FlowMatchEulerDiscreteScheduler(shift=6.0), case)
    kwargs = prompts(case, MASKED_PROMPT) | {"output_type": "latent"}
    return PipelineCase("lumina2", pipe, kwargs, "transformer", case, calls_per_step=2)


def sana() -> PipelineCase:
    """Sana with DPM-Solver++ on flow sigmas; latents are an image's 32nd part."""
    from diffusers import DPMSolverMultistepScheduler, SanaPipeline

    case = ZOO_IMAGES["sana"]()
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    pipe = assemble(SanaPipeline, DPMSolverMultistepScheduler(**flow), case)
    kwargs = {
        "negative_prompt": None,
        "use_resolution_binning": False,
        "height": 256,
        "width": 256,
        "output_type": "latent",
    }
    return PipelineCase("sana", pipe, prompts(case, MASKED_PROMPT) | kwargs, "transformer", case)


def unet(scheduler: str = "PNDMScheduler") -> PipelineCase:
    """Stable Diffusion 1 with PNDM, which evaluates its second step twice, or with another scheduler."""
    import diffusers

    case = ZOO_IMAGES["unet"]()
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
    pndm = scheduler == "PNDMScheduler"
    own = {"skip_prk_steps": True} if pndm else {"clip_sample": False}
    made = getattr(diffusers, scheduler)(**betas, **own, set_alpha_to_one=False)
    pipe = assemble(diffusers.StableDiffusionPipeline, made, case, "unet", requires_safety_checker=False)
    kwargs = prompts(case, PROMPT) | {"output_type": "latent"}
    return PipelineCase("unet" if pndm else "unet_ddim", pipe, kwargs, "unet", case, extra_calls=int(pndm))


def unet_ddim() -> PipelineCase:
    """Stable Diffusion 1 with DDIM: one call a step."""
    return unet("DDIMScheduler")


IMAGE_PIPELINES: Final[Mapping[str, Callable[[], PipelineCase]]] = {
    "pixart_alpha": pixart_alpha,
    "pixart_sigma": pixart_sigma,
    "hunyuan_dit": hunyuan_dit,
    "sd3": sd3,
    "sd35": sd35,
    "flux": flux,
    "auraflow": auraflow,
    "lumina_next": lumina_next,
    "lumina2": lumina2,
    "sana": sana,
    "unet": unet,
    "unet_ddim": unet_ddim,
}
"""Name to builder."""
