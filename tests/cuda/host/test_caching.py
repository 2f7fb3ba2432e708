"""The Rust host: compiled kernels on disk.

Each test runs in a fork of the child process, which has loaded no kernel, and calls `_core` on
fakes of CUDA tensors.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.cuda.calls import counts, draw, error_of
from support.cuda.mock import INVALID_IMAGE, Driver, forked, fresh, start


def _once() -> tuple[int, int]:
    draw()
    return counts()


def _both() -> tuple[int, int]:
    draw()
    draw(1)
    return counts()


def test_a_later_process_compiles_nothing(own_cache: Path) -> None:
    assert fresh(_both) == (2, 0)
    assert fresh(_both) == (0, 2)
    assert own_cache.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("damage", [
    lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(path.read_bytes()[:-1]),
    lambda path: path.write_bytes(path.read_bytes()[:-9] + b"corrupted"),
    lambda path: path.write_bytes(b"\xff" * 4096),
    lambda path: (path.unlink(), path.mkdir()),
], ids=["empty", "cut off", "altered", "garbage", "a folder"])  # fmt: skip
def test_a_corrupt_file_is_compiled_again(damage: Callable[[Path], Any], own_cache: Path) -> None:
    fresh(_once)
    (path,) = own_cache.iterdir()
    whole = path.read_bytes()
    damage(path)
    assert fresh(_once) == (1, 0)
    if not path.is_dir():
        assert path.read_bytes() == whole
        assert fresh(_once) == (0, 1)


def test_another_kernels_file_in_the_place_is_not_taken(own_cache: Path) -> None:
    fresh(_both)
    one, two = own_cache.iterdir()
    one.write_bytes(two.read_bytes())
    assert fresh(_both) == (1, 1)


@pytest.mark.parametrize("place", ["", "/proc/nowhere", "{tmp}/file/below"])
def test_without_a_folder_to_write_every_process_compiles(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("SOKD_CACHE_DIR", place.format(tmp=tmp_path))
    assert fresh(_once) == (1, 0)
    assert fresh(_once) == (1, 0)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_read(own_cache: Path) -> None:
    fresh(_once)
    own_cache.chmod(0o500)
    assert fresh(_both) == (1, 1)
    own_cache.chmod(0o700)


def test_processes_at_once_leave_whole_files(own_cache: Path) -> None:
    runs = [start(_once) for _ in range(4)]
    assert all(sum(run()) == 1 for run in runs)
    assert len(list(own_cache.iterdir())) == 1  # nothing temporary is left
    assert fresh(_once) == (0, 1)


@forked
def test_an_image_that_the_driver_refuses_is_compiled_again(own_cache: Path) -> None:
    """A downgrade of the driver leaves such images in the cache."""
    fresh(draw)
    driver = Driver()
    driver.fail_call("cuModuleLoadData", INVALID_IMAGE)
    assert "cuModuleLoadData: CUDA_ERROR_INVALID_IMAGE" in error_of(draw)
    driver.fail_call("", 0)
    draw()
    # the refused image was compiled again; then the driver accepted it
    assert counts() == (1, 1)
