"""The demo: safe reading, a fair split, every method trains, the table and pictures are written."""

import argparse
import csv
import gzip
import hashlib
import importlib.util
import math
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("matplotlib", reason="the demo's pictures need matplotlib")

from support.demo_cases import small_task, state_of, synthetic

import sokd
from sokd.demo import __main__ as demo
from sokd.demo import data, networks, train

# The tests' teachers are tiny.
pytestmark = [
    pytest.mark.filterwarnings("ignore:sokd. the student has:UserWarning"),
    pytest.mark.usefixtures("one_thread"),
]

SOLVER = train.Solver(epochs=4, batch=15)
LINE = r"^sokd.demo: .+ must be installed: pip install [^\n]+\n$"


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> train.Task:
    torch.set_num_threads(1)
    return small_task(synthetic(), SOLVER, tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def runs(task: train.Task) -> dict[str, train.Run]:
    torch.set_num_threads(1)
    return {name: run_of(name, task) for name in train.METHODS}


def run_of(name: str, task: train.Task, seed: int = 0, **method: Any) -> train.Run:
    return train.train(train.Run(name, train.METHODS[name] | method, seed), task)


# --- data
def written(path: Path, thing: Any) -> str:
    """The SHA-256 of the pickle in the file."""
    content = pickle.dumps(thing)
    path.write_bytes(gzip.compress(content))
    return hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float32])
def test_a_known_pickle_is_read(tmp_path: Path, dtype: type) -> None:
    array = np.arange(24, dtype=dtype).reshape(2, 3, 4)
    read = data.unpickle(tmp_path / "a.gz", written(tmp_path / "a.gz", array))
    assert read.dtype == dtype
    np.testing.assert_array_equal(read, array)


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_another_pickle_is_refused_and_does_not_run(tmp_path: Path) -> None:
    known = written(tmp_path / "a.gz", np.zeros(3))
    for thing in (Evil(tmp_path / "ran"), [1, 2], np.array([{}], dtype=object)):
        written(tmp_path / "a.gz", thing)
        with pytest.raises(data.MissingData, match=r"^data: a.gz must be that of version 0.4, got"):
            data.unpickle(tmp_path / "a.gz", known)
    assert not (tmp_path / "ran").exists()


def test_duplicates_are_dropped_before_the_split() -> None:
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 255, (100, 4, 4)), np.arange(100) % 4
    twice = np.concatenate([images, images[::-1]]), np.concatenate([labels, labels[::-1]])
    made = data.from_arrays("x", twice, (50, 20), tuple("abcd"))
    parts = [{image.numpy().tobytes() for image in part[0]} for part in made[1:4]]
    assert [len(part) for part in parts] == [50, 20, 30]
    assert made.duplicates == 100
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])


def test_the_split_is_stratified_seeded_and_complete() -> None:
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
    text = r"^stratified_split: sizes must be positive and leave some of 10 images, got \(8, 2\)$"
    with pytest.raises(ValueError, match=text):
        data.stratified_split(np.zeros(10, dtype=np.int64), (8, 2))


def test_images_are_standardised_by_the_training_part() -> None:
    made = synthetic()
    assert abs(made.train[0].mean().item()) < 1e-5
    assert abs(made.train[0].std().item() - 1) < 1e-4
    pixels = made.test[0] * made.std + made.mean
    assert pixels.min() > -1e-6 and pixels.max() < 1 + 1e-6


@pytest.mark.skipif(
    importlib.util.find_spec("animal_mnist") is None, reason="animal_mnist is not installed"
)
def test_the_real_images() -> None:
    made = data.animal_mnist()
    assert [len(part[1]) for part in made[1:4]] == [4000, 1500, 4216] and made.duplicates == 284
    for images, labels in made[1:4]:
        assert images.shape[1:] == (1, 28, 28)
        assert (labels.bincount(minlength=10) > 0.06 * len(labels)).all()


@pytest.mark.parametrize("package", ["matplotlib", "animal_mnist"])
def test_a_missing_package_is_one_line_that_says_how_to_install_it(
    package: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == package else find(name)
    )
    assert demo.main([]) == 2
    printed = capsys.readouterr()
    assert package in printed.err and not printed.out
    assert re.match(LINE, printed.err)


# --- networks
def test_networks_return_logits_and_a_feature_map() -> None:
    made = synthetic(count=24, side=28, classes=6)
    teacher, student = networks.build_teacher("tiny", made), networks.build_student("small", made)
    for model, channels in ((teacher, 16), (student, 22)):
        logits, features = model(torch.zeros(2, 1, 28, 28))
        assert logits.shape == (2, 6) and features.shape == (2, channels, 7, 7)


def test_the_default_sizes_are_those_of_the_readme() -> None:
    made = synthetic(count=40, side=28, classes=10)
    models = networks.build_teacher("base", made), networks.build_student("small", made)
    sizes = [sum(parameter.numel() for parameter in model.parameters()) for model in models]
    assert sizes == [354_410, 4_714]


@pytest.mark.parametrize("option", ["--teacher", "--student", "--method"])
def test_an_unknown_name_is_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        demo.main([option, "huge"])
    assert f"argument {option}: invalid choice: 'huge'" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--seeds", "--epochs", "--teacher-epochs", "--workers"])
def test_a_number_below_one_is_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        demo.main([option, "0"])
    assert f"argument {option}: must be 1 or more, got 0" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        demo.main(["--save", str(tmp_path / "file" / "demo")])
    last = capsys.readouterr().err.splitlines()[-1]
    start = "python -m sokd.demo: error: argument --save: [Errno 20] Not a directory"
    assert last.startswith(start)


# --- methods
ROWS = torch.arange(16, 32)


def built(task: train.Task, **method: Any) -> sokd.Distiller:
    """A Distiller at its start, its teacher on ROWS."""
    distiller = train.build(train.Run("", {"method": None, "sokd": False} | method, 0), task)
    distiller.teacher.rows = ROWS
    return distiller


def objective(distiller: sokd.Distiller, task: train.Task) -> torch.Tensor:
    _, losses = distiller(*(part[ROWS] for part in task.data.train))
    return torch.stack([*losses.values()]).sum()


def test_kd_is_its_formula(task: train.Task) -> None:
    distiller, (images, labels) = built(task, method={"kd": 0.7}), task.data.train
    logits, t = distiller.student(images[ROWS])[0].double(), 4.0
    p, q = ((each / t).softmax(1) for each in (task.outputs[0][ROWS].double(), logits))
    expected = F.cross_entropy(logits, labels[ROWS]) + 0.7 * t * t * (p * (p / q).log()).sum() / 16
    torch.testing.assert_close(objective(distiller, task).double(), expected, rtol=1e-5, atol=1e-6)


def test_fitnet_is_its_formula(task: train.Task) -> None:
    distiller, (images, labels) = built(task, method={"fitnet": 2.5}), task.data.train
    logits, features = distiller.student(images[ROWS])
    assert distiller.adapters is not None
    maps = task.outputs[1][ROWS]
    difference = distiller.adapters[0](features, maps.shape[2:]) - maps
    distance = (difference**2).sum() / difference.numel()
    expected = F.cross_entropy(logits, labels[ROWS]) + 2.5 * distance
    torch.testing.assert_close(objective(distiller, task), expected)


def test_sokd_without_its_parts_is_fitnet(task: train.Task) -> None:
    parts = {"base": "replace", "policy": None, "dam": None, "search": None}
    bare = built(task, sokd={**parts, "lambda_areas": 2.5})
    fitnet = built(task, method={"fitnet": 2.5})
    fitnet.student.load_state_dict(bare.student.state_dict())
    assert bare.kd is not None and fitnet.adapters is not None
    fitnet.adapters[0].load_state_dict(bare.kd.adapter.state_dict())
    torch.testing.assert_close(objective(bare, task), objective(fitnet, task))


def test_a_recorded_teacher_has_the_outputs_of_the_teacher(task: train.Task) -> None:
    recorded, images = networks.Recorded(task.teacher, task.outputs), task.data.train[0][5:9]
    called = recorded(images)
    recorded.rows = torch.arange(5, 9)
    for one, other in zip(called, recorded(images), strict=True):
        torch.testing.assert_close(one, other)


def test_all_methods_start_from_the_same_student_and_batches(task: train.Task) -> None:
    """With a weight of 0 the distilled student is the student alone, bit for bit."""
    alone, with_kd = run_of("student", task, 5), run_of("kd", task, 5, method={"kd": 0.0})
    assert state_of(alone) == state_of(with_kd)


@pytest.mark.parametrize("name", train.METHODS)
def test_every_method_trains(name: str, runs: dict[str, train.Run]) -> None:
    run = runs[name]
    assert len(run.validation) == SOLVER.epochs
    assert {run.best_epoch, SOLVER.epochs - 1} <= run.test.keys()
    assert run.test[SOLVER.epochs - 1] > 0.4  # chance is a third
    assert all(math.isfinite(note) for note in run.notes.values())
    assert bool(run.policy) == (name in ("fitnet-dafa", "sokd"))
    assert run.notes.get("weight") == {"kd": 0.2, "fitnet": 2.0}.get(name)


@pytest.mark.parametrize("name", ["fitnet-dafa", "sokd"])
def test_the_search_moves_the_policy(name: str, runs: dict[str, train.Run]) -> None:
    first, last = runs[name].policy[0], runs[name].policy[-1]
    assert last.step > first.step
    assert last.probabilities != [1 / 36] * 36
    assert abs(sum(last.probabilities) - 1) < 1e-5


def test_runs_repeat_bit_for_bit(task: train.Task, runs: dict[str, train.Run]) -> None:
    again = run_of("sokd", task)
    assert again.validation == runs["sokd"].validation
    assert state_of(again) == state_of(runs["sokd"])


def test_the_test_part_can_be_left_alone(task: train.Task) -> None:
    assert train.train(train.Run("kd", train.METHODS["kd"], 0), task, test=False).test == {}


# --- table, pictures, command line
def finished(name: str, seed: int, test: list[float], validation: list[float]) -> train.Run:
    run = train.Run(name, train.METHODS[name], seed, validation, dict(enumerate(test)))
    run.seconds = 2.0
    return run


def test_the_table_has_the_last_and_the_best_epoch() -> None:
    # the best epoch is the one that validation picks (0.7, the second), not the best tested (0.9)
    made = [
        finished("kd", 0, [0.9, 0.6, 0.5], [0.1, 0.7, 0.7]),
        finished("kd", 1, [0.1, 0.8, 0.7], [0.1, 0.7, 0.2]),
    ]
    (cells,) = demo.table([demo.figures(run) for run in made])
    assert cells == ("kd", "60.00 ± 14.14", "70.00 ± 14.14", "2", "2.0")


def test_a_single_run_has_no_deviation() -> None:
    (cells,) = demo.table([demo.figures(finished("kd", 0, [0.5], [0.5]))])
    assert cells[1:3] == ("50.00", "50.00")


def test_pictures_are_written(task: train.Task, runs: dict[str, train.Run], tmp_path: Path) -> None:
    demo.draw([runs["student"], runs["kd"]], task, tmp_path)
    assert not list(tmp_path.iterdir()), "these have neither a policy nor a DAM"
    demo.draw([runs["sokd"]], task, tmp_path)
    for name in ("policy_over_time.png", "areas.png"):
        picture = (tmp_path / name).read_bytes()
        assert picture.startswith(b"\x89PNG") and len(picture) > 10_000


def test_a_runs_state_gives_its_accuracy(task: train.Task, runs: dict[str, train.Run]) -> None:
    distiller = train.build(runs["sokd"], task)
    distiller.load_state_dict(runs["sokd"].state)
    last = runs["sokd"].test[SOLVER.epochs - 1]
    assert networks.accuracy(distiller.student, task.data.test) == last


def test_the_whole_demo_in_one_and_in_two_processes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = argparse.Namespace(
        method=["student", "kd"], seeds=1, epochs=1, teacher="tiny", teacher_epochs=1,
        student="tiny", workers=2, save=tmp_path,
    )  # fmt: skip
    first = demo.demo(synthetic(), options)
    assert "teacher, epoch 1" in capsys.readouterr().out
    options.workers = 1
    second = demo.demo(synthetic(), options)
    printed = capsys.readouterr().out
    assert "teacher, epoch" not in printed, "the teacher of the first is loaded"
    assert [run.test for run in first] == [run.test for run in second]
    rows = list(csv.DictReader((tmp_path / "runs.csv").read_text().splitlines()))
    assert [row["method"] for row in rows] == ["student", "kd"]
    assert all(f"{100 * float(row['last_test']):.2f}" in printed for row in rows)


def test_help_names_every_option(tmp_path: Path) -> None:
    """From any folder: the demo is in the package."""
    command = [sys.executable, "-m", "sokd.demo", "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    for option in ("seeds", "epochs", "teacher", "student", "method", "save", "workers"):
        assert f"--{option}" in done.stdout
