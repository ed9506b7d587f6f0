"""What holds for the stems of every modality: inputs without contrast are harmless."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from mmmoe_pretrain.modalities.audio_settings import AudioSettings
from mmmoe_pretrain.modalities.audio_stem import AudioEmbedder
from mmmoe_pretrain.modalities.image import ImageEmbedder, ImageSettings
from mmmoe_pretrain.modalities.stem import ChannelNorm
from mmmoe_pretrain.models.init import init_parameters


def gradient_norm(embedder: nn.Module, *inputs: Tensor) -> float:
    """Of a loss whose gradient in the tokens does not depend on them."""
    embedder.zero_grad()
    tokens = embedder(*inputs)
    (tokens * torch.randn(tokens.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    gradients = [parameter.grad for parameter in embedder.parameters() if parameter.grad is not None]
    return torch.stack([gradient.norm() for gradient in gradients]).norm().item()


def check_harmless(embedder: nn.Module, usual: Sequence[Tensor], flats: Sequence[Sequence[Tensor]]) -> None:
    """``flats`` have at most ten times the gradient of ``usual`` where biases are zero, as they are at first."""
    init_parameters(embedder, seed=3, num_layers=2)
    bound = 10 * gradient_norm(embedder, *usual)
    for flat in flats:
        assert 0 < gradient_norm(embedder, *flat) < bound, flat[0].flatten()[0]


@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize("stem", ["linear", "conv"])
def test_constant_and_masked_spectrograms_are_harmless(stem: str, positions: str) -> None:
    config = AudioSettings(stem=stem, positions=positions, n_mels=40)
    noise, frames = torch.randn(1, 40, 160, generator=torch.Generator().manual_seed(0)), torch.tensor([160])
    masked = noise.clone()
    masked[:, :, 40:120] = 0  # as SpecAugment does, wider than what one token sees
    levels = [torch.full((1, 40, 160), level) for level in (0.0, 1e-6, 1e-4, 0.01, 0.02, 1.0, -4.67)]
    check_harmless(AudioEmbedder(config, 32), (noise, frames), [(flat, frames) for flat in (*levels, masked)])


@pytest.mark.parametrize("stem", ["linear", "conv"])
def test_constant_images_are_harmless(stem: str) -> None:
    config = ImageSettings(stem=stem, size=32, mean=0.7, std=0.35)
    noise = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    # 255 * 0.7 = 178.5, so that 178 and 179 are the values next to zero
    flats = [(torch.full((1, 3, 32, 32), level, dtype=torch.uint8),) for level in (0, 127, 178, 179, 255)]
    check_harmless(ImageEmbedder(config, 32), (noise,), flats)


def test_a_channel_norm_is_a_layer_norm_over_channels() -> None:
    x = torch.randn(2, 6, 5, dtype=torch.float64, requires_grad=True)
    norm = ChannelNorm(6).double()
    centred = x - x.mean(1, keepdim=True)
    expected = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
    weights = torch.randn(2, 6, 5, dtype=torch.float64)
    torch.testing.assert_close(norm(x), expected)
    for found, right in zip(*(torch.autograd.grad((y * weights).sum(), x) for y in (norm(x), expected)), strict=True):
        torch.testing.assert_close(found, right)
