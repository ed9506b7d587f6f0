"""The diagonal of the Fisher information of a trained run: how much each weight matters to its losses (EWC, arXiv
1612.00796), as squares of gradients on its own training samples (the empirical Fisher information: targets are those
of the data, not drawn from the model).

A batch of B samples has one gradient g of the mean loss, and B g^2 is taken. Where samples have losses of their own
and the mean gradient is G, its expectation is the mean of their squared gradients plus (B - 1) G^2: exact for B = 1,
and near it for any B in a run that has converged. A contrastive loss is of its batch, so B should be large enough
to have negatives. Auxiliary losses of routing are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from mmmoe_pretrain.batch import Batch
from mmmoe_pretrain.checkpoint.state import persistent_buffers
from mmmoe_pretrain.config.moe import RoutingLossConfig
from mmmoe_pretrain.models.pretraining import PretrainingModel
from mmmoe_pretrain.objectives import step_counts
from mmmoe_pretrain.surgery.operation import Source


def fisher(source: Source, samples: int, batch_size: int) -> tuple[dict[str, Tensor], int]:
    """By parameter, divided by the mean over all weights (arXiv 1805.06370 scales it, too, so that runs count alike),
    and the number of samples. Raises ValueError where the training shards cannot be read by number, or no loss has a
    gradient."""
    model = _model_of(source)
    parameters, count = dict(model.named_parameters()), 0

    def losses() -> Iterable[tuple[Tensor, int]]:
        nonlocal count
        for batch, read in source.training_batches(samples, batch_size, "Fisher information"):
            count += len(read)
            yield _loss(model, batch), len(read)

    found = mean_squares(parameters, losses())
    mean = sum(float(its.double().sum()) for its in found.values()) / sum(its.numel() for its in found.values())
    if not mean or not torch.isfinite(torch.tensor(mean)):
        raise ValueError(
            f"the squared gradients of {count} training samples have the mean {mean:g}, so no weight matters more "
            f"than another; use more --samples, or optimizer.hold.importance=uniform"
        )
    return {name: its / mean for name, its in found.items()}, count


def mean_squares(parameters: Mapping[str, nn.Parameter], losses: Iterable[tuple[Tensor, int]]) -> dict[str, Tensor]:
    """By parameter the mean of B g^2 over the samples; ``losses``: of batches, each the mean over its B samples."""
    sums = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    total = 0
    for loss, size in losses:
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        total += size
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                sums[name].addcmul_(gradient, gradient, value=size * size)
    return {name: its / max(1, total) for name, its in sums.items()}


def _model_of(source: Source) -> PretrainingModel:
    """The trained model with its objectives, in fp32, without auxiliary losses."""
    moe = source.config.moe.model_copy(update={"losses": RoutingLossConfig()})
    model = PretrainingModel(source.config.model_copy(update={"moe": moe}))
    for name, tensor in (*model.named_parameters(), *persistent_buffers(model).items()):
        tensor.data.copy_(source.state[name].value)
    return model.eval()


def _loss(model: PretrainingModel, batch: Batch) -> Tensor:
    """Of a batch as a step of its own."""
    counts = step_counts([batch], model.objectives, None, torch.device("cpu"))
    model.begin_step(0, counts)
    if model.objectives.whole_step:
        model.begin_look("collecting")
        with torch.no_grad():
            model(batch)
        model.end_look()
        model.begin_step(0, counts)
    loss, _ = model(batch)
    model.end_step(None)
    assert isinstance(loss, Tensor)
    return loss
