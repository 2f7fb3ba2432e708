"""The experiments: equal effort, chosen on the validation part, continued where they ended."""

import csv
import gzip
import importlib.util
import math
import shutil
from pathlib import Path
from types import ModuleType

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.stats import ttest_rel
from support.demo_cases import in_process, small_task, synthetic

import sokd
from examples.experiments import areas, compare, methods, policy, tables, tune
from examples.experiments import data as sources
from sokd.demo.train import METHODS, Run, Solver, Task, build, train
from sokd.kd.options import settled

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


def idx(folder: Path, name: str, values: npt.NDArray[np.uint8]) -> None:
    """A file of the idx format: the number of axes, their lengths, the bytes."""
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    (folder / name).write_bytes(
        gzip.compress(bytes((0, 0, 8, values.ndim)) + sizes + values.tobytes())
    )


def test_fashion_mnist_keeps_its_own_test_part(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name, count in (("train", 22_010), ("t10k", 50)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        images = rng.integers(0, 256, (count, 28, 28), np.uint8)
        images[:, 0, 0] = 25 * labels
        idx(tmp_path, f"{name}-images-idx3-ubyte.gz", images)
        idx(tmp_path, f"{name}-labels-idx1-ubyte.gz", labels)
    made = sources.fashion_mnist(tmp_path)
    assert [len(part[1]) for part in made[1:4]] == [20_000, 2_000, 50]
    assert made.train[1].bincount().tolist() == [2000] * 10
    for images, labels in made[1:4]:
        corner = (images[:, 0, 0, 0] * made.std + made.mean) * 255
        torch.testing.assert_close(corner, 25.0 * labels)


def test_a_scene_holds_the_whole_animal_in_its_box() -> None:
    animals, labels = torch.rand(5, 1, 28, 28) + 2, torch.arange(5)
    (images, targets), boxes = sources.scene((animals, labels), 4, torch.Generator().manual_seed(0))
    assert images.shape == (4, 1, 56, 56) and targets.tolist() == [0, 1, 2, 3]
    for image, animal, (y0, x0, y1, x1) in zip(images, animals, boxes.tolist(), strict=False):
        assert torch.equal(image[0, y0:y1, x0:x1], animal[0])
    assert (images > 2).sum() > 1.2 * 4 * 28 * 28  # the crops of others


@pytest.mark.skipif(not sources.FASHION.exists(), reason="dataset-fashion-mnist is not installed")
def test_the_real_articles() -> None:
    made = sources.fashion_mnist()
    assert [len(part[1]) for part in made[1:4]] == [20_000, 2_000, 10_000]


@pytest.fixture(scope="module")
def longer(tmp_path_factory: pytest.TempPathFactory) -> Task:
    torch.set_num_threads(1)
    solver = Solver(epochs=4, batch=15, lr=0.4)
    return small_task(synthetic(), solver, tmp_path_factory.mktemp("teacher"))


@pytest.mark.parametrize("name", methods.ARMS)
def test_every_arm_trains(name: str, longer: Task) -> None:
    arm = methods.ARMS[name]
    units = {each: methods.balance(each, longer) for each in {arm.method, "fitnet"} - {""}}
    options = methods.arguments(arm, 0.5, units, 120)
    run = train(Run(name, options, 0, search=arm.search), longer)
    assert len(run.validation) == 4 and all(map(math.isfinite, run.notes.values()))
    assert run.test[3] > 0.4  # chance is a third
    assert run.notes.get("weight") == (0.5 * units[arm.method] if arm.method else None)
    has_policy = arm.plug is not None and "policy" not in arm.plug
    has_dam = arm.plug is not None and "dam" not in arm.plug
    assert bool(run.policy) == ("entropy" in run.notes) == has_policy
    assert ("covered_share" in run.notes) == has_dam


def test_every_arm_is_compared_with_one_that_exists() -> None:
    assert {arm.against for arm in methods.ARMS.values()} - {""} <= methods.ARMS.keys()
    assert settled(None, {})["adapter"] == methods.DEFAULT


@pytest.mark.parametrize("name", ["at", "kd"])
def test_balance_makes_both_gradients_equally_long(task: Task, name: str) -> None:
    weight, rows = methods.balance(name, task), torch.arange(60)
    options = methods.arguments(methods.Arm(name, name, ""), 1.0, {name: weight}, 60)
    distiller = build(Run(name, options, 100), task)
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
    assert tune.arguments("fitnet-dam", {"scale": 2.0})["sokd"]["policy"] is None


def test_tuning_uses_validation_alone(
    task: Task, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
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


NAMES = ["kd", "at"]


@pytest.fixture(scope="module")
def finished(task: Task, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs.csv of a comparison of KD and AT on a made-up set, in blocks of two seeds."""
    path = tmp_path_factory.mktemp("compare") / "runs.csv"
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "train_all", in_process)
        compared(task, path, patch)
    return path


def compared(
    task: Task, path: Path, patch: pytest.MonkeyPatch, margin: float = 1e3, teacher: str = "a"
) -> None:
    patch.setattr(compare, "BLOCK", 2)
    patch.setattr(compare, "MOST", 4)
    comparison = compare.Comparison("made-up", task, path, teacher=teacher, arms=NAMES, workers=1)
    comparison.tune()
    comparison.fill(margin)


def test_every_arm_has_as_many_trials(finished: Path) -> None:
    rows = compare.read_rows(finished)
    assert {row["arm"] for row in rows} == {"student", *NAMES}
    for name in ("student", *NAMES):
        tried = compare.rows_of(rows, "made-up", "trial", name)
        wanted = [(share, seed) for share in compare.SHARES for seed in compare.TRIAL_SEEDS]
        assert [(row["share"], row["seed"]) for row in tried] == (wanted if name in NAMES else [])
        table = compare.rows_of(rows, "made-up", "table", name)
        assert [row["seed"] for row in table] == ["0", "1"]


def test_an_undecided_row_gets_more_seeds(
    task: Task, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "train_all", in_process)
    path = tmp_path / "runs.csv"
    shutil.copy(finished, path)
    compared(task, path, monkeypatch, margin=1e-9)
    rows = compare.read_rows(path)
    for name in ("student", *NAMES):
        table = compare.rows_of(rows, "made-up", "table", name)
        assert [row["seed"] for row in table] == ["0", "1", "2", "3"]


def test_on_another_machine_new_runs_get_pairs_of_their_own(
    task: Task, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "train_all", in_process)
    path = tmp_path / "runs.csv"
    lost = [f"made-up,table,{NAMES[0]},{{}},{seed},a," for seed in (0, 1)]
    whole = finished.read_text().splitlines(keepends=True)
    share = compare.chosen(compare.read_rows(finished), "made-up", NAMES[0])
    path.write_text("".join(
        line for line in whole if not any(line.startswith(each.format(share)) for each in lost)
    ))  # fmt: skip
    compared(task, path, monkeypatch, teacher="b")
    new = [row for row in compare.read_rows(path) if row["teacher"] == "b"]
    assert {row["arm"] for row in new} == {NAMES[0], "student"} and len(new) == 4
    rows = compare.read_rows(path)
    assert [compare.difference(rows, "made-up", name).seeds for name in NAMES] == [2, 2]


def test_half_a_pair_of_another_machine_is_no_pair(
    task: Task, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "train_all", in_process)
    path = tmp_path / "runs.csv"
    whole = finished.read_text().splitlines(keepends=True)
    path.write_text("".join(each for each in whole if "table,student,,1," not in each))
    compared(task, path, monkeypatch, teacher="b")
    rows = compare.read_rows(path)
    new = {(row["arm"], row["seed"]) for row in rows if row["teacher"] == "b"}
    assert new == {(arm, "1") for arm in ("student", *NAMES)}
    assert [compare.difference(rows, "made-up", name).seeds for name in NAMES] == [2, 2]


def test_trials_do_not_use_the_test_part(finished: Path) -> None:
    for row in compare.read_rows(finished):
        assert bool(row["last_test"]) == bool(row["best_test"]) == (row["part"] == "table")


def test_the_table_uses_the_best_trial(finished: Path) -> None:
    rows = compare.read_rows(finished)
    for row in (row for row in rows if row["part"] == "table" and row["arm"] != "student"):
        tried: dict[str, list[float]] = {}
        for trial in compare.rows_of(rows, "made-up", "trial", row["arm"]):
            tried.setdefault(trial["share"], []).append(float(trial["last_validation"]))
        assert sum(tried[row["share"]]) == max(map(sum, tried.values()))


def test_of_equal_trials_the_smaller_share_is_chosen() -> None:
    tried = {"dataset": "d", "part": "trial", "arm": "kd", "last_validation": "0.5"}
    rows = [tried | {"share": share} for share in ("2", "0.1", "0.5")]
    assert compare.chosen(rows, "d", "kd") == "0.1" and compare.chosen([], "d", "kd") == ""


def test_an_interrupted_comparison_goes_on(
    task: Task, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "train_all", in_process)
    path = tmp_path / "runs.csv"
    whole = finished.read_text().splitlines()
    path.write_text("\n".join([*whole[:9], *whole[12:14]]) + "\n")
    compared(task, path, monkeypatch)

    def figures(path: Path) -> dict[compare.Key, dict[str, str]]:
        rows = compare.read_rows(path)
        return {compare.key_of(row): {**row, "cpu_seconds": ""} for row in rows}

    assert figures(path) == figures(finished)
    before = path.read_text()
    compared(task, path, monkeypatch)
    assert path.read_text() == before


def test_an_arm_comes_with_the_chain_of_those_it_is_compared_with(
    task: Task, tmp_path: Path
) -> None:
    comparison = compare.Comparison(
        "made-up", task, tmp_path, teacher="a", arms=["fitnet+batch", "kd"], workers=1
    )
    chains = ["fitnet-separable", "fitnet+sokd", "fitnet+batch", "student", "kd"]
    assert comparison.arms == chains


@pytest.mark.parametrize("name", ["animal-mnist", "scenes", "fashion-mnist"])
def test_a_missing_data_set_is_one_line(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    given = ["--dataset", name, "--save", str(tmp_path), "--data", str(tmp_path)]
    assert compare.main(given) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("compare: data: ") and printed.count("\n") == 1
    assert " install " in printed


@pytest.mark.parametrize("script", [compare, tune], ids=["compare", "tune"])
def test_fewer_than_one_worker_is_refused(
    script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        script.main(["--workers", "0"])
    assert "argument --workers: must be 1 or more, got 0" in capsys.readouterr().err


# --- tables


def table_row(arm: str, seed: int, test: float) -> compare.Row:
    return dict.fromkeys(compare.COLUMNS, "") | {
        "dataset": "scenes", "part": "table", "arm": arm, "seed": str(seed),
        "last_test": str(test), "best_test": str(test), "cpu_seconds": "1",
    }  # fmt: skip


def test_the_difference_is_a_paired_t_test() -> None:
    rng = np.random.default_rng(3)
    student, kd = rng.random(12), rng.random(12)
    rows = [table_row("student", seed, value) for seed, value in enumerate(student)]
    rows += [table_row("kd", seed, value) for seed, value in reversed([*enumerate(kd)])]
    found = compare.difference(rows, "scenes", "kd")
    wanted = ttest_rel(100 * kd, 100 * student)
    low, high = wanted.confidence_interval()
    assert found.seeds == 12 and found.p == pytest.approx(wanted.pvalue)
    assert found.mean - found.half_width == pytest.approx(low)
    assert found.mean + found.half_width == pytest.approx(high)
    assert compare.difference(rows[:13], "scenes", "kd").half_width == math.inf


def test_holm() -> None:
    adjusted = tables.holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.9})
    assert adjusted == pytest.approx({"a": 0.04, "c": 0.09, "b": 0.09, "d": 0.9})


@pytest.mark.parametrize(
    ("mean", "half_width", "p", "word"),
    [
        (0.5, 0.2, 0.001, "better"), (-0.5, 0.2, 0.001, "worse"), (-0.1, 0.1, 0.5, "no worse"),
        (0.4, 0.6, 0.5, "no worse"), (-0.2, 0.2, 0.1, "not told apart"),
    ],
)  # fmt: skip
def test_verdicts(mean: float, half_width: float, p: float, word: str) -> None:
    assert tables.verdict(mean, half_width, p, margin=0.3) == word


def test_the_table_of_a_set_has_a_line_for_each_arm_that_ran() -> None:
    rows = [table_row(arm, seed, 0.5 + 0.01 * seed + 0.1 * (arm == "kd"))
            for arm in ("student", "kd") for seed in range(3)]  # fmt: skip
    text = tables.compared(rows, "scenes", {("scenes", "kd"): 0.01}).splitlines()
    assert len(text) == 4
    accuracy = "61.00 ± 1.00"
    cells = (
        "KD",
        "3",
        accuracy,
        accuracy,
        "student alone",
        "+10.00 ± 0.00",
        "3",
        "0.01",
        "better",
        "1.0",
        "1.00",
    )
    assert text[3] == f"| {' | '.join(cells)} |"


def test_the_adapters_are_compared_over_the_pairs_that_all_have() -> None:
    scores = {"linear": 0.1, "regressor": 0.2, "separable": 0.4, "conv": 0.35}
    rows = [table_row(f"fitnet-{kind}", seed, score + 0.01 * seed)
            for kind, score in scores.items() for seed in range(3)]  # fmt: skip
    rows.append(table_row("fitnet-linear", 3, 0.9))
    rows = [row | {"last_validation": row["last_test"], "last_test": "0.5"} for row in rows]
    assert tables.adapters(rows).splitlines()[2:] == [
        "| 1x1 | 30.00 ± 0.00 | 30.00 | 30.0 |",
        "| 1x1 + BN + ReLU | 20.00 ± 0.00 | 20.00 | 20.0 |",
        "| separable | 0 | 0.00 | 0.0 |",
        "| three convolutions | 5.00 ± 0.00 | 5.00 | 5.0 |",
    ]
    assert tables.adapters(rows).startswith("| adapter | scenes, 3 pairs | worst |")


def test_a_row_without_pairs_has_no_difference() -> None:
    rows = [table_row("kd", seed, 0.5) for seed in range(3)] + [table_row("student", 9, 0.5)]
    assert tables.compared(rows, "scenes", {}).splitlines()[-1].split("|")[2:11] == [
        " 3 ", " 50.00 ± 0.00 ", " 50.00 ± 0.00 ", " ", " ", " ", " ", " ", " 1.0 ",
    ]  # fmt: skip


# --- where the areas lie, and where the search takes the policy
def test_the_share_of_a_mask_in_a_box() -> None:
    boxes = torch.tensor([[0, 0, 4, 4], [0, 4, 3, 8]])  # y0 x0 y1 x1, of images of 8 pixels
    coverage = torch.zeros(2, 4, 4)
    coverage[0, 0, 0], coverage[0, 1, 1], coverage[0, 3, 3] = 1, 3, 4
    found = areas.figures(coverage, boxes, 8)
    # 2 x 2 cells each; the second scene has no area, so all of it counts
    assert found == {"share": (0.5 + 0.25) / 2, "covered": (0.5 + 1) / 2, "chance": 0.25}


def test_the_chances_and_the_consistency_of_an_untrained_policy() -> None:
    kd = sokd.SoKD(3, 4)
    chances = policy.fires(kd.policy)
    assert chances["acts"] == pytest.approx(0.75)  # two gates of 0.5
    assert chances["channel_shuffle"] == pytest.approx(8 / 36 / 2)  # in 8 of the 36 pairs
    found = policy.figures(kd, torch.randn(64, 3, 6, 6), torch.randn(64, 4, 6, 6))
    assert found["learned"] == pytest.approx(1, abs=0.1) and 0 < found["energy"] < 1
