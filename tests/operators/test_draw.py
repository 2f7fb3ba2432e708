"""ops.draw: the same bits as the twin and as Python's integers; no other state changes."""

import random

import numpy as np
import pytest
import torch
from support import naive

from sokd import ops, reference

hypothesis = pytest.importorskip("hypothesis", reason="needs hypothesis")
given, st = hypothesis.given, hypothesis.strategies

INT64 = st.integers(-(2**63), 2**63 - 1)


@pytest.mark.parametrize("n", [0, 1, 3, 4, 5, 100])
def test_values(n):
    for seed, counter in [(0, 0), (5, 7), (-3, 2**40), (2**62, -1)]:
        tensors = torch.tensor([seed]), torch.tensor([counter])
        uniforms, noise_seed = ops.draw(*tensors, n)
        assert uniforms.shape == (n,) and uniforms.dtype == torch.float32
        assert noise_seed.shape == (1,) and noise_seed.dtype == torch.int64
        assert (uniforms.tolist(), noise_seed.item()) == naive.draw(seed, counter, n)
        twin = reference.draw(*tensors, n)
        assert torch.equal(uniforms, twin[0]) and torch.equal(noise_seed, twin[1])
        assert [each.item() for each in tensors] == [seed, counter]


@given(INT64, INT64, st.integers(0, 70))
def test_any_case(seed, counter, n):
    uniforms, noise_seed = ops.draw(torch.tensor([seed]), torch.tensor([counter]), n)
    twin = reference.draw(torch.tensor([seed]), torch.tensor([counter]), n)
    assert torch.equal(uniforms, twin[0]) and torch.equal(noise_seed, twin[1])
    assert ((uniforms > 0) & (uniforms < 1)).all()


def test_each_counter_draws_anew():
    seed = torch.tensor([3])
    rows = [ops.draw(seed, torch.tensor([counter]), 4) for counter in range(100)]
    assert len({tuple(uniforms.tolist()) for uniforms, _ in rows}) == 100
    assert len({noise_seed.item() for _, noise_seed in rows}) == 100


def test_no_generator_is_touched():
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    uniforms, noise_seed = ops.draw(torch.tensor([1]), torch.tensor([2]), 10)
    ops.refine(torch.zeros(1, 2, 3, 3), sigma=uniforms[:1], seed=noise_seed)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate() and before[2] == np.random.get_state()[1].tolist()
