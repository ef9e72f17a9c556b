"""The package as others meet it: which module may import which, and what an import costs."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# From the bottom up.  A module imports from its own layer or from those before it.
LAYERS = (
    ("errors",),
    ("plan_io",),
    ("plan_words",),
    ("plan_rules",),
    ("plan_steps", "plan_xdit"),
    ("plan",),
    ("findings",),
    ("private_folder",),
    ("_torch",),
    ("hardware",),
    ("banded", "block_masks", "cuda_recorder", "device_time"),
    ("window_ops", "cuda_kernels"),
    ("cuda_launch",),
    ("cpu_window", "cuda_window", "flash_window"),
    ("cost", "attention"),
    ("kernel_race",),
    ("boundary",),
    ("schedule",),
    ("passes",),
    ("between_graphs",),
    ("compile",),
    ("crossings",),
    ("program",),
    ("callers", "witness", "elsewhere"),
    ("clock",),
    ("generation_line",),
    ("runner_context",),
    ("cuda_graphs", "timestep", "generations", "sessions"),
    ("cfg_halves",),
    ("handover",),
    ("runtime",),
    ("options",),
    ("registry",),
    ("backend", "session", "hearing", "unseen"),
    ("outside_graphs",),
    ("inspection",),
    ("pipelines", "loading", "report"),
    ("workers", "losses", "site_costs", "checkpoint"),
    ("budget",),
    ("step_calls",),
    ("search", "guidance"),
    ("greedy",),
    ("step_times",),
    ("profile",),
    ("drivers",),
    ("generation",),
    ("verification",),
    ("budgeting",),
    ("asked",),
    ("calibration_job",),
    ("calibration",),
    ("targets",),
    ("calibrate_command",),
    ("evaluation", "bench"),
    ("cli",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
FREE = {"__init__", "__main__"}  # they only hand on what other modules hold

FOLDERS = {
    "difa_fx": ROOT / "difa_fx",
    "difa_fx.passes": ROOT / "passes",
    "difa_fx.bench": ROOT / "difa_fx" / "bench",
    "difa_fx.evaluation": ROOT / "difa_fx" / "evaluation",
}
MODULES = {
    f"{package}.{path.stem}": path
    for package, folder in FOLDERS.items()
    for path in sorted(folder.glob("*.py"))
    if path.stem not in FREE
}


def layer(module: str) -> str:
    """A package's name for all modules in it, else the module's own name."""
    return module.split(".")[1]


def imports(path: Path) -> set[str]:
    """Every module that a file imports, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own_imports(path: Path) -> set[str]:
    return imports(path) & set(MODULES)


def python(code: str, *, cwd: Path) -> str:
    """What ``code`` prints in a fresh Python that has only what is installed."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=env,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# Which module may import which


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module):
    assert layer(module) in LEVEL, f"give {module} a place in LAYERS"
    for other in own_imports(MODULES[module]):
        assert LEVEL[layer(other)] <= LEVEL[layer(module)], f"{module} imports {other}"


def test_imports_have_no_cycle():
    graph = {module: own_imports(path) for module, path in MODULES.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError


@pytest.mark.parametrize("module", MODULES)
def test_heavy_packages_have_one_home(module):
    roots = {name.partition(".")[0] for name in imports(MODULES[module])}
    assert "passes" not in roots
    assert "matplotlib" not in roots or layer(module) == "report" or module == "difa_fx.bench.plots"
    assert "diffusers" not in roots or layer(module) in {"pipelines", "loading", "cli", "bench"}
    assert "triton" not in roots or layer(module) in {"cuda_kernels", "cuda_launch"}
    if LEVEL[layer(module)] <= LEVEL["plan"]:
        assert "torch" not in roots


@pytest.mark.parametrize("module", MODULES)
def test_private_parts_of_torch_have_one_home(module):
    private = {x for x in imports(MODULES[module]) if x.startswith("torch.") and "._" in x}
    assert not private or layer(module) == "_torch"


def test_the_oracle_is_not_part_of_the_package():
    for module, path in MODULES.items():
        assert not {"oracle", "models", "tests"} & imports(path), module


# What an import costs


def test_the_package_is_installed(tmp_path):
    code = "import difa_fx, sys; print(difa_fx.__file__)"
    assert Path(python(code, cwd=tmp_path)).parent == ROOT / "difa_fx", (
        "install the checkout first: pip install --editable '.[dev]'"
    )


def test_import_is_light(tmp_path):
    heavy = "{'diffusers', 'matplotlib', 'sklearn', 'transformers', 'triton', 'passes'}"
    code = f"import difa_fx, sys; print(sorted({heavy} & set(sys.modules)))"
    assert python(code, cwd=tmp_path) == "[]"


def test_backend_is_light_and_passes_keeps_its_name(tmp_path):
    code = (
        "import difa_fx.backend, difa_fx.passes, sys;"
        "print(sorted({'diffusers', 'matplotlib', 'passes'} & set(sys.modules)))"
    )
    assert python(code, cwd=tmp_path) == "[]"


def test_plans_need_no_torch(tmp_path):
    code = "import difa_fx.plan, sys; print('torch' in sys.modules)"
    assert python(code, cwd=tmp_path) == "False"
    code = "from difa_fx import Plan; import sys; print(Plan.__module__, 'torch' in sys.modules)"
    assert python(code, cwd=tmp_path) == "difa_fx.plan False"


# What is registered


def test_torch_finds_the_backend_without_an_import(tmp_path):
    code = (
        "import torch, sys;"
        "listed = 'difa' in torch._dynamo.list_backends();"
        "assert 'difa_fx' not in sys.modules;"
        "from torch._dynamo.backends.registry import lookup_backend;"
        "print(listed, lookup_backend('difa').__module__)"
    )
    assert python(code, cwd=tmp_path) == "True difa_fx.backend"


def test_command_line(tmp_path):
    script = Path(sys.executable).with_name("difa")
    for command in ([sys.executable, "-m", "difa_fx"], [str(script)]):
        done = subprocess.run([*command, "--help"], capture_output=True, text=True, cwd=tmp_path, timeout=120)
        assert done.returncode == 0, done.stderr
        assert "inspect" in done.stdout


def test_passes_is_one_folder_under_two_names():
    link = ROOT / "difa_fx" / "passes"
    assert link.is_symlink()
    assert link.readlink() == Path("../passes")


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(tmp_path):
    from zipfile import ZipFile

    pytest.importorskip("build")
    pytest.importorskip("setuptools")
    # Out of a copy: setuptools writes build/ and *.egg-info beside pyproject.toml.
    copy = tmp_path / "checkout"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "difa_fx", "passes"):
        (copy / name).symlink_to(ROOT / name)
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, copy],
        check=True,
        capture_output=True,
        timeout=300,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = set(ZipFile(wheel).namelist())
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"difa_fx"}
    expected = {module.replace(".", "/") + ".py" for module in MODULES}
    expected |= {f"{package.replace('.', '/')}/__init__.py" for package in FOLDERS}
    assert expected | {"difa_fx/py.typed"} <= names
