"""The bundled denoiser draws readable digits, and the script that made it runs and resumes."""

from __future__ import annotations

import json
from pathlib import Path

import digits
import pytest
import torch
import train_digits
from diffusers import DiTPipeline, DiTTransformer2DModel
from digits import FOLDER, GUIDANCE_SCALE, NULL_CLASS, SIZE, generate
from safetensors.torch import load_file

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def pipe() -> DiTPipeline:
    return digits.load_pipeline()


def tiny(folder: Path, *extra: str) -> int:
    arguments = ["--tiny", "--out", str(folder), "--state", str(folder / "state.pt"), *extra]
    return train_digits.main(arguments)


def test_real_digits_have_the_promised_shape_and_range() -> None:
    images, labels = digits.digit_images()
    assert images.shape == (1797, 1, SIZE, SIZE)
    assert (images.min().item(), images.max().item()) == (-1, 1)
    assert labels.unique().tolist() == list(range(10))


def test_classifier_reads_held_out_real_digits() -> None:
    assert digits.fit_classifier().held_out_accuracy >= 0.97


def test_classifier_accuracy_is_the_share_read_as_asked() -> None:
    images, labels = digits.digit_images()
    classifier = digits.fit_classifier()
    read = classifier.predict(images[:50])
    assert classifier.accuracy(images[:50], read) == 1
    assert classifier.accuracy(images[:50], (read + 1) % 10) == 0
    with pytest.raises(ValueError, match="50 images came with 49 labels"):
        classifier.accuracy(images[:50], labels[:49])


def test_committed_model_is_small_and_made_of_1024_tokens() -> None:
    assert (FOLDER / WEIGHTS).stat().st_size < 8 * 2**20
    model = DiTTransformer2DModel.from_pretrained(FOLDER)
    assert model.dtype == torch.float32
    assert not model.training
    config = model.config
    assert (config.sample_size, config.patch_size, config.num_layers) == (SIZE, 1, 6)
    assert (config.in_channels, config.out_channels) == (1, 1)
    assert (config.num_attention_heads, config.attention_head_dim) == (4, 32)
    assert config.num_embeds_ada_norm == NULL_CLASS


def test_record_says_how_the_weights_were_made() -> None:
    text = (FOLDER / "training.json").read_text()
    record = json.loads(text)
    settings, _ = train_digits.parse([])
    assert record["settings"] == json.loads(json.dumps(train_digits.asdict(settings)))
    assert record["evaluation"]["accuracy"] >= 0.9
    assert record["evaluation"]["samples"] >= 200
    assert "/" not in text.replace("\\/", "/")


def test_pipeline_draws_the_digits_asked_for(pipe: DiTPipeline) -> None:
    labels = [0, 1, 4, 7]
    images = generate(pipe, labels, seed=0, steps=8)
    assert images.shape == (4, 1, SIZE, SIZE)
    assert images.dtype == torch.float32
    assert images.min() >= -1
    assert images.max() <= 1
    assert digits.fit_classifier().predict(images).tolist() == labels


def test_noise_depends_on_seed_and_place_only(pipe: DiTPipeline) -> None:
    together = generate(pipe, [2, 5, 8], seed=3, steps=2)
    apart = generate(pipe, torch.tensor([2, 5, 8]), seed=3, steps=2, batch_size=2)
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-4)
    other = generate(pipe, [2], seed=4, steps=2)
    assert (together[:1] - other).abs().max() > 0.1


def test_guidance_doubles_the_batch_conditional_half_first(pipe: DiTPipeline) -> None:
    seen: list[list[int]] = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(kwargs["class_labels"].tolist()),
        with_kwargs=True,
    )
    with hook:
        generate(pipe, [6, 9], seed=0, steps=1, guidance_scale=GUIDANCE_SCALE)
        generate(pipe, [6, 9], seed=0, steps=1, guidance_scale=1)
    assert seen == [[6, 9, NULL_CLASS, NULL_CLASS], [6, 9]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pipeline_loads_in_the_dtype_asked_for(dtype: torch.dtype) -> None:
    pipe = digits.load_pipeline(dtype)
    assert pipe.transformer.dtype == dtype
    assert generate(pipe, [1], seed=0, steps=1).dtype == torch.float32


def test_pooled_stage_sees_the_same_noise_as_the_full_one() -> None:
    """The ratio of noise to signal falls by the pooling factor, and the timestep stays."""
    level = torch.linspace(0.05, 0.95, 7)
    full, pooled = (train_digits.shift(level, 4 * grid / SIZE) for grid in (SIZE, 8))
    torch.testing.assert_close(full / (1 - full), 4 * pooled / (1 - pooled))


def test_a_fresh_model_starts_as_the_identity_residual() -> None:
    settings, _ = train_digits.parse(["--tiny"])
    model = train_digits.new_model(settings)
    with torch.no_grad():
        out = model(torch.randn(2, 1, SIZE, SIZE), torch.tensor([3, 900]), torch.tensor([1, 2])).sample
    assert out.abs().max() == 0


def test_training_resumes_to_the_very_same_weights(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert tiny(whole) == 0
    assert tiny(parts, "--stop-after", "4") == 3  # in the middle of the second stage
    assert not (parts / WEIGHTS).exists()
    assert tiny(parts) == 0
    expected = load_file(whole / WEIGHTS)
    for name, tensor in load_file(parts / WEIGHTS).items():
        assert torch.equal(tensor, expected[name]), name
    assert [json.loads((p / "training.json").read_text())["parts"] for p in (whole, parts)] == [
        1,
        2,
    ]


def test_training_refuses_a_state_made_with_other_settings(tmp_path: Path) -> None:
    assert tiny(tmp_path, "--stop-after", "1") == 3
    with pytest.raises(SystemExit, match="--restart"):
        tiny(tmp_path, "--seed", "5")
