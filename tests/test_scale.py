"""Several devices: each with the whole denoiser and a share of the prompts; anything else is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from compiled import compiled, make_plan
from models import dit, toy
from processes import launch, run
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from difa_fx.errors import GraphError, PlanError

ROWS = ["full", "window", "cached", "full"]

EACH_RANK = """
import sys, torch, torch.distributed as dist, difa_fx
from compiled import make_plan, run
from models import dit
from safetensors.torch import save_file
dist.init_process_group("gloo")
rank, size = dist.get_rank(), dist.get_world_size()
found = dit()
plan = make_plan(found, ["full", "window+cfg", "cached", "full"], window=5)
model = torch.compile(found.model, backend="difa", options={"plan": plan, "compiler": "eager"}, dynamic=False)
with torch.no_grad():
    images = {str(s): run(model, found.generation(4, seed=s))[-1].contiguous() for s in range(rank, 4, size)}
save_file(images, f"{sys.argv[1]}/{size}-{rank}.safetensors")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_share_the_prompts_under_one_plan(tmp_path: Path) -> None:
    script = tmp_path / "generate.py"
    script.write_text(EACH_RANK)
    for processes in (1, 2):
        run([*launch(processes), str(script), str(tmp_path)])
    alone = load_file(tmp_path / "1-0.safetensors")
    shared = load_file(tmp_path / "2-0.safetensors") | load_file(tmp_path / "2-1.safetensors")
    assert sorted(shared) == sorted(alone) == list("0123")
    assert all(torch.equal(shared[seed], alone[seed]) for seed in alone)


CONTEXT_PARALLEL = """
import types, torch, torch.distributed as dist, difa_fx
from diffusers import ContextParallelConfig, DDIMScheduler, WanTransformer3DModel
dist.init_process_group("gloo")
torch.accelerator.device_count = lambda: 1  # diffusers looks for an accelerator
torch._C._get_accelerator = lambda *_: torch.device("cpu")
sizes = {"text_dim": 12, "freq_dim": 32, "ffn_dim": 48, "num_layers": 1, "rope_max_seq_len": 32}
model = WanTransformer3DModel(num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, **sizes)
model.set_attention_backend("native")
model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
try:
    difa_fx.attach(types.SimpleNamespace(transformer=model, scheduler=DDIMScheduler()), "plan.json")
except difa_fx.errors.AttachError as error:
    print(f"refused: {str(error).splitlines()[0]}\\n", end="", flush=True)  # one write, for two processes share a pipe
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_context_parallel_is_refused(tmp_path: Path) -> None:
    script = tmp_path / "context_parallel.py"
    script.write_text(CONTEXT_PARALLEL)
    told = run([*launch(2), str(script)])
    assert told.count("refused: the denoiser is spread over devices (enable_parallelism)") == 2


@pytest.fixture
def _one_process() -> Iterator[None]:
    """A process group of this process alone: sharding works in it as in many."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_one_process")
def test_tensor_parallel_is_refused() -> None:
    found = dit()
    mesh = init_device_mesh("cpu", (1,))
    for block in found.model.transformer_blocks:
        parallelize_module(block, mesh, {"attn1.to_q": ColwiseParallel()})
    model = compiled(found, make_plan(found, ROWS))
    ((args, kwargs),) = found.generation(1)
    with pytest.raises(GraphError, match="spread over devices") as caught:
        model(*args, **kwargs)
    assert "to_q" in str(caught.value)
    assert "DTensor" in str(caught.value)


@pytest.mark.usefixtures("_one_process")
def test_fully_shard_is_refused() -> None:
    found = toy()
    mesh = init_device_mesh("cpu", (1,))
    for block in found.model.get_submodule("blocks").children():
        fully_shard(block, mesh=mesh)
    model: nn.Module = fully_shard(found.model, mesh=mesh).requires_grad_(False)
    options = {"plan": make_plan(found, ROWS), "compiler": "eager"}
    ((args, kwargs),) = found.generation(1)
    with pytest.raises(PlanError, match="one block of the denoiser by itself") as caught:
        torch.compile(model, backend="difa", options=options, dynamic=False)(*args, **kwargs)
    assert "fully_shard" in str(caught.value)
