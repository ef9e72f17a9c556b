"""The experiments of ``examples/run_*.py``, tiny and with random weights, and what they are put together from."""

from __future__ import annotations

import importlib
import importlib.machinery
import json
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import experiment
import numpy as np
import open_sora
import prompts
import pytest
import run_dit
import run_latte
import run_opensora
import run_pixart
import torch
from experiment_options import Defaults, parse, parser_for
from open_sora import OpenSora, PaddedCrossAttention, Size, pad_captions
from PIL import Image
from stdit import STDiT
from videos import frame_distances, save_video

from difa_fx.calibration import calibrate
from difa_fx.errors import OptionError
from difa_fx.plan import Plan

TINY = ("--random-weights", "--tiny", "--compiler", "eager", "--n_steps", "4", "--threshold", "1")
IMAGES = {"run_dit": run_dit, "run_pixart": run_pixart}
VIDEOS = {"run_latte": run_latte, "run_opensora": run_opensora}
SCRIPTS = IMAGES | VIDEOS


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No search for CLIP on the hub, which takes its time to fail."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def ran(script: Any, folder: Path, *flags: str) -> dict[str, Any]:
    """The record of a run that ends well."""
    assert script.run([*TINY, "--output", str(folder), *flags]) == 0
    lines = (folder / "results.jsonl").read_text().splitlines()
    record = json.loads(lines[-1])
    assert isinstance(record, dict)
    return record


def check(record: Mapping[str, Any], name: str, printed: str) -> None:
    """What is true of the record of every script."""
    plan = Plan.load(record["plan"]["file"])
    assert (plan.steps, plan.cfg) == (4, "cond_first" if name in ("run_dit", "run_opensora") else "uncond_first")
    assert record["script"] == name
    assert record["plan"]["flops_kept"] < 1
    assert record["plan"]["state_bytes"] > 0
    assert record["search_seconds"] > 0
    assert set(record["timing"]["seconds"]) == {"plain", "plan"}
    assert record["timing"]["pairs"] == 1
    assert 0 < record["evaluation"]["relative_l1"] < 1
    assert 0 < record["evaluation"]["ssim"] < 1
    for row in ("seconds, plain", "speed-up", "attention operations kept", "with projections", "ssim"):
        assert row in printed


@pytest.mark.parametrize("name", IMAGES)
def test_images_from_search_to_judgement(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record, printed = ran(IMAGES[name], tmp_path, "--eval_n_images", "3"), capsys.readouterr().out
    check(record, name, printed)
    judged = record["evaluation"]
    pictures = sorted(path.name for path in Path(judged["folder"]).glob("*.png"))
    assert pictures == ["00000.png", "00001.png", "00002.png"]
    assert judged["images"] == 3
    assert judged["fid"] is None
    assert "real" in judged["skipped"]["fid"]
    assert "fid left out: real was not given" in printed


@pytest.mark.parametrize("name", VIDEOS)
def test_videos_from_search_to_judgement(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record, printed = ran(VIDEOS[name], tmp_path, "--eval_n_images", "3"), capsys.readouterr().out
    check(record, name, printed)
    judged = record["evaluation"]
    assert {kind: len(files) for kind, files in judged["files"].items()} == {"plain": 3, "plan": 3}
    with Image.open(judged["files"]["plan"][2]) as video:
        assert video.n_frames == 5
        assert video.size == (96, 96)
    assert {name: len(values) for name, values in judged["frames"].items()} == {"psnr": 5, "ssim": 5, "relative_l1": 5}
    assert judged["ssim"] == pytest.approx(sum(judged["frames"]["ssim"]) / 5)
    assert "frame 4: psnr" in printed


@pytest.mark.slow
def test_an_experiment_with_inductor(tmp_path: Path) -> None:
    record = ran(run_dit, tmp_path, "--compiler", "inductor")
    assert record["settings"]["compiler"] == "inductor"
    assert 0 < record["evaluation"]["relative_l1"] < 1


def test_no_plan_for_the_raw_evaluation(tmp_path: Path) -> None:
    record = ran(run_dit, tmp_path, "--raw_eval")
    assert "plan" not in record
    assert list(record["timing"]["seconds"]) == ["plain"]
    assert record["evaluation"]["psnr"] is None
    assert "uncompressed" in record["evaluation"]["folder"]


def test_the_cache_holds_a_finished_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = ran(run_dit, tmp_path, "--debug")
    module = importlib.import_module("difa_fx.calibration")

    def searched(self: object) -> Plan:
        raise AssertionError("searched again")

    monkeypatch.setattr(module.CalibrationJob, "run", searched)
    again = ran(run_dit, tmp_path, "--debug", "--use_cache")
    assert again["plan"]["digest"] == first["plan"]["digest"]
    with pytest.raises(AssertionError, match="searched again"):
        ran(run_dit, tmp_path, "--debug")
    with pytest.raises(AssertionError, match="searched again"):
        ran(run_dit, tmp_path, "--debug", "--use_cache", "--cfg_scale", "2")


def test_the_search_is_asked_for_what_the_flags_say(tmp_path: Path) -> None:
    flags = ("--debug", "--ablation", "residual_window_attn,window+cfg", "--metric", "rse")
    record = ran(run_dit, tmp_path, *flags)
    plan = Plan.load(record["plan"]["file"])
    used = {method for method, count in record["plan"]["methods"].items() if count}
    assert {"full"} < used <= {"full", "window", "window+cfg"}
    assert plan.provenance["calibration"]["candidates"] == ("window", "window+cfg")
    assert plan.provenance["calibration"]["loss"] == "rse"
    assert plan.provenance["calibration"]["threshold"] == 1
    assert plan.window == 8  # of 64 tokens
    assert not list(tmp_path.rglob("*.png"))
    assert "evaluation" not in record


def test_a_plan_is_taken_as_it_is(tmp_path: Path) -> None:
    sites = [f"transformer_blocks.{i}.attn1" for i in range(2)]
    plan = Plan.uniform(sites, steps=3, every=3, method="cached", cfg="cond_first", window=8)
    plan.save(tmp_path / "plan.json")
    flags = ["--random-weights", "--tiny", "--compiler", "eager", "--debug", "--plan", str(tmp_path / "plan.json")]
    assert run_dit.run([*flags, "--output", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "results.jsonl").read_text())
    assert record["plan"]["flops_kept"] == pytest.approx(1 / 3)
    assert record["settings"]["n_steps"] == 3
    assert "search_seconds" not in record


def test_a_plan_of_another_number_of_steps_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Plan.uniform(["a"], steps=3, every=3).save(tmp_path / "plan.json")
    flags = ["--random-weights", "--tiny", "--n_steps", "4", "--plan", str(tmp_path / "plan.json")]
    assert run_dit.run(flags) == 2
    assert "for_steps(4)" in capsys.readouterr().err


def test_a_share_of_the_operations_as_goal(tmp_path: Path) -> None:
    flags = ["--random-weights", "--tiny", "--compiler", "eager", "--n_steps", "4", "--debug", "--target_flops", "0.5"]
    assert run_dit.run([*flags, "--output", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "results.jsonl").read_text())
    assert record["plan"]["flops_kept"] <= 0.5


# What is missing


@pytest.mark.parametrize("name", ["run_dit", "run_pixart", "run_latte"])
def test_without_weights_a_script_says_what_to_do(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert SCRIPTS[name].run(["--model", str(tmp_path / "nothing"), "--output", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert f"{name}: AttachError: the weights cannot be loaded" in said
    assert "nothing" in said
    assert "--random-weights --tiny" in said
    assert "Traceback" not in said


def test_without_opensora_its_script_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "opensora", None)
    monkeypatch.setattr(open_sora.importlib.util, "find_spec", lambda name: None)
    assert run_opensora.run(["--output", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "no package opensora and no mmengine" in said
    assert "github.com/hpcaitech/Open-Sora" in said


def test_without_captions_pixart_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_pixart.run([*TINY, "--output", str(tmp_path), "--coco_path", str(tmp_path)]) == 2
    assert "captions_val2014.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--tiny",), "--tiny needs --random-weights"),
        (("--metric", "lpips"), "paper, reference, rse, ssim"),
        (("--ablation", "output_share,nothing"), "'nothing' is no method"),
        (("--n_calib", "0"), "not 1 or more"),
        (("--threshold", "0.1", "--target_speedup", "2"), "not allowed with"),
    ],
)
def test_wrong_flags_are_refused(flags: Sequence[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run_dit.run(flags)
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


# The flags' meaning


def test_flags_mean_what_they_meant() -> None:
    parser = run_pixart.parser()
    assert parse(parser, []).goal == {"threshold": 0.0725}
    assert parse(parser, ["--threshold", "0"]).goal == {"threshold": 0}
    assert parse(parser, ["--target_speedup", "1.5"]).goal == {"target_speedup": 1.5}
    assert parse(parser, []).n_steps == 50
    assert (parse(parser, []).metric, parse(parser, ["--metric", ""]).metric) == ("reference", "reference")
    assert parse(parser, ["--metric", "paper"]).metric == "paper"
    assert parse(parser, []).ablation == ["cached", "window+cfg", "window", "full+cfg"]
    assert parse(parser, ["--ablation", ""]).ablation == parse(parser, []).ablation
    assert parse(parser, ["--ablation", "output_share,full_attn+cfg_attn_share"]).ablation == ["cached", "full+cfg"]
    assert parse(parser, ["--random-weights", "--tiny"]).n_steps == 6
    assert parse(parser, ["--random-weights", "--tiny", "--n_steps", "9"]).n_steps == 9


def test_the_help_says_which_loss_is_the_default_and_why() -> None:
    defaults = Defaults(
        model="m", n_calib=1, n_steps=1, threshold=1, cfg_scale=1, eval_n_images=1, eval_batchsize=1, time_batch=1
    )
    text = " ".join(parser_for("about", defaults).format_help().split())
    assert "The default, reference (or ''), is what DiTFastAttn's scripts compute" in text


def test_class_labels_are_those_of_the_reference_scripts() -> None:
    flags = ["--random-weights", "--tiny", "--eval_n_images", "8", "--n_calib", "5", "--seed", "3"]
    found = run_dit.subject(parse(run_dit.parser(), flags))
    np.random.seed(3)  # noqa: NPY002
    batches = [np.random.randint(0, 1000, 4) for _ in range(2)]  # noqa: NPY002
    assert found.evaluation == np.concatenate(batches).tolist()
    expected = torch.randint(0, 1000, (5,), generator=torch.Generator().manual_seed(3))
    assert found.calibration == expected.tolist()


def test_captions_are_those_of_the_reference_script(tmp_path: Path) -> None:
    captions = [{"caption": f"caption {i}", "id": i} for i in range(50)]
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "captions_val2014.json").write_text(json.dumps({"annotations": captions}))
    flags = ["--random-weights", "--tiny", "--n_calib", "6", "--eval_n_images", "4", "--coco_path", str(tmp_path)]
    found = run_pixart.subject(parse(run_pixart.parser(), flags))
    np.random.seed(3)  # noqa: NPY002
    assert found.calibration == [item["caption"] for item in np.random.choice(captions, 6)]  # noqa: NPY002
    assert found.evaluation == [f"caption {i}" for i in range(4)]


def test_prompts_are_the_lines_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\n  two \n")
    assert prompts.read_prompts(file) == ["one", "two"]
    assert len(prompts.read_prompts(None)) == len(prompts.PROMPTS)
    file.write_text("\n")
    with pytest.raises(OptionError, match="there are no prompts"):
        prompts.read_prompts(file)
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "captions_val2014.json").write_text('{"annotations": [{}]}')
    with pytest.raises(OptionError, match="no file of captions"):
        prompts.coco_captions(tmp_path)


# Videos


def test_the_distance_of_a_frame_is_its_own(tmp_path: Path) -> None:
    reference = torch.rand(2, 3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    changed = reference.clone()
    changed[:, 1] = 1 - changed[:, 1]
    found = frame_distances(changed, reference)
    assert [value is None for value in found["psnr"]] == [True, False, True]
    assert found["ssim"][0] == pytest.approx(1)
    assert found["ssim"][1] < 0.5
    assert found["relative_l1"] == [0, pytest.approx(1, abs=0.2), 0]
    mse = float((changed[:, 1] - reference[:, 1]).square().mean())
    assert found["psnr"][1] == pytest.approx(-10 * np.log10(mse), abs=1e-3)


def test_a_video_file_holds_the_frames(tmp_path: Path) -> None:
    frames = torch.zeros(3, 3, 16, 20)
    for i, level in enumerate((0.0, 0.5, 1.0)):
        frames[i] = level
    path = save_video(frames, tmp_path / "new" / "video.1", fps=4)
    assert path.name == "video.1.gif"
    assert [p.name for p in path.parent.iterdir()] == ["video.1.gif"]
    with Image.open(path) as video:
        assert (video.n_frames, video.size, video.info["duration"]) == (3, (20, 16), 250)
        video.seek(2)
        assert np.asarray(video.convert("L")).min() > 250


def test_the_last_batch_is_filled_up() -> None:
    seen: list[tuple[list[str], list[int]]] = []

    def draw(samples: list[str], seeds: list[int]) -> torch.Tensor:
        seen.append((samples, seeds))
        return torch.tensor(seeds)[:, None]

    drawn = experiment._in_batches(draw, ["a", "b", "c"], 2, 5)
    assert seen == [(["a", "b"], [500015, 500016]), (["c", "c"], [500017, 500017])]
    assert drawn.flatten().tolist() == [500015, 500016, 500017]


# Open-Sora


def stdit() -> STDiT:
    torch.manual_seed(0)
    shape = {"layers": 2, "width": 48, "heads": 4, "frames": 3, "side": 8, "channels": 4, "caption_channels": 20}
    return STDiT(**shape, qk_norm=True, rope=True, fused=False).eval()


def test_padded_captions_equal_packed_ones_in_one_graph() -> None:
    model = stdit()
    x, t, y = torch.randn(4, 4, 3, 8, 8), torch.full((4,), 500), torch.randn(4, 1, 9, 20)
    mask = (torch.arange(9) < torch.tensor([[9], [4]])).long()
    expected = model(x, t, y, mask)
    captions = pad_captions(model)
    caller = open_sora._Caller(torch.compile(model, backend="eager", fullgraph=True), captions)
    found = caller.forward(x, t, y, mask=mask)
    assert isinstance(model.blocks[1].cross_attn, PaddedCrossAttention)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (caller(x, t, y) - expected).abs().max() > 1e-3  # without a mask all tokens count


def test_a_size_is_read_without_a_graph_break() -> None:
    def told(x: torch.Tensor, height: Any, width: Any) -> torch.Tensor:
        both = torch.cat([height[:, None], width[:, None]], dim=1)
        return x * both.sum() * (height[0].item() * width[0].item()) ** 0.5

    sizes = Size(torch.full((2,), 9.0), 9.0), Size(torch.full((2,), 4.0), 4.0)
    x = torch.ones(3)
    compiled = torch.compile(told, backend="eager", fullgraph=True)
    assert compiled(x, *sizes).tolist() == [26 * 6.0] * 3


class MultiResolution(STDiT):
    """An STDiT that is told sizes, as Open-Sora 1.1's is."""

    def forward(self, x: torch.Tensor, timestep: torch.Tensor, y: torch.Tensor, **told: Any) -> torch.Tensor:
        mask, height, width = told.get("mask"), told["height"], told["width"]
        scale = (height[0].item() * width[0].item()) ** 0.5 / 96
        shift = torch.cat([height[:, None], told["fps"][:, None]], dim=1).sum() * 0
        return super().forward(x * scale + shift, timestep, y, mask)


def fake_opensora(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages with the names and the interfaces that the script uses of Open-Sora 1.1, around tiny parts."""
    tiny = open_sora.random_weights(tiny=True, steps=1, cfg_scale=1)

    class VAE(torch.nn.Module):
        out_channels = 4

        def get_latent_size(self, size: Sequence[int]) -> tuple[int, ...]:
            assert tuple(size) == (5, 96, 96)
            return 5, 12, 12

        def decode(self, z: torch.Tensor) -> torch.Tensor:
            return tiny.vae.decode(z)

    def text(**_: Any) -> Any:
        made = open_sora.ByteText(16, 24)
        made.output_dim, made.model_max_length = 16, 24
        return made

    def denoiser(*, input_size: Sequence[int], caption_channels: int, in_channels: int, **rest: Any) -> STDiT:
        assert rest == {"model_max_length": 24, "enable_layernorm_kernel": False, "depth": 2}
        shape = {"frames": input_size[0], "side": input_size[1], "channels": in_channels}
        torch.manual_seed(0)
        model = MultiResolution(
            layers=2,
            width=48,
            heads=3,
            caption_channels=caption_channels,
            qk_norm=True,
            rope=True,
            fused=False,
            **shape,
        )
        model.y_embedder.anything = None
        return model

    makers = {
        "vae": VAE,
        "t5": text,
        "STDiT2": denoiser,
        "iddpm": open_sora.DDIM,
    }

    def build_module(config: Mapping[str, Any], registry: object, **settings: Any) -> Any:
        given = dict(config) | settings
        device = given.pop("device", None)
        assert device in (None, "cpu")
        return makers[given.pop("type")](**given)

    class Config(dict[str, Any]):
        __getattr__ = dict.__getitem__

        @classmethod
        def fromfile(cls, path: str) -> Config:
            return cls(json.loads(Path(path).read_text()))

    contents: dict[str, dict[str, Any]] = {
        "mmengine": {},
        "mmengine.config": {"Config": Config},
        "opensora": {},
        "opensora.models": {},
        "opensora.models.text_encoder": {},
        "opensora.models.text_encoder.t5": {"text_preprocessing": str.upper},
        "opensora.registry": {"MODELS": None, "SCHEDULERS": None, "build_module": build_module},
        "opensora.utils": {},
        "opensora.utils.misc": {"to_torch_dtype": lambda name: {"fp32": torch.float32}[name]},
    }
    for name, names in contents.items():
        module = types.ModuleType(name)
        module.__dict__.update(names)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)


def test_open_sora_by_its_own_interfaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_opensora(monkeypatch)
    config = {
        "num_frames": 5,
        "image_size": [96, 96],
        "fps": 24,
        "multi_resolution": "STDiT2",
        "dtype": "fp32",
        "model": {"type": "STDiT2", "depth": 2, "enable_layernorm_kernel": True},
        "vae": {"type": "vae"},
        "text_encoder": {"type": "t5"},
        "scheduler": {"type": "iddpm", "num_sampling_steps": 100, "cfg_scale": 7.0},
    }
    file = tmp_path / "sample.py"
    file.write_text(json.dumps(config))
    flags = ["--config", str(file), "--compiler", "eager", "--n_steps", "4", "--threshold", "1", "--time_pairs", "1"]
    flags += ["--n_calib", "2", "--eval_n_images", "2", "--eval_batchsize", "2", "--time_batch", "2"]
    assert run_opensora.run([*flags, "--output", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "results.jsonl").read_text())
    assert record["model"] == "Open-Sora_sample"
    plan = Plan.load(record["plan"]["file"])
    assert plan.cfg == "cond_first"  # one graph, so that the halves can be told
    assert plan.sites == tuple(f"blocks.{i}.{attn}" for i in range(2) for attn in ("attn", "attn_temp"))
    assert 0 < record["evaluation"]["relative_l1"] < 1
    assert run_opensora.run(["--config", str(tmp_path / "none.py")]) == 2


def test_the_sampler_of_a_bare_denoiser_is_a_generation(tmp_path: Path) -> None:
    model = open_sora.random_weights(tiny=True, steps=3, cfg_scale=4.0)
    assert isinstance(model, OpenSora)
    plan = calibrate(
        model.denoiser,
        ["a", "b"],
        num_inference_steps=3,
        target_flops=0.6,
        window=4,
        cfg="cond_first",
        sampler=model.sample,
        compiler="eager",
        cache_dir=tmp_path,
        progress=False,
        verify=1,
    )
    assert plan.provenance["calibration"]["measured"]["drift"] > 0
    first, again = (model.draw(model.denoiser, ["a", "b"], [7, 8]) for _ in range(2))
    assert first.shape == (2, 5, 3, 96, 96)
    assert torch.equal(first, again)
    assert not torch.equal(first, model.draw(model.denoiser, ["a", "b"], [9, 10]))
