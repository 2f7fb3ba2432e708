"""The comparison of all methods: equal effort, chosen on the validation part, taken up where it ended."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

pytest.importorskip("tqdm", reason="the demo's progress bars need tqdm")

from sokd.demo import compare, data, methods, train


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[train.Task, Path]:
    """A comparison of KD and AT on a made-up set."""
    folder = tmp_path_factory.mktemp("compare")
    made, solver = data.synthetic(count=120, side=12), train.Solver(epochs=2, batch=15)
    with train.threads(1), pytest.MonkeyPatch.context() as patch:
        task = train.prepare(
            made, train.train_teacher(made, "tiny", solver, quiet=True), "tiny", solver
        )
        _only(patch)
        _run(task, folder)
    return task, folder


def _run(task: train.Task, folder: Path) -> None:
    comparison = compare.Comparison("made-up", task, folder, workers=1, quiet=True)
    comparison.tune()
    comparison.fill("made-up")


def _only(patch: pytest.MonkeyPatch) -> None:
    names = ("kd", "at")
    patch.setattr(compare, "PLAIN", {name: methods.PLAIN[name] for name in names})
    patch.setattr(
        compare, "ON_TOP", {f"{name}+sokd": methods.ON_TOP[f"{name}+sokd"] for name in names}
    )


def test_every_method_and_variant_has_as_many_trials(finished: tuple[train.Task, Path]) -> None:
    rows = compare.read_rows(finished[1] / "runs.csv")
    methods_run = {row["method"] for row in rows}
    assert methods_run == {"student", "kd", "at", "kd+sokd", "at+sokd"}
    for method in methods_run:
        tried = [row for row in rows if row["method"] == method and row["part"] == "trial"]
        assert len(tried) == 3 and {row["seed"] for row in tried} == {"100"}
        assert [
            row["seed"] for row in rows if row["method"] == method and row["part"] == "table"
        ] == list("012")


def test_trials_do_not_look_at_the_test_part(finished: tuple[train.Task, Path]) -> None:
    for row in compare.read_rows(finished[1] / "runs.csv"):
        assert bool(row["last_test"]) == bool(row["best_test"]) == (row["part"] == "table")


def test_the_table_uses_the_best_trial(finished: tuple[train.Task, Path]) -> None:
    rows = compare.read_rows(finished[1] / "runs.csv")
    for row in (row for row in rows if row["part"] == "table"):
        tried = [r for r in rows if r["part"] == "trial" and r["method"] == row["method"]]
        best = max(float(r["last_validation"]) for r in tried)
        same = [r for r in tried if (r["share"], r["lr"]) == (row["share"], row["lr"])]
        assert [float(r["last_validation"]) for r in same] == [best]
        assert row["weight"] == same[0]["weight"]


def test_equal_trials_go_to_the_smaller_share() -> None:
    tried = {"dataset": "d", "part": "trial", "method": "kd", "lr": "0.4", "last_validation": "0.5"}
    best = compare.chosen([tried | {"share": share} for share in ("2", "0.1", "0.5")], "d", "kd")
    assert best is not None and best["share"] == "0.1"
    assert compare.chosen([], "d", "kd") is None


def test_a_run_that_was_cut_off_goes_on(
    finished: tuple[train.Task, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, folder = finished
    path = tmp_path / "runs.csv"
    shutil.copy(folder / "runs.csv", path)
    whole = path.read_text().splitlines()
    path.write_text("\n".join([*whole[:9], *whole[12:14]]) + "\n")
    _only(monkeypatch)
    with train.threads(1):
        _run(task, tmp_path)

    def figures(folder: Path) -> dict[compare.Key, dict[str, str]]:
        rows = compare.read_rows(folder / "runs.csv")
        return {compare.key_of(row): {**row, "cpu_seconds": ""} for row in rows}

    assert figures(tmp_path) == figures(folder)
    before = path.read_text()
    _run(task, tmp_path)
    assert path.read_text() == before


def test_few_images_keep_every_class_its_share() -> None:
    made = data.synthetic(count=240)
    few = data.few(made, 30)
    assert few.train[1].bincount().tolist() == [10, 10, 10]
    assert few.test is made.test and few.validation is made.validation
    known = {image.numpy().tobytes() for image in made.train[0]}
    assert {image.numpy().tobytes() for image in few.train[0]} <= known


def test_a_missing_data_set_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda _: None)
    assert compare.main(["--save", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("sokd.demo.compare: data: package ") and said.count("\n") == 1
