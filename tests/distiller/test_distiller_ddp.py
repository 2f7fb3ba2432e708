"""Two processes (gloo, CPU) against one with the whole batch: gradients, draws, the search.

The student has no BatchNorm and the adapters are 1x1 convolutions: a BatchNorm normalises with its
own rank's half of the batch, in DistributedDataParallel as anywhere, so with one the two could not
agree. Noise is left out of
the policy for the same reason: it is drawn by a sample's place in its rank's batch.
"""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.distiller_cases import SMALL, batch, gradients, make, models, objective, rewound
from support.ranks import RANKS, of_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import sokd
from sokd.distiller import Distiller

SAMPLES = 4
OPTIONS = [
    {"static_graph": True},
    {"find_unused_parameters": True},
    {"gradient_as_bucket_view": True, "static_graph": True},
]
QUIET = [("rotate", "cutout"), ("shear_x", "channel_drop"), ("translate_y", "channel_shuffle")]

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo"
)


def distiller() -> Distiller:
    torch.manual_seed(0)
    adapters = nn.ModuleList([nn.Conv2d(6, 12, 1), nn.Conv2d(12, 24, 1)])
    return make(models=models(norm=False), sokd={**SMALL, "adapter": adapters, "policies": QUIET})


def searched(subject: Distiller, x: Tensor, y: Tensor) -> list[Tensor]:
    """The policy after two steps of its search."""
    torch.manual_seed(3)  # of the search's own stream
    search = sokd.PolicySearch(subject.kd, subject.student, lr=0.05)
    for _ in range(2):
        search.step(subject.step, (x, y))
    return chi(subject)


def chi(subject: Distiller) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in subject.kd.policy.parameters()]


def one_process() -> dict[str, Any]:
    """What two ranks together are to get."""
    subject, (x, y) = distiller(), batch(SAMPLES)
    objective(subject, x, y).backward()
    return {"gradients": gradients(subject), "chi": searched(subject, x, y)}


def _work(rank: int) -> dict[str, Any]:
    subject = distiller()
    if rank:  # a rank that was seeded otherwise, as they often are
        subject.kd.policy.seed.fill_(99)
        subject.kd.policy.alpha.data.fill_(1.0)
    x, y = (part.chunk(RANKS)[rank] for part in batch(SAMPLES))
    # without DistributedDataParallel's own broadcasts: the agreement is the Distiller's
    wrapped = DistributedDataParallel(subject, broadcast_buffers=False)
    seeds, draws = [], []
    for step in range(3):
        wrapped.zero_grad()
        objective(wrapped, x, y).backward()
        if step == 0:
            found = {"gradients": gradients(subject)}
        policy = subject.kd.policy
        seeds.append((int(policy.seed), int(policy.counter)))
        draws.append(policy.draw_at(policy.seed, policy.counter, len(x)).uniforms)
    found |= {"seeds": seeds, "draws": torch.cat(draws), "chi": searched(subject, x, y)}
    found |= {"online": _online(rank, x, y)}
    found |= {"inside": _wrapped_inside(), "logits only": _logits_only(x, y)}
    found |= {
        "options": [_parallel(x, y, **options) for options in OPTIONS],
        "sharded": _sharded(x, y),
    }
    return found | {"crd": contrasted(rank, RANKS), "crd by name": _crd_by_name(rank)}


def _parallel(x: Tensor, y: Tensor, **options: Any) -> dict[str, Tensor]:
    """The second step's gradients under options of DistributedDataParallel, with an EMA.

    In the second step a static graph is known.
    """
    subject = distiller()
    wrapped = DistributedDataParallel(subject, **options)
    average = torch.optim.swa_utils.AveragedModel(wrapped)
    for _ in range(2):
        wrapped.zero_grad()
        rewound(subject)
        objective(wrapped, x, y).backward()
    average.update_parameters(wrapped)
    return gradients(subject)


def _online(rank: int, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Three losses with a search in them, of which the first rank alone has a former state."""
    own = {**SMALL, "search": "online", "policies": QUIET}
    subject = make(models=models(norm=False), sokd=own)
    subject.kd.search.calls.fill_(0 if rank else 3)
    subject.kd.policy.alpha.data.fill_(0.0 if rank else 1.0)
    wrapped = DistributedDataParallel(subject, broadcast_buffers=False)
    for _ in range(3):
        objective(wrapped, x, y).backward()
    named = [*subject.kd.policy.named_parameters(), *subject.kd.search.named_buffers()]
    return {name: each.detach().clone() for name, each in named}


def _sharded(x: Tensor, y: Tensor) -> dict[str, Any]:
    """FSDP: the whole Distiller but the policy; a student that is sharded alone is refused."""
    mesh, subject = init_device_mesh("cpu", (RANKS,)), distiller()
    fully_shard(subject, mesh=mesh, ignored_params=set(subject.kd.policy.parameters()))
    objective(subject, x, y).backward()
    found = {"gradients": {n: p.grad.full_tensor() for n, p in subject.named_parameters()}}
    alone = distiller()
    fully_shard(alone.student, mesh=mesh)
    for name, act in {
        "alone": lambda: objective(alone, x, y),
        "search": lambda: sokd.PolicySearch(subject.kd, subject.student).step(subject.step, (x, y)),
    }.items():
        try:
            act()
        except (ValueError, NotImplementedError) as error:
            found[name] = str(error)
    return found


def _wrapped_inside() -> str:
    teacher, student = models(norm=False)
    options = {"layers": "stage1", "sokd": SMALL, "example": batch()[0]}
    subject = Distiller(DistributedDataParallel(student), teacher, **options)
    try:
        objective(subject)
    except ValueError as error:
        return str(error)
    return "no error"


def contrasted(rank: int, ranks: int) -> dict[str, Any]:
    """Three batches of CRD with given negatives, this rank's share of each, and its state after.

    Of a fourth batch one rank has all samples.
    """
    torch.manual_seed(1)
    loss = sokd.methods.crd(3, 4, 12, dim=6, negatives=5)
    wrapped = DistributedDataParallel(loss) if ranks > 1 else loss
    found = []
    for step in range(4):
        students, teachers, others = (
            torch.randn(4, 3),
            torch.randn(4, 4),
            torch.randint(0, 12, (4, 5)),
        )
        whole = (students, teachers, torch.tensor([1, 7, 4 + step, 0]), others)
        loss.zero_grad()
        own = [part[: 0 if rank else 4] if step == 3 else part.chunk(ranks)[rank] for part in whole]
        wrapped(*own).backward()
        found.append([parameter.grad.clone() for parameter in loss.parameters()])
    return {"gradients": found, "state": dict(loss.state_dict())}


def _crd_by_name(rank: int) -> dict[str, Tensor]:
    """A Distiller with CRD whose ranks have two samples each, then one and two."""
    subject = make(
        models=models(norm=False), layers="stage2", method="crd", sokd=False, num_samples=11,
        negatives=4,
    )  # fmt: skip
    wrapped = DistributedDataParallel(subject)
    x, y = (part.chunk(RANKS)[rank] for part in batch(SAMPLES))
    index = torch.arange(SAMPLES).chunk(RANKS)[rank]
    before = subject.methods["crd"].loss.student_bank.clone()
    objective(wrapped, x, y, index=index).backward()
    least = 1 + rank
    objective(wrapped, x[:least], y[:least], index=index[:least] + 6).backward()
    crd = subject.methods["crd"].loss
    changed = (crd.student_bank != before).any(1)
    others = crd.negatives.eval()(torch.tensor([0, 1]))
    return {
        "bank": crd.student_bank, "changed": changed, "z": crd.log_normaliser, "negatives": others,
    }  # fmt: skip


def _logits_only(x: Tensor, y: Tensor) -> list[Tensor]:
    """A student wrapped inside is right where nothing else is trained, and its layers are found."""
    teacher, student = models(norm=False)
    subject = make(
        models=(teacher, DistributedDataParallel(student)),
        method={"sp": 0.0, "kd": 1.0},
        sokd=False,
    )
    objective(subject, x, y).backward()
    return [parameter.grad for parameter in student.parameters()]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return of_ranks(_work, tmp_path_factory.mktemp("ranks"))


def check_whole(of_ranks: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """That every rank has the gradients of one process with the whole batch, which are returned."""
    expected = one_process()["gradients"]
    for found in of_ranks:
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)
    return expected


def test_gradients_are_those_of_the_whole_batch(ranks):
    expected = check_whole([found["gradients"] for found in ranks])
    assert sum(gradient.abs().sum() > 0 for gradient in expected.values()) > 15


@pytest.mark.parametrize("place", range(len(OPTIONS)), ids=[", ".join(each) for each in OPTIONS])
def test_the_wrappers_own_options(ranks, place):
    check_whole([found["options"][place] for found in ranks])


def test_sharded_by_fsdp(ranks):
    check_whole([found["sharded"]["gradients"] for found in ranks])
    assert ranks[0]["sharded"]["alone"] == (
        "Distiller: student must be sharded together with the adapters and heads, whose 20 "
        "parameters would not be averaged over the ranks: fully_shard(distiller, "
        "ignored_params=set(distiller.kd.policy.parameters())), got a student sharded alone"
    )
    assert ranks[0]["sharded"]["search"] == (
        "PolicySearch: student must hold whole parameters (virtual weights are not sharded; "
        "use DistributedDataParallel), got parameters of fully_shard"
    )


def test_every_rank_draws_the_same(ranks):
    one, other = ranks
    assert one["seeds"] == other["seeds"]
    assert [counter for _, counter in one["seeds"]] == [1, 2, 3]
    assert torch.equal(one["draws"], other["draws"])


def test_the_search_moves_one_policy(ranks):
    one, other = (found["chi"] for found in ranks)
    assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))
    start = chi(distiller())
    assert all(not torch.equal(*pair) for pair in zip(one, start, strict=True))
    # rank 1's own seed is replaced
    for found, expected in zip(one, one_process()["chi"], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


def test_the_search_in_the_loss_moves_one_policy(ranks):
    one, other = (found["online"] for found in ranks)
    for name, value in one.items():
        assert torch.equal(value, other[name]), name
    assert int(one["calls"]) == 6 and int(one["steps"]) == 1
    assert 0 < (one["alpha"] - 1).abs().max() < 0.1


def test_a_student_wrapped_inside(ranks):
    start = "Distiller: student must be wrapped together with the adapters and heads, whose "
    assert ranks[0]["inside"].startswith(start)
    one, other = (found["logits only"] for found in ranks)
    assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))


def test_crd_keeps_one_memory(ranks):
    """Banks and Z as with the whole batch in one process, and gradients once Z is everyone's."""
    whole = contrasted(0, 1)
    for found in ranks:
        for name, value in whole["state"].items():
            if not name.startswith("negatives."):  # given: none were drawn
                torch.testing.assert_close(found["crd"]["state"][name], value)
        for step in (1, 2):
            for pair in zip(found["crd"]["gradients"][step], whole["gradients"][step], strict=True):
                torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-6)


def test_crd_by_name_remembers_every_ranks_samples(ranks):
    one, other = (found["crd by name"] for found in ranks)
    assert torch.equal(one["bank"], other["bank"]) and torch.equal(one["z"], other["z"])
    assert one["changed"].nonzero().flatten().tolist() == [0, 1, 2, 3, 6, 8, 9]
    assert not torch.equal(one["negatives"], other["negatives"]), "each rank draws its own"
