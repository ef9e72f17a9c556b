"""The CLIP score of torchmetrics with a CLIP model of transformers: a tiny one with random weights, from a folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from evaluation_target import folder_of

import difa_fx
from difa_fx.evaluation.images import list_images, read_images

transformers = pytest.importorskip("transformers")

SIDE = 16
PROMPTS = ["a cat", "two dogs", "a red bus in the rain", "b", "cd"]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a tokenizer of letters, and an image processor, as ``from_pretrained`` wants them."""
    folder = tmp_path_factory.mktemp("clip")
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    transformers.CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder)
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": SIDE},
        "crop_size": {"height": SIDE, "width": SIDE},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    last = len(words) - 1
    text = tower | {"vocab_size": len(words), "eos_token_id": last, "bos_token_id": last - 1, "pad_token_id": last}
    vision = tower | {"image_size": SIDE, "patch_size": 8}
    torch.manual_seed(0)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    transformers.CLIPModel(config).save_pretrained(folder)
    return folder


def test_the_score_is_the_cosine_of_image_and_prompt(clip_folder, tmp_path):
    images = folder_of(tmp_path / "images", len(PROMPTS))
    options = {"prompts": PROMPTS, "metrics": ["clip_score"], "progress": False}
    found = difa_fx.evaluate(images, clip=str(clip_folder), batch_size=2, **options).clip_score

    model = transformers.CLIPModel.from_pretrained(clip_folder).eval()
    processor = transformers.CLIPProcessor.from_pretrained(clip_folder)
    pixels = read_images([file.path for file in list_images(images, what="a test")])
    inputs = processor(images=list(pixels), text=PROMPTS, return_tensors="pt", padding=True)
    output = model(**inputs)
    cosine = torch.nn.functional.cosine_similarity(output.image_embeds, output.text_embeds)
    assert cosine.std() > 1e-3  # it depends on image and prompt
    assert found == pytest.approx(max(100 * cosine.mean().item(), 0), rel=1e-4, abs=1e-4)
    assert found == difa_fx.evaluate(images, clip=str(clip_folder), batch_size=2, **options).clip_score
