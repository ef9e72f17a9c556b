"""Every test starts from a fresh Dynamo, a known seed and one thread; thorough ones run when asked for."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--thorough`` runs everything."""
    parser.addoption("--thorough", action="store_true", help="run the tests marked thorough, too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what needs a CUDA device, and say so; leave out what is thorough unless it was asked for."""
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="there is no CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)
    if not config.getoption("--thorough"):
        left_out = [item for item in items if "thorough" in item.keywords]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if "thorough" not in item.keywords]


def pytest_configure() -> None:
    """Where the checkout is not installed, torch does not know the backend by its name."""
    if "difa" not in torch._dynamo.list_backends(exclude_tags=()):
        from difa_fx.backend import difa

        torch._dynamo.register_backend(difa, name="difa")


def pytest_collection_finish() -> None:
    """What the imports left stays to the end: no later collection has to look through it."""
    import diffusers  # noqa: F401

    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    if torch._dynamo.utils.counters:  # something was compiled
        torch._dynamo.reset()
        gc.collect()
        torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)
