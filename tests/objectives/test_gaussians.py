"""Gaussians with diagonal covariance against torch.distributions, closed forms and cases by hand; bounds on a
linear-Gaussian model, whose likelihood is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, MultivariateNormal, Normal

from mmmoe_pretrain.objectives.gaussians import (
    Bounds,
    Gaussian,
    mixture_log_prob,
    product,
    standard,
    total_correlation,
)

GENERATOR = torch.Generator().manual_seed(0)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR, dtype=torch.float64)


def gaussian(*shape: int) -> Gaussian:
    return Gaussian(random(*shape), 0.3 + random(*shape).exp())


def test_the_divergence_by_hand() -> None:
    """Of N(1, 2^2) from N(0, 1): (4 + 1 - 1 - 2 log 2) / 2; of N(1, 2^2) from N(3, 1/2^2), with the squared ratio 16
    and distance 16: (16 + 16 - 1 - 2 log 4) / 2."""
    own = Gaussian(torch.tensor([1.0, 1.0]), torch.tensor([2.0, 2.0]))
    other = Gaussian(torch.tensor([0.0, 3.0]), torch.tensor([1.0, 0.5]))
    expected = (4 - 2 * math.log(2)) / 2 + (31 - 2 * math.log(4)) / 2
    assert own.kl(other).item() == pytest.approx(expected)
    assert own.kl(own).item() == 0


def test_densities_are_those_of_torch() -> None:
    one, value = gaussian(5, 3), random(5, 3)
    torch.testing.assert_close(one.log_prob(value), Independent(Normal(one.mean, one.scale), 1).log_prob(value))
    torch.testing.assert_close(one.at(value), one.mean + one.scale * value)


def test_a_product_by_hand() -> None:
    """N(0, 1) N(4, 1) is N(2, 1/2); with N(0, 1/2^2), of precision 4, N(4 / 6, 1/6)."""
    experts = Gaussian(torch.tensor([[0.0], [4.0], [0.0]]), torch.tensor([[1.0], [1.0], [0.5]]))
    two, three, none = (
        product(experts, torch.tensor(chosen)) for chosen in ((True, True, False), (True,) * 3, (False,) * 3)
    )
    assert (two.mean.item(), two.scale.item()) == pytest.approx((2.0, 0.5**0.5))
    assert (three.mean.item(), three.scale.item()) == pytest.approx((4 / 6, (1 / 6) ** 0.5))
    assert (none.mean.item(), none.scale.item()) == (0.0, 1.0)


def test_a_product_is_proportional_to_the_densities() -> None:
    experts, chosen = gaussian(4, 3, 2), torch.tensor([[True, True, True], [True, False, True]] * 2)
    whole, values = product(experts, chosen), random(50, 4, 2)
    each = experts.log_prob(values[:, :, None]) * chosen
    constant = whole.log_prob(values) - each.sum(dim=-1)
    torch.testing.assert_close(constant, constant[:1].expand_as(constant))


def test_a_mixture_is_of_its_valid_components() -> None:
    components, value = gaussian(3, 5, 2), random(5, 2)
    valid = torch.tensor([True, False, True])[:, None].expand(3, 5)
    kept = Gaussian(components.mean[[0, 2]].transpose(0, 1), components.scale[[0, 2]].transpose(0, 1))
    equal = Categorical(torch.full((5, 2), 0.5, dtype=torch.float64))
    expected = MixtureSameFamily(equal, Independent(Normal(kept.mean, kept.scale), 1)).log_prob(value)
    torch.testing.assert_close(mixture_log_prob(components, valid, value), expected)


def test_total_correlation_by_hand() -> None:
    """Two narrow posteriors at (3, 3) and (-3, -3): each density is half of theirs, so log(1/2) - 2 log(1/2). On a
    grid of four the numbers are independent."""
    ends = torch.tensor([[3.0, 3.0], [-3.0, -3.0], [3.0, -3.0], [-3.0, 3.0], [9.0, 9.0]], dtype=torch.float64)
    atoms = Gaussian(ends, torch.full_like(ends, 0.1))
    two = total_correlation(ends[:2], atoms, torch.tensor([True, True, False, False, False]))
    torch.testing.assert_close(two, torch.full((2,), math.log(2), dtype=torch.float64))
    four = total_correlation(ends[:4], atoms, torch.tensor([True] * 4 + [False]))
    torch.testing.assert_close(four, torch.zeros(4, dtype=torch.float64), atol=1e-12, rtol=0)


def test_total_correlation_of_no_sample_has_a_gradient_of_zero() -> None:
    mean = torch.zeros(3, 2, requires_grad=True)
    found = total_correlation(mean, Gaussian(mean, torch.ones(3, 2)), torch.zeros(3, dtype=torch.bool))
    (found * torch.zeros(3)).sum().backward()
    assert mean.grad is not None and not mean.grad.any()


DEVIATION = 0.7
MAPS = (torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.5, 0.0], [0.0, -1.5]]))


class Linear:
    """Two modalities x = W z + noise of N(0, DEVIATION^2), z of N(0, 1). The columns of each W are orthogonal, so the
    posterior is a product of Gaussians with diagonal covariance: one of each modality, with the precision W'W /
    DEVIATION^2, and the prior."""

    def __init__(self, samples: int) -> None:
        z = random(samples, 2)
        self.data = [z @ w.double().T + DEVIATION * random(samples, len(w)) for w in MAPS]
        precisions = [(w.double().square().sum(dim=0) / DEVIATION**2).expand(samples, 2) for w in MAPS]
        means = [x @ w.double() / DEVIATION**2 / its for x, w, its in zip(self.data, MAPS, precisions, strict=True)]
        with_prior = Gaussian(
            torch.stack([*means, torch.zeros_like(z)], dim=1),
            torch.stack([*(its.rsqrt() for its in precisions), torch.ones_like(z)], dim=1),
        )
        self.posterior = product(with_prior, torch.ones(samples, 3, dtype=torch.bool))

    def exact(self) -> Tensor:
        """[B]: log p of both, from their joint Gaussian."""
        w = torch.cat([its.double() for its in MAPS])
        covariance = w @ w.T + DEVIATION**2 * torch.eye(len(w), dtype=torch.float64)
        return MultivariateNormal(torch.zeros(len(w)).double(), covariance).log_prob(torch.cat(self.data, dim=1))

    def bounds(self, q: Gaussian, valid: Tensor, draws: int) -> Bounds:
        """With the posterior q [K, B, 2]."""
        found = []
        for _ in range(draws):
            z = q.at(random(*q.mean.shape))
            weight = standard(z).log_prob(z) - mixture_log_prob(
                Gaussian(q.mean[:, None], q.scale[:, None]), valid[:, None], z
            )
            for x, w in zip(self.data, MAPS, strict=True):
                weight = weight + Normal(z @ w.double().T, DEVIATION).log_prob(x).sum(dim=-1)
            found.append(weight)
        return Bounds.of(torch.stack(found), valid)


def test_both_bounds_of_the_true_posterior_are_the_likelihood() -> None:
    """Whatever is drawn."""
    model = Linear(6)
    q = Gaussian(model.posterior.mean[None], model.posterior.scale[None])
    found = model.bounds(q, torch.ones(1, 6, dtype=torch.bool), 3)
    torch.testing.assert_close(found.elbo, model.exact())
    torch.testing.assert_close(found.importance, model.exact())


def test_bounds_of_another_posterior_are_below_and_rise_with_the_draws() -> None:
    """The evidence bound is below by the divergence of the two posteriors; the means over 400 samples have an error
    of about 0.02."""
    model = Linear(400)
    wrong = Gaussian(model.posterior.mean + 0.3, 1.5 * model.posterior.scale)
    q, valid = Gaussian(wrong.mean[None], wrong.scale[None]), torch.ones(1, 400, dtype=torch.bool)
    one, many = model.bounds(q, valid, 1), model.bounds(q, valid, 100)
    exact, apart = model.exact().mean().item(), wrong.kl(model.posterior).mean().item()
    assert apart > 0.3
    assert many.elbo.mean().item() == pytest.approx(exact - apart, abs=0.03)
    torch.testing.assert_close(one.elbo, one.importance)
    assert one.importance.mean() < many.importance.mean() - 0.2
    assert many.importance.mean().item() == pytest.approx(exact, abs=0.03)


def test_bounds_of_a_mixture_are_of_its_valid_components() -> None:
    """One component is the true posterior; the invalid one is far off and counts for nothing."""
    model = Linear(4)
    true, far = model.posterior, Gaussian(model.posterior.mean + 50, model.posterior.scale)
    q = Gaussian(torch.stack([true.mean, far.mean]), torch.stack([true.scale, far.scale]))
    found = model.bounds(q, torch.tensor([[True], [False]]).expand(2, 4), 2)
    torch.testing.assert_close(found.elbo, model.exact())
    torch.testing.assert_close(found.importance, model.exact())
