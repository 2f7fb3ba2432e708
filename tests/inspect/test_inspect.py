"""`sokd.inspect`: its results, and that it changes nothing."""

import copy
import json
import math
import subprocess
import sys

import pytest
import torch
from support.distiller_cases import SMALL, batch, make, objective
from support.raises import raises
from torch import nn

import sokd
from sokd import inspect


def moved(distiller, value=2.0):
    """A Distiller whose policy prefers its second sub-policy."""
    with torch.no_grad():
        distiller.kd.policy.alpha[1] = value
    return distiller


# --------------------------------------------------------------------------------------- the policy
def test_the_table_is_sorted_and_named():
    distiller = moved(make())
    lines = inspect.table(distiller).splitlines()
    assert len(lines) == 1 + 36
    assert lines[1].split()[:5] == ["shear", "x", "+", "translate", "x"]
    share = math.exp(2) / (math.exp(2) + 35)
    assert f"{share:.2%}" in lines[1] and "50%   50%" in lines[1] and "of the width" in lines[1]
    assert inspect.table(distiller, top=3) == "\n".join(lines[:4])
    of_kd, of_policy = inspect.table(distiller.kd), inspect.table(distiller.kd.policy)
    assert of_kd == of_policy == inspect.table(distiller)


def test_entropy():
    distiller = make()
    assert inspect.entropy(distiller) == pytest.approx(math.log(36))
    assert inspect.entropy(moved(distiller, 99.0).kd) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("subject", [nn.Identity(), sokd.SoKD(3, 4, policy=None)])
def test_what_has_no_policy(subject):
    text = (
        f"table: subject must be a Policy, or a SoKD or Distiller that has one, got "
        f"{type(subject).__name__}"
    )
    with raises(TypeError, text):
        inspect.table(subject)


def test_a_trajectory_is_the_way_of_the_policy(tmp_path):
    distiller = make()
    trajectory = inspect.Trajectory(distiller, every=2)
    for step in range(5):
        moved(distiller, float(step))
        trajectory.record(step)
    assert [snapshot.step for snapshot in trajectory.snapshots] == [0, 2, 4]
    assert trajectory.entropies[0] == pytest.approx(math.log(36))
    assert trajectory.entropies[-1] == pytest.approx(inspect.entropy(distiller))
    assert sum(trajectory.snapshots[1].probabilities) == pytest.approx(1)

    trajectory.save(tmp_path / "way.json")
    other = inspect.Trajectory(make())
    other.load(tmp_path / "way.json")
    assert other.snapshots == trajectory.snapshots
    few = inspect.Trajectory(sokd.Policy(policies=[("rotate", "noise")]))
    with pytest.raises(
        ValueError,
        match="Trajectory: path must hold the sub-policies of this policy, got 36 others",
    ):
        few.load(tmp_path / "way.json")


def test_a_trajectory_of_nothing():
    with pytest.raises(ValueError, match="Trajectory: every must be positive, got 0"):
        inspect.Trajectory(make(), every=0)
    text = "Trajectory: draw must be called after record, got no snapshots"
    with pytest.raises(ValueError, match=text):
        inspect.Trajectory(make()).draw("nowhere.png")


# -------------------------------------------------------------------------------------------- areas
def test_areas_are_dams_own():
    distiller, (x, _) = make(), batch()
    found = inspect.areas(distiller, x)
    students, teachers = distiller.features(x)
    kd = distiller.kd.eval()
    with torch.no_grad():
        adapted = kd.adapter[1](students[1], (4, 4))
        mutual = sokd.ops.areas(*kd.dam[1].maps(adapted), k=2, teacher=kd.dam[1].maps(teachers[1]))
    assert len(found) == 2 and list(found[1]) == ["teacher", "student", "mutual"]
    assert torch.equal(found[1]["mutual"].coverage, mutual.coverage)
    assert inspect.areas(kd, students, teachers)[0]["student"].coverage.shape == (4, 8, 8)


@pytest.mark.parametrize("base", ["keep", "replace"])
def test_areas_of_attention_are_those_of_the_students_own_map(base):
    """AT and attention read no adapted map, so no adapter is needed."""
    parts = {"heads": "attention", "base": base, "k": 3}
    distiller, (x, _) = make(method="at", sokd=parts), batch()
    students, teachers = distiller.features(x)
    assert (distiller.kd.adapter is None) == (base == "replace")
    for index, found in enumerate(inspect.areas(distiller, x)):
        for whose, areas in found.items():
            expected = distiller.kd.dam[index].find(students[index], teachers[index], whose)
            assert torch.equal(areas.boxes, expected.boxes)
    assert inspect.areas(distiller, x)[0]["mutual"].coverage.any()


def test_areas_of_what_wrap_returns():
    wrapped = sokd.wrap(nn.functional.mse_loss, sokd.SoKD(3, 4, **SMALL))
    given = torch.randn(2, 3, 6, 6), torch.randn(2, 4, 6, 6)
    (found,), (expected,) = inspect.areas(wrapped, *given), inspect.areas(wrapped.kd, *given)
    assert all(torch.equal(found[side].boxes, expected[side].boxes) for side in expected)


@pytest.mark.parametrize(
    ("subject", "rule"),
    [(make(), "be the images"), (sokd.SoKD(3, 4), "be the student's and the teacher's features")],
    ids=["distiller", "kd"],
)
def test_areas_of_too_much(subject, rule):
    with raises(TypeError, f"areas: inputs must {rule}, got 3 of them"):
        inspect.areas(subject, *[torch.zeros(1, 3, 16, 16)] * 3)


LOOKS = {
    "table": inspect.table,
    "Trajectory": inspect.Trajectory,
    "areas": lambda subject: inspect.areas(subject, batch()[0]),
}


@pytest.mark.parametrize("look", LOOKS)
def test_a_distiller_that_waits_for_its_shapes(look):
    lazy = make(example=None, layers="auto")
    end = r"got Distiller before its shapes are known \(example= or setup\)$"
    with pytest.raises(TypeError, match=f"^{look}: subject must be .*{end}"):
        LOOKS[look](lazy)
    lazy.setup(batch()[0])
    LOOKS[look](lazy)


def test_looking_changes_nothing():
    distiller, (x, _) = make(), batch()
    objective(distiller)
    before, modes = copy.deepcopy(distiller.state_dict()), [m.training for m in distiller.modules()]
    inspect.areas(distiller, x)
    inspect.table(distiller)
    inspect.export_json(distiller)
    inspect.Trajectory(distiller).record(0)
    assert [m.training for m in distiller.modules()] == modes
    assert all(torch.equal(before[name], value) for name, value in distiller.state_dict().items())


def test_shares_are_of_the_cells():
    distiller = make()
    found = inspect.areas(distiller, batch()[0])[0]
    expected = {name: (each.coverage > 0).float().mean().item() for name, each in found.items()}
    assert inspect.shares(found) == pytest.approx(expected)


@pytest.mark.parametrize(
    "subject", [make(sokd=False, method="at"), make(sokd={"dam": None})], ids=["none", "dam"]
)
def test_areas_without_a_dam(subject):
    text = "areas: subject must be a SoKD or a Distiller with a DAM, got Distiller"
    with raises(TypeError, text):
        inspect.areas(subject, batch()[0])


def test_pictures(tmp_path):
    matplotlib = pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from matplotlib.image import imread

    backend = matplotlib.get_backend()
    distiller, (x, _) = (
        make(sokd={**SMALL, "policies": [("rotate", "noise"), ("shear_x", "cutout")]}),
        batch(),
    )
    trajectory = inspect.Trajectory(distiller)
    for step in range(3):
        moved(distiller, float(step))
        trajectory.record(step)
    trajectory.draw(tmp_path / "way.png", caption=": a test")
    found = inspect.areas(distiller, x)
    inspect.draw_areas(x, found, tmp_path / "areas.png", layer=0, titles=list("abcd"))
    inspect.draw_areas(x[:, :1], found[1], tmp_path / "grey.png")
    for name in ("way", "areas", "grey"):
        picture = imread(tmp_path / f"{name}.png")
        assert picture.shape[0] > 300 and picture[..., :3].std() > 0.05, "something is drawn"
    assert matplotlib.get_backend() == backend
    inspect.draw_areas(x[:2], found, tmp_path / "first.png")


WRONG_PICTURES = {
    "channels":
        ((torch.zeros(2, 2, 16, 16),), {},
         "images must be [B, 3, H, W] or [B, 1, H, W], got [2, 2, 16, 16]"),
    "a list":
        (([torch.zeros(3, 16, 16)],), {}, "images must be [B, 3, H, W] or [B, 1, H, W], got list"),
    "too many": ((torch.zeros(5, 3, 16, 16),), {}, "images must be 1 to 4, as in found, got 5"),
    "no such layer":
        ((torch.zeros(4, 3, 16, 16),), {"layer": 2}, "layer must be one of the 2 in found, got 2"),
    "titles":
        ((torch.zeros(4, 3, 16, 16),), {"titles": ["a"]},
         "titles must be 4, one for each image, got 1"),
}  # fmt: skip


@pytest.mark.parametrize(("images", "options", "text"), WRONG_PICTURES.values(), ids=WRONG_PICTURES)
def test_pictures_that_cannot_be(images, options, text, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    found = inspect.areas(make(), batch()[0])
    with raises(ValueError, f"draw_areas: {text}"):
        inspect.draw_areas(*images, found, tmp_path / "areas.png", **options)


def test_matplotlib_is_not_imported_before_a_picture():
    code = "import sys, sokd.inspect; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --------------------------------------------------------------------------------------- for others
def test_json_holds_all_there_is(tmp_path):
    distiller = make()
    _, losses = distiller(*batch())
    found = inspect.export_json(distiller, tmp_path / "run.json")
    read = json.loads((tmp_path / "run.json").read_text())
    assert read.keys() == found.keys() == {"layers", "weights", "diagnostics", "policy", "entropy"}
    assert read["layers"] == [["stage1", "stage1"], ["stage2", "stage2"]]
    assert read["diagnostics"]["agreement"] == pytest.approx(losses["loss_agreement"].item())
    assert len(read["policy"]) == 36 and read["policy"][0]["operations"] == ["shear_x", "shear_y"]
    assert inspect.export_json(distiller.kd.policy).keys() == {"policy", "entropy"}
    assert "policy" not in inspect.export_json(sokd.SoKD(3, 4, policy=None))
    text = "export_json: subject must be a Policy, a SoKD or a Distiller with one"
    with pytest.raises(TypeError, match=text):
        inspect.export_json(nn.Identity())


def test_json_is_strict(tmp_path):
    """NaN is not valid JSON, and runs that diverged are exported too."""
    distiller = make()
    distiller.kd.statistics.fill_(math.nan)
    found = inspect.export_json(distiller, tmp_path / "run.json")
    assert math.isnan(found["diagnostics"]["agreement"])

    def refused(name):
        raise AssertionError(f"{name} in the file")

    read = json.loads((tmp_path / "run.json").read_text(), parse_constant=refused)
    assert read["diagnostics"]["agreement"] is None and read["diagnostics"]["beta"] == 0.5


class Writer:
    def __init__(self):
        self.seen = {}

    def add_scalar(self, tag, value, step):
        self.seen[tag] = (value, step)


def test_what_can_be_logged():
    distiller, writer = make(), Writer()
    inspect.log(writer, distiller.kd.policy, 3)
    assert writer.seen.keys() == {"sokd/entropy", "sokd/beta", "sokd/magnitude"}
    inspect.log(writer, make(sokd=False, method="at"), 4, losses={"loss_at": 2.0})
    assert writer.seen["sokd/loss_at"] == (2.0, 4)
    with raises(TypeError, "log: subject must be a Policy, a SoKD or a Distiller, got Identity"):
        inspect.log(writer, nn.Identity(), 0)


def test_the_users_own_writer():
    distiller, writer = make(), Writer()
    _, losses = distiller(*batch())
    inspect.log(writer, distiller, 7, losses=losses, prefix="run")
    assert {
        "run/loss_ce",
        "run/loss_fitnet",
        "run/agreement",
        "run/entropy",
        "run/covered_share.1",
    } <= writer.seen.keys()
    value, step = writer.seen["run/loss_ce"]
    assert step == 7 and value == pytest.approx(losses["loss_ce"].item())


def test_tensorboards_writer(tmp_path):
    tensorboard = pytest.importorskip(
        "torch.utils.tensorboard", reason="tensorboard is not installed"
    )
    with tensorboard.SummaryWriter(tmp_path) as writer:
        inspect.log(writer, make(), 0)
    assert any(tmp_path.iterdir())
