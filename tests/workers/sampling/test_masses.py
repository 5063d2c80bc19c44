"""Probability mass in integers, against float64."""

import torch

from eagleray.workers.sampling.masses import MAX_VOCAB, WITHOUT_LIMIT, mass_limits, token_masses
from eagleray.workers.sampling.top_n_sigma import step_scales


def test_masses_are_those_of_exp_in_steps_of_two_to_the_minus_44() -> None:
    """A product in float32 moves the exponent of a token 30 nats away by 2e-6, and the fit by 2.5e-7."""
    distances = torch.cat([torch.linspace(0, 40, 100_001), torch.tensor([1e-30, 62.9 / 1.4427, 1e30])])
    ours = token_masses(5.0 - distances.unsqueeze(0), torch.tensor([[5.0]]))[0].double() * 2.0**-44
    exact = torch.exp((5.0 - distances).double() - 5.0)
    assert bool(((ours - exact).abs() <= 4e-6 * exact + 2.0**-44).all())


def test_a_likelier_token_never_has_less_mass() -> None:
    values = torch.linspace(-50, 0, 300_001).unsqueeze(0)
    masses = token_masses(values, values[:, -1:])
    assert bool((masses.diff() >= 0).all())
    assert int(masses[0, -1]) == 2**44


def test_what_is_masked_has_no_mass() -> None:
    values = torch.tensor([[1.0, -torch.inf, 0.0], [-torch.inf] * 3])
    masses = token_masses(values, values.amax(dim=1, keepdim=True))
    assert (masses > 0).tolist() == [[True, False, True], [False] * 3]


def test_the_mass_of_the_largest_vocabulary_is_a_number() -> None:
    assert 0 < MAX_VOCAB * 2**44 < 2**63


def test_sums_do_not_depend_on_their_order() -> None:
    """Those of float64 do, in the last digit."""
    values = torch.randn(1, 100_000, generator=torch.Generator().manual_seed(0)).mul_(5)
    masses = token_masses(values, values.amax(dim=1, keepdim=True))[0]
    assert int(masses.flip(0).cumsum(0)[-1]) == int(masses.cumsum(0)[-1]) == sum(masses.tolist())
    probs = (values - values.amax()).exp()[0].double() / 3
    assert float(probs.flip(0).cumsum(0)[-1]) != float(probs.cumsum(0)[-1])


def test_limits_round_up_keep_the_first_token_and_may_be_absent() -> None:
    totals = torch.tensor([2**44, 3, 0, 2**62, 2**44])
    top_p = torch.tensor([0.5, 0.4, 0.9, 1e-30, torch.inf], dtype=torch.float64)
    assert mass_limits(top_p, totals).tolist() == [2**43, 2, 1, 1, WITHOUT_LIMIT]


def test_distances_are_counted_in_about_a_million_steps() -> None:
    widest = torch.tensor([1e-30, 0.3, 1.0, 1023.0, 3e38, torch.inf])
    scales = step_scales(widest)
    steps = widest.clamp(max=3.4028234663852886e38).double() * scales.double()
    assert bool(((steps >= 2**19) & (steps < 2**20)).all())
    assert bool((scales.view(torch.int32) & (2**23 - 1) == 0).all())  # powers of two
    assert bool((step_scales(torch.tensor([0.0, -torch.inf])) > 0).all())
