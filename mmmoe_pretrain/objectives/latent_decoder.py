"""What an objective with latent variables has for each modality: an encoder head from the vector of a sample to a
Gaussian, and a decoder from latent numbers to the content of each token.

The decoder knows the place of a token as a learned vector, to which it adds a projection of the latent numbers; then
follow residual blocks of a perceptron, in fp32. Given the latent numbers, tokens do not depend on each other, so the
likelihood of an item is a product over its tokens:

* of numbers (images, audio, series): a Gaussian around the decoder's output. Its standard deviation is one learned
  number of the modality (sigma-VAE, arXiv 2006.13202) or fixed. Numbers that were not measured do not count. The
  number of tokens is given, and not part of the likelihood.
* of discrete tokens (text): a categorical distribution over the vocabulary at each place up to the end mark, whose
  place says how long the text is.

Shapes: B samples, P joint space, Q draws, N tokens, C numbers of a token, V vocabulary, H hidden, Z latent numbers of
the decoder.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmmoe_pretrain.batch import Originals
from mmmoe_pretrain.modalities import Modality
from mmmoe_pretrain.objectives.gaussians import LOG_2PI, Gaussian

EPS = 1e-6
SMALLEST_SCALE = 0.01  # of a posterior
SMALLEST_DEVIATION = 0.05  # of numbers given the latent ones, in units of the embedder's input


class GaussianHead(nn.Module):
    """x [B, X] -> Gaussians of ``sizes`` numbers. ``hidden_size`` 0: linear."""

    def __init__(self, inputs: int, hidden_size: int, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.sizes = sizes
        self.hidden = nn.Linear(inputs, hidden_size) if hidden_size else None
        self.out = nn.Linear(hidden_size or inputs, 2 * sum(sizes))

    def forward(self, x_BX: Tensor) -> list[Gaussian]:
        if self.hidden is not None:
            x_BX = F.gelu(self.hidden(x_BX))
        mean, free = self.out(x_BX).chunk(2, dim=-1)
        scale = SMALLEST_SCALE + F.softplus(free)
        pairs = zip(mean.split(self.sizes, dim=-1), scale.split(self.sizes, dim=-1), strict=True)
        return [Gaussian(*pair) for pair in pairs]


class _Block(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(size, 2 * size), nn.Linear(2 * size, size)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(_norm(x))))


class Decoder(nn.Module):
    """``deviation``: of numbers; None: learned."""

    def __init__(
        self,
        modality: Modality,
        latents: int,
        hidden_size: int,
        layers: int,
        vocab_size: int,
        deviation: float | None,
    ) -> None:
        super().__init__()
        self.discrete, self.fixed = modality.predictable, deviation
        self.places = nn.Parameter(torch.empty(modality.max_tokens, hidden_size))
        self.latent = nn.Linear(latents, hidden_size)
        self.blocks = nn.ModuleList(_Block(hidden_size) for _ in range(layers))
        self.out = nn.Linear(hidden_size, vocab_size if self.discrete else modality.content_size)
        if not self.discrete and deviation is None:
            self.free = nn.Parameter(torch.full((1,), math.log(math.expm1(1.0 - SMALLEST_DEVIATION))))

    def forward(self, z_QBZ: Tensor, samples_N: Tensor, places_N: Tensor) -> Tensor:
        """[Q, N, C] means or [Q, N, V] logits, of the tokens at these places of these samples."""
        x_QNH = self.latent(z_QBZ).index_select(1, samples_N) + _norm(self.places.index_select(0, places_N))
        for block in self.blocks:
            x_QNH = block(x_QNH)
        found: Tensor = self.out(_norm(x_QNH))
        return found

    @property
    def deviation(self) -> Tensor:
        """The standard deviation of numbers, [1]."""
        if self.fixed is not None:
            return self.places.new_tensor([self.fixed])
        return SMALLEST_DEVIATION + F.softplus(self.free)

    def log_likelihood(self, z_QBZ: Tensor, truth: Originals) -> Tensor:
        """[Q, B]: of the items of each sample, in nats; 0 of samples without one."""
        found = self(z_QBZ, truth.samples, truth.places)
        each_QN = self._of_ids(found, truth.content) if self.discrete else self._of_numbers(found, truth.content)
        return each_QN.new_zeros(z_QBZ.shape[:2]).index_add(1, truth.samples, each_QN)

    def _of_ids(self, logits_QNV: Tensor, ids_N: Tensor) -> Tensor:
        target_QN = ids_N.expand(len(logits_QNV), -1)
        return -F.cross_entropy(logits_QNV.flatten(0, 1), target_QN.flatten(), reduction="none").view_as(target_QN)

    def _of_numbers(self, mean_QNC: Tensor, values_NC: Tensor) -> Tensor:
        measured_NC, deviation = ~values_NC.isnan(), self.deviation
        distance_QNC = (values_NC.nan_to_num(0.0) - mean_QNC) / deviation
        each_QNC = -0.5 * (distance_QNC.square() + LOG_2PI) - deviation.log()
        return torch.where(measured_NC, each_QNC, 0.0).sum(dim=-1)


def decoder_flops(modality: Modality, latents: int, hidden_size: int, layers: int, vocab_size: int) -> float:
    """FLOPs of one draw of an item at its full length."""
    out = vocab_size if modality.predictable else modality.content_size
    each = layers * 4 * hidden_size + out
    return 2 * hidden_size * (latents + modality.max_tokens * each)


def _norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=EPS)
