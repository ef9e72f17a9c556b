"""Code is loaded only from folders that the user owns and that nobody else can write to."""

from __future__ import annotations

import ctypes
import os
import stat
from pathlib import Path

import pytest
import torch

from difa_fx import private_folder
from difa_fx._torch import build_cpp, cpu
from difa_fx.private_folder import is_private

SOURCE = 'extern "C" int answer() { return 42; }'


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An own cache folder."""
    monkeypatch.setenv("DIFA_CACHE_DIR", str(tmp_path / "home"))
    return tmp_path / "home" / "kernels"


def folder(path: Path, mode: int) -> Path:
    path.mkdir(parents=True)
    path.chmod(mode)
    return path


@pytest.mark.parametrize(
    ("mode", "private"), [(0o700, True), (0o755, True), (0o775, False), (0o777, False), (0o1777, False)]
)
def test_nobody_else_may_write(tmp_path: Path, mode: int, private: bool) -> None:
    assert is_private(folder(tmp_path / "own", mode)) is private


@pytest.mark.parametrize(("mode", "private"), [(0o777, False), (0o1777, True)])
def test_nor_put_something_else_in_its_place(tmp_path: Path, mode: int, private: bool) -> None:
    shared = folder(tmp_path / "shared", mode)
    assert is_private(folder(shared / "own", 0o700)) is private


def test_a_folder_of_another_user_is_not_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert not is_private(tmp_path)


def test_what_a_link_leads_to_counts(tmp_path: Path) -> None:
    folder(tmp_path / "open", 0o777)
    (tmp_path / "link").symlink_to(tmp_path / "open")
    assert not is_private(tmp_path / "link")
    assert not is_private(tmp_path / "nowhere")


def test_inductors_folder_is_used_while_it_is_private(tmp_path: Path, home: Path) -> None:
    own, shared = folder(tmp_path / "own", 0o700), folder(tmp_path / "shared", 0o777)
    assert private_folder.kernels_folder(own) == own / "difa_fx"
    assert private_folder.kernels_folder(shared) == home
    assert stat.S_IMODE(home.stat().st_mode) == 0o700


def test_else_there_is_one_for_this_process(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(home.parent, 0o777)
    monkeypatch.setattr(private_folder.tempfile, "mkdtemp", lambda prefix: str(folder(tmp_path / prefix, 0o700)))
    private_folder._of_this_process.cache_clear()
    found = private_folder.kernels_folder(folder(tmp_path / "shared", 0o777))
    assert found.parent == tmp_path and is_private(found)
    private_folder._of_this_process.cache_clear()


def test_a_library_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert build_cpp(SOURCE, tmp_path).answer() == 42
    (library,) = tmp_path.iterdir()
    monkeypatch.setattr(cpu.CppBuilder, "build", None)
    assert build_cpp(SOURCE, tmp_path).answer() == 42
    library.chmod(0o777)
    with pytest.raises(TypeError):  # it would be built again
        build_cpp(SOURCE, tmp_path)


def test_a_planted_library_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared, own = folder(tmp_path / "shared", 0o777), folder(tmp_path / "own", 0o700)
    build_cpp(SOURCE, own)
    (name,) = [path.name for path in own.iterdir()]
    monkeypatch.setenv("DIFA_CACHE_DIR", str(tmp_path / "home"))
    planted = folder(shared / "difa_fx", 0o777) / name
    planted.write_bytes(b"no library at all")
    loaded: list[str] = []
    load = ctypes.CDLL
    monkeypatch.setattr(ctypes, "CDLL", lambda path: loaded.append(path) or load(path))
    assert build_cpp(SOURCE, private_folder.kernels_folder(shared)).answer() == 42
    assert loaded and not any(path.startswith(str(shared)) for path in loaded)


def test_a_fault_of_the_compiler_is_a_runtime_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        build_cpp("this is no C++", tmp_path)
    assert not list(tmp_path.iterdir())


def test_threads_do_not_share_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels of one thread are put off, and another thread's are waited for at once."""
    import threading

    from torch._inductor.async_compile import AsyncCompile

    from difa_fx._torch import deferred_kernels

    waited: list[str] = []
    monkeypatch.setattr(AsyncCompile, "wait", lambda self, scope: waited.append(scope["name"]))
    before = AsyncCompile.wait
    with deferred_kernels():
        AsyncCompile().wait({"name": "mine"})
        other = threading.Thread(target=lambda: AsyncCompile().wait({"name": "other's"}))
        other.start()
        other.join()
        assert waited == ["other's"]
        with deferred_kernels():
            pass
        assert AsyncCompile.wait is not before
    assert waited == ["other's", "mine"]
    assert AsyncCompile.wait is before


def test_a_race_of_kernels_leaves_the_users_numbers_alone() -> None:
    from difa_fx.kernel_race import _inputs

    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    _inputs(torch.empty(0), (2, 4, 8, 16))
    assert torch.equal(torch.rand(3), wanted)
