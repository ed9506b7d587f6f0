"""The learning rate by hand."""

import pytest

from mmmoe_pretrain.config import OptimizerConfig
from mmmoe_pretrain.train.schedule import learning_rate

CONFIG = OptimizerConfig(learning_rate=1.0, min_learning_rate=0.2, warmup_steps=4)


@pytest.mark.parametrize("step,expected", [(0, 0.25), (3, 1.0), (4, 1.0), (9, 0.6), (14, 0.2), (99, 0.2)])
def test_warm_up_then_half_a_cosine(step: int, expected: float) -> None:
    assert learning_rate(step, 14, CONFIG) == pytest.approx(expected)


def test_without_warm_up_the_first_step_has_the_full_rate() -> None:
    assert learning_rate(0, 10, OptimizerConfig(learning_rate=1.0, warmup_steps=0)) == 1.0
