"""The policy search from its first step to its last: resumption, planted problems, two ranks."""

import copy
import io
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.cases import compiles
from support.kd_cases import trained
from support.ranks import of_ranks
from test_search import PAIRS, SHAPE, Student, batch_of, hypergradient, made, same, step
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sokd.kd.policy import Policy
from sokd.kd.search import PolicySearch

# --------------------------------------------------------------------------------- life of a search


@pytest.mark.parametrize("estimator", ["gumbel", "relax"])
def test_resumes_to_the_bit(estimator: str) -> None:
    student, kd, search = made(estimator=estimator)
    for seed in range(2):
        search.step(step, batch_of(seed))
    search.end_epoch()
    file = io.BytesIO()
    torch.save(
        {"search": search.state_dict(), "kd": kd.state_dict(), "student": student.state_dict()},
        file,
    )
    saved = torch.load(io.BytesIO(file.getvalue()))
    torch.manual_seed(99)
    student2, kd2 = (
        Student(),
        trained(3, 4, heat_channels=3, policies=PAIRS, lambda_agreement=1.0, lambda_areas=1.0),
    )
    search2 = PolicySearch(kd2, student2, lr=0.01, estimator=estimator)
    student2.load_state_dict(saved["student"])
    kd2.load_state_dict(saved["kd"])
    search2.load_state_dict(saved["search"])
    assert search2.epoch == 1
    for seed in range(2, 5):
        states = []
        for one in (search, search2):
            torch.manual_seed(seed)  # the dropout's
            upper = one.step(step, batch_of(seed))
            states.append([upper, one.state_dict(), one.policy.state_dict()])
        assert same(*states)


def test_a_state_brings_its_step_sizes_but_not_its_end() -> None:
    """lr is loaded, as by torch.optim; `epochs` is not: a search may be prolonged."""
    search = made(lr=0.5, unroll=0.5, epochs=40)[2]
    search.load_state_dict(made(lr=0.01, unroll=0.1, epochs=20)[2].state_dict())
    assert search.state_dict()["adam"]["param_groups"][0]["lr"] == 0.01
    assert (search.unroll, search.epochs) == (0.1, 40)


def test_ends_after_its_epochs() -> None:
    _, kd, search = made(epochs=2)
    for _ in range(2):
        assert search.active and search.step(step, batch_of()) is not None
        search.end_epoch()
    chi = copy.deepcopy(kd.policy.state_dict())
    assert not search.active
    assert search.step(lambda *_: pytest.fail("called after the end"), batch_of()) is None
    assert same(chi, kd.policy.state_dict())


def test_sets_the_policy_up() -> None:
    _, kd, _ = made(estimator="relax")
    assert kd.policy.estimator == "relax"
    assert PolicySearch(kd, Student())._control is not None
    assert kd.policy.estimator == "relax", "kd's own"
    assert PolicySearch(kd, Student(), estimator="gumbel")._control is None
    assert kd.policy.estimator == "gumbel"
    assert made()[1].policy.estimator == "gumbel", "that of kd.policy"
    adam = PolicySearch(kd, Student()).state_dict()["adam"]["param_groups"][0]
    assert (adam["lr"], adam["betas"], adam["weight_decay"]) == (5e-3, (0.5, 0.999), 0)


def test_chi_stays_in_its_bounds() -> None:
    _, kd, search = made(lr=0.5)
    for seed in range(3):
        search.step(step, batch_of(seed))
    assert torch.equal(kd.policy.beta, kd.policy.beta.clamp(0.01, 0.99))
    assert torch.equal(kd.policy.magnitude, kd.policy.magnitude.clamp(0, 1))


@pytest.mark.parametrize("estimator", ["gumbel", "relax"])
def test_samples_with_their_own_draws_and_a_smaller_held_out_batch(estimator: str) -> None:
    torch.manual_seed(0)
    student = Student()
    kd = trained(3, 4, heat_channels=3, policies=PAIRS, granularity="sample")
    search = PolicySearch(kd, student, estimator=estimator)
    small = tuple(part[:2] for part in batch_of(2))
    assert search.step(step, batch_of(1), held_out=small).isfinite()


@pytest.mark.parametrize("estimator", ["gumbel", "relax"])
@pytest.mark.parametrize("order", [1, 2])
def test_an_empty_batch_moves_nothing(order: int, estimator: str) -> None:
    student, kd = (
        Student(),
        trained(3, 4, heat_channels=3, policies=PAIRS, granularity="sample"),
    )
    search = PolicySearch(kd, student, estimator=estimator, order=order)

    def summed(model: Student, batch: Any) -> Any:
        logits, features = model(batch[0])
        return F.cross_entropy(logits, batch[1], reduction="sum"), features, batch[2]

    chi = copy.deepcopy(list(kd.policy.parameters()))
    assert search.step(summed, tuple(part[:0] for part in batch_of())) == 0
    assert all(map(torch.equal, chi, kd.policy.parameters()))


def kept(search: PolicySearch) -> dict[str, Any]:
    """The learned state of a search, without the position of its stream of draws."""
    state = {name: value for name, value in search.state_dict().items() if name != "counter"}
    return copy.deepcopy(state | {"policy": search.policy.state_dict()})


@pytest.mark.filterwarnings("ignore:PolicySearch")
@pytest.mark.parametrize(
    "factor", [float("inf"), float("nan"), 1e15], ids=["inf", "nan", "too-large"]
)
@pytest.mark.parametrize("estimator", ["gumbel", "relax"])
def test_a_batch_that_is_not_finite_is_left_out(estimator: str, factor: float) -> None:
    _, _, search = made(estimator=estimator)

    def bad(model: Student, batch: Any) -> Any:
        task, f_s, f_t = step(model, batch)
        return task, f_s, f_t * factor

    search.step(step, batch_of())
    before = kept(search)
    search.step(bad, batch_of())
    assert same(before, kept(search)) and search.counter.item() == 2, "only the stream advances"
    search.step(step, batch_of(1))
    assert not same(before, kept(search))
    assert all(parameter.isfinite().all() for parameter in search.policy.parameters())
    # the very first step: the next one finds what a search does that starts there
    _, _, fresh = made(estimator=estimator)
    _, _, late = made(estimator=estimator)
    fresh.step(bad, batch_of())
    late.counter += 1
    for one in (fresh, late):
        one.step(step, batch_of(1))
    assert same(fresh.state_dict(), late.state_dict()) and same(kept(fresh), kept(late))


@pytest.mark.parametrize("estimator", ["gumbel", "relax"])
def test_the_teachers_features_may_come_from_inference_mode(estimator: str) -> None:
    _, kd, search = made(estimator=estimator)
    _, twin, plain = made(estimator=estimator)
    images, labels, teacher = batch_of()
    with torch.inference_mode():
        inferred = teacher.clone()
    for one, features in ((search, inferred), (plain, teacher)):
        torch.manual_seed(1)  # the dropout's
        one.step(step, (images, labels, features))
    assert same(kd.policy.state_dict(), twin.policy.state_dict())


def test_a_step_left_out_is_said_once() -> None:
    _, _, search = made()
    images, labels, teacher = batch_of()
    with pytest.warns(UserWarning) as caught:
        for _ in range(2):
            search.step(step, (images, labels, teacher * float("nan")))
    text = (
        "PolicySearch: a step's hypergradient was not finite, and the policy stayed as it was; "
        "look for inf or NaN in the batch, the features and the losses"
    )
    assert [str(warning.message) for warning in caught] == [text] and caught[0].filename == __file__


def test_several_layers() -> None:
    student = Student()
    kd = trained([3, 3], [4, 6], heat_channels=3, policies=PAIRS)
    search = PolicySearch(kd, student)

    def two_layers(model: Student, batch: Any) -> Any:
        task, f_s, f_t = step(model, batch)
        return task, [f_s, f_s], [f_t, torch.cat([f_t, f_t[:, :2]], 1)]

    before = kd.policy.alpha.detach().clone()
    assert search.step(two_layers, batch_of()).isfinite()
    assert not torch.equal(before, kd.policy.alpha)


@pytest.mark.parametrize("estimator", ["gumbel", "relax"])
def test_a_step_reads_no_value(estimator: str) -> None:
    """Fake tensors have no values: a synchronisation raises."""
    with FakeTensorMode() as mode:
        student, kd = Student(), trained(3, 4, heat_channels=3, policies=PAIRS)
        search = PolicySearch(kd, student, estimator=estimator)
        batch = (torch.randn(3, 2, 6, 5), torch.randint(5, (3,)), torch.randn(SHAPE))
        assert mode is search.step(step, batch).fake_mode


def test_under_autocast() -> None:
    _, kd, search = made()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert search.step(step, batch_of()).isfinite()
    assert all(parameter.isfinite().all() for parameter in kd.policy.parameters())


@compiles
def test_inside_no_grad_and_with_wrapped_modules() -> None:
    student, kd, _ = made()
    search = PolicySearch(torch.compile(kd), nn.DataParallel(torch.compile(student)))
    assert search.student is student and search.kd is kd
    with torch.no_grad():
        assert search.step(step, batch_of()).isfinite()


# ------------------------------------------------------------------------------------------ planted
def shifted(cells: int, model: nn.Module, _: Any) -> tuple[Tensor, Tensor, Tensor]:
    """A step whose student's map is the teacher's, moved left."""
    kernel = torch.ones(4, 1, 3, 3) / 3
    teacher = F.conv2d(torch.randn(8, 4, 8, 8), kernel, padding=1, groups=4)
    seen = torch.cat([teacher[..., cells:], torch.zeros(8, 4, 8, cells)], 3)
    return model.weight.sum() * 0, seen, teacher


@pytest.mark.parametrize(
    ("estimator", "steps", "lr"), [("gumbel", 120, 0.05), ("relax", 250, 0.015)]
)
def test_finds_the_planted_operation(estimator: str, steps: int, lr: float) -> None:
    """The student's input is shifted by a quarter of the width: translate_x must win."""
    torch.set_num_threads(1)  # hundreds of steps too small for a second thread
    torch.manual_seed(1)
    policies = [
        ("translate_x", "rotate"),
        ("translate_y", "rotate"),
        ("rotate", "cutout"),
        ("shear_x", "rotate"),
    ]
    # straight-through magnitudes drift on noise where choices are all that matters
    options = {"policies": policies, "magnitude_gradient": "pathwise"}
    kd = trained(4, 4, adapter=None, dam=None, lambda_areas=1.0, **options)
    with torch.no_grad():
        kd.policy.magnitude.fill_(0.5)  # what has both signs does nothing
        kd.policy.magnitude[:2, 0] = 0.5 + 0.25 / 0.9  # by a quarter of the side
        kd.policy.magnitude[2:] = 0.9
    student = nn.Conv2d(1, 1, 1)  # its weights play no part
    search = PolicySearch(kd, student, estimator=estimator, order=1, lr=lr)
    for seed in range(steps):
        torch.manual_seed(seed)
        search.step(partial(shifted, 2), None)
    rows = kd.policy.table()
    chances = [row["probability"] for row in rows]
    assert chances[0] > 0.6, rows
    if estimator == "gumbel":  # RELAX's noisier gates need longer than a test has
        assert rows[0]["beta"][0] > 0.7, rows


def test_finds_the_planted_magnitude() -> None:
    torch.set_num_threads(1)  # hundreds of steps too small for a second thread
    torch.manual_seed(1)
    policy = Policy(policies=[("translate_x", "translate_y")], magnitude_gradient="pathwise")
    kd = trained(4, 4, adapter=None, dam=None, policy=policy, lambda_areas=1.0)
    search = PolicySearch(kd, nn.Conv2d(1, 1, 1), order=1, lr=0.02)
    for seed in range(120):
        torch.manual_seed(seed)
        search.step(partial(shifted, 1), None)
    (x, y), (beta_x, _) = policy.table()[0]["value"], policy.table()[0]["beta"]
    assert x == pytest.approx(1 / 8, abs=0.03) and y == pytest.approx(0, abs=0.06)
    assert beta_x > 0.8


# ------------------------------------------------------------------------------------ two processes
def one_rank(rank: int) -> dict[str, Any]:
    """A search on this rank's own batch, the student wrapped: the policy's state."""
    torch.manual_seed(rank)  # seeds and weights differ at first
    kd = trained(3, 4, heat_channels=3, policies=PAIRS)
    student = nn.parallel.DistributedDataParallel(Student())
    search = PolicySearch(kd, student, estimator="relax")  # the control variate is averaged too
    for seed in range(2):
        search.step(step, batch_of(10 * rank + seed))
    alike = made()[2]  # the same on both ranks: the average is what one process finds
    alike.step(step, batch_of())
    state = {"kd": kd.policy.state_dict(), "search": search.state_dict()}
    return state | {"alike": hypergradient(alike)}


@pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this torch has no torch.distributed"
)
def test_ranks_keep_one_policy(tmp_path: Any) -> None:
    states = of_ranks(one_rank, tmp_path)
    for name in ("alpha", "beta", "magnitude"):
        assert torch.equal(*(state["kd"][name] for state in states))
    assert same(states[0]["search"], states[1]["search"])
    assert not torch.equal(states[0]["kd"]["alpha"], torch.zeros(len(PAIRS)))
    alone = made()[2]
    alone.step(step, batch_of())
    for state in states:
        torch.testing.assert_close(state["alike"], hypergradient(alone))
