"""`make soak`: its page is that of its record, runs add up, and a program that fails is named."""

import pytest
from soak import leaks, programs
from soak.__main__ import PAGE, added, joined, page, read


def test_the_page_is_that_of_its_record() -> None:
    assert PAGE.read_text() == page(read()), "run `make soak`"


def test_runs_add_up() -> None:
    old = {"rounds": 2, "calls": {"train": 3, "copy": 1}, "properties": 3, "wrong": []}
    new = {"rounds": 3, "calls": {"train": 4, "make": 2}, "properties": 3, "wrong": []}
    total = {"train": 7, "copy": 1, "make": 2}
    assert added(old, new) == {"rounds": 5, "calls": total, "properties": 3, "wrong": []}


@pytest.mark.parametrize(("found", "steps"), [([], 9), (["a leak"], 5)])
def test_the_longest_run_of_the_memory_is_kept_until_one_finds_something(found, steps) -> None:
    old, new = ({"report": {"steps": count}, "found": []} for count in (9, 5))
    kept = joined("memory over steps: loss", old, {**new, "found": found})
    assert kept["report"]["steps"] == steps


@pytest.mark.parametrize(("slope", "steps", "leaking"), [
    (10.0, 100_000, True), (9.9, 100_000, False), (10.0, 2000, False), (600.0, 2000, True),
])  # fmt: skip
def test_ten_bytes_a_step_are_a_leak(slope: float, steps: int, leaking: bool) -> None:
    assert leaks.leaks({"steps": steps, "bytes a step": slope}) == leaking


@pytest.mark.filterwarnings("ignore")
def test_random_programs() -> None:
    report = programs.run(5)
    assert report["programs"] == 5 and report["failures"] == []
    assert sum(report["calls"].values()) > 20 and report["calls"]["compile"] == 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("error", [KeyError("x"), AssertionError("no"), RuntimeError("of torch")])
def test_a_program_that_fails_is_named(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(program: programs.Program) -> None:
        raise error

    monkeypatch.setattr(programs.Program, "train", fail)
    (failure,) = programs.run(1, first_seed=1, length=30)["failures"]
    assert failure.startswith(f"seed 1: {type(error).__name__}: {error}")
