"""The diagonal of the Fisher information against closed forms."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmmoe_pretrain.surgery.fisher import mean_squares

FEATURES, CLASSES = 3, 4


def softmax_regression() -> tuple[nn.Linear, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Linear(FEATURES, CLASSES), torch.randn(40, FEATURES)


def test_of_softmax_regression_it_is_the_closed_form() -> None:
    """Of W_kj: the mean over x of p_k (1 - p_k) x_j^2, and of a bias without the last factor. Every label of a sample
    counts here as often as its probability says: 4,000 draws a sample leave about 2%."""
    model, x_NF = softmax_regression()
    p_NC = model(x_NF).softmax(dim=-1).detach()
    variance_NC = p_NC * (1 - p_NC)
    draws = 4000
    labels = torch.multinomial(p_NC, draws, replacement=True, generator=torch.Generator().manual_seed(1))
    weights_NC = F.one_hot(labels, CLASSES).sum(dim=1) / draws

    def losses():  # type: ignore[no-untyped-def]
        for x, weights in zip(x_NF, weights_NC, strict=True):
            for label, weight in enumerate(weights):
                # the square of sqrt(weight) g is weight g^2; the four of a sample are its one term of the mean
                loss = weight.sqrt() * F.cross_entropy(model(x[None]), torch.tensor([label]))
                yield loss * CLASSES**0.5, 1

    found = mean_squares(dict(model.named_parameters()), losses())
    torch.testing.assert_close(found["weight"], (variance_NC.T @ x_NF.square()) / 40, rtol=0.03, atol=0)
    torch.testing.assert_close(found["bias"], variance_NC.mean(dim=0), rtol=0.03, atol=0)


@pytest.mark.parametrize("size", [1, 4])
def test_batches_add_the_square_of_the_mean_gradient(size: int) -> None:
    """Over all ways to fill a batch from two samples with the gradients a and b, with repetition: E[B mean^2] is
    (a^2 + b^2) / 2 + (B - 1) ((a + b) / 2)^2."""
    weight = nn.Parameter(torch.tensor([1.0]))
    a, b = 3.0, -1.0
    ways = torch.cartesian_prod(*[torch.tensor([a, b])] * size).view(-1, size)
    found = mean_squares({"w": weight}, ((weight.sum() * way.mean(), size) for way in ways))
    expected = (a * a + b * b) / 2 + (size - 1) * ((a + b) / 2) ** 2
    assert found["w"].item() == pytest.approx(expected)


def test_what_a_loss_does_not_use_has_none() -> None:
    used, idle = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    found = mean_squares({"used": used, "idle": idle}, [(used.sum(), 1)])
    assert found["used"].tolist() == [1, 1] and not found["idle"].any()
