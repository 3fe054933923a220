"""Draws follow the distribution that the parameters describe."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from kvferry.engine.sampling import SamplingParams, sample

LOGITS = torch.tensor([0.1, 0.6, 0.2, 0.05, 0.05]).log()


def draws(count: int = 4000, **values: float) -> Counter[int]:
    params = SamplingParams(**values)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(3)
    return Counter(sample(LOGITS, params, generator) for _ in range(count))


def test_zero_temperature_takes_the_likeliest() -> None:
    assert set(draws(50)) == {1}


def test_temperature_one_draws_the_model_s_own_distribution() -> None:
    counts = draws(temperature=1.0)
    for token, probability in enumerate((0.1, 0.6, 0.2, 0.05, 0.05)):
        assert abs(counts[token] / 4000 - probability) < 0.03


def test_top_k_keeps_the_k_likeliest() -> None:
    assert set(draws(temperature=5.0, top_k=2)) == {1, 2}
    assert set(draws(temperature=5.0, top_k=99)) == set(range(5))


def test_top_p_keeps_the_fewest_that_reach_it() -> None:
    assert set(draws(temperature=1.0, top_p=0.5)) == {1}
    assert set(draws(temperature=1.0, top_p=0.7)) == {1, 2}
    assert set(draws(temperature=1.0, top_p=0.85)) == {0, 1, 2}


@pytest.mark.parametrize("values", [{"temperature": 1e-320}, {"temperature": 1e-40}, {"temperature": 1e-6}])
def test_the_smallest_temperatures_take_the_likeliest(values: dict[str, float]) -> None:
    assert set(draws(20, **values)) == {1}


def test_the_largest_temperature_draws_evenly() -> None:
    counts = draws(temperature=1e308)
    assert all(abs(counts[token] / 4000 - 0.2) < 0.03 for token in range(5))


def test_the_smallest_top_p_takes_the_likeliest() -> None:
    assert set(draws(20, temperature=1.0, top_p=1e-300)) == {1}
