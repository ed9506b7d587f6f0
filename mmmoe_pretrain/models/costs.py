"""What each part of the model costs, so that a pipeline can be cut into stages of like cost.

Owns estimates from a config alone. Counted are matrix products and convolutions of the forward pass,
2 FLOPs a multiply-add, divided by the tokens of the stream; the backward pass is twice that everywhere,
and communication is left out. A sample is taken to have every modality at its full length, since what
the data holds is not in the config: shares are right to the extent that texts and clips fill theirs.

D hidden size, F hidden size of a feed-forward layer, L tokens that a token attends to, E router outputs,
K experts a token, V vocabulary, P joint embedding size, G samples of the global microbatch.
"""

from __future__ import annotations

from typing import NamedTuple

from mmmoe_pretrain.config import AudioConfig, ImageConfig, RunConfig
from mmmoe_pretrain.config_moe import MoEConfig
from mmmoe_pretrain.modalities.stem import stem_widths
from mmmoe_pretrain.models.block import dense_width, is_sparse
from mmmoe_pretrain.moe.activation import ACTIVATIONS

IMAGE_KERNEL, AUDIO_KERNEL, RESIDUAL_KERNEL = 3, 5, 3  # of the convolutional stems, a side


class TrunkCosts(NamedTuple):
    """FLOPs a token of each block, and of what the first and the last stage hold beside blocks."""

    blocks: tuple[float, ...]
    first_extra: float
    last_extra: float


class _Sample(NamedTuple):
    """Tokens of one sample: in all, that one token attends to on average, and with a caption target."""

    tokens: float
    attended: float
    targets: float


def block_costs(config: RunConfig, vocab_size: int) -> TrunkCosts:
    """FLOPs a token in the forward pass.

    Each block: attention 8 D^2 + 4 L D (queries, keys, values and output; scores and their mix), and
    ``feed_forward_flops``. First: the stems, for each modality's share of the tokens. Last: the joint
    heads 2 D P for each of the modalities of a sample, the similarities 4 P G for each pair of them,
    and the language head 2 D V for the share of tokens that have a target.
    """
    sample, model = _sample(config), config.model
    attention = 8 * model.hidden_size**2 + 4 * sample.attended * model.hidden_size
    blocks = tuple(attention + feed_forward_flops(config, i) for i in range(model.num_layers))
    return TrunkCosts(
        blocks,
        _stem_flops_of_sample(config) / sample.tokens,
        _head_flops_of_sample(config, vocab_size, sample) / sample.tokens,
    )


def feed_forward_flops(config: RunConfig, index: int) -> float:
    """FLOPs a token of block ``index`` beside attention: dense SwiGLU 6 D F; or the router 2 D E, the
    K chosen experts and the shared one, 6 D F each with SwiGLU and 4 D F with GELU, and the shared one's gate
    2 D. Experts are taken to be chosen evenly, which is what balancing works for; those without computation
    cost nothing, and biases are left out."""
    hidden = config.model.hidden_size
    if not is_sparse(config.moe, index):
        return 6 * hidden * dense_width(config.model, config.moe, index)
    moe = config.moe.for_layer(index)
    width = moe.experts_per_token * _mean_expert_size(moe) + moe.shared_expert_hidden_size
    routers = 2 if moe.router == "noisy_top_k" else 1  # logits, and the width of their noise
    outputs = routers * moe.router_outputs + moe.shared_expert_gate
    return 2 * hidden * ((ACTIVATIONS[moe.activation].width + 1) * width + outputs)


def _mean_expert_size(moe: MoEConfig) -> float:
    total = sum(group.num_experts * (group.expert_hidden_size or moe.expert_hidden_size) for group in moe.groups)
    return total / moe.router_outputs


def _sample(config: RunConfig) -> _Sample:
    modalities, captioning = config.modalities, config.objectives.captioning
    text = modalities.text.max_tokens
    lengths = {"image": modalities.image.num_tokens, "audio": modalities.audio.max_tokens, "text": text + 2}
    segments = [(1.0, float(length)) for length in lengths.values()]  # how many a sample, tokens of each
    targets = 0.0
    if captioning.weight > 0:
        for prefix in captioning.prefixes:
            segments.append((captioning.fraction / len(captioning.prefixes), lengths[prefix] + text + 1.0))
            targets += captioning.fraction / len(captioning.prefixes) * (text + 1)
    tokens = sum(count * length for count, length in segments)
    return _Sample(tokens, sum(count * length**2 for count, length in segments) / tokens, targets)


def _stem_flops_of_sample(config: RunConfig) -> float:
    image, audio, hidden = config.modalities.image, config.modalities.audio, config.model.hidden_size
    return image.num_tokens * _image_stem(image, hidden) + audio.max_tokens * _audio_stem(audio, hidden)


def _image_stem(image: ImageConfig, hidden: int) -> float:
    """FLOPs a token."""
    if image.stem == "linear":
        return 2 * 3 * image.patch**2 * hidden
    steps = image.patch.bit_length() - 1
    widths = [3, *stem_widths(image.stem_channels, steps, hidden)]
    places = [(image.patch >> i + 1) ** 2 for i in range(steps)]  # of a token, after each halving
    return _conv_stem(widths, places, IMAGE_KERNEL**2, RESIDUAL_KERNEL**2, hidden)


def _audio_stem(audio: AudioConfig, hidden: int) -> float:
    """FLOPs a token."""
    if audio.stem == "linear":
        return 2 * audio.n_mels * audio.patch * hidden
    steps = max(1, audio.patch.bit_length() - 1)
    widths = [audio.n_mels, *stem_widths(audio.stem_channels, steps, hidden)]
    places = [max(1, audio.patch >> i + 1) for i in range(steps)]
    return _conv_stem(widths, places, AUDIO_KERNEL, RESIDUAL_KERNEL, hidden)


def _conv_stem(widths: list[int], places: list[int], kernel: int, residual_kernel: int, hidden: int) -> float:
    """Steps that halve, a residual layer after each of the last two, and a product with [width, D]."""
    flops = 2.0 * widths[-1] * hidden
    for step, count in enumerate(places):
        residual = residual_kernel * widths[step + 1] ** 2 if step >= len(places) - 2 else 0
        flops += 2 * count * (kernel * widths[step] * widths[step + 1] + residual)
    return flops


def _head_flops_of_sample(config: RunConfig, vocab_size: int, sample: _Sample) -> float:
    model, contrastive = config.model, config.objectives.contrastive
    heads = 3 * 2 * model.hidden_size * model.embedding_size
    parts = 1 if contrastive.cached else config.train.num_microbatches
    others = config.train.global_batch_size / parts
    similarities = len(contrastive.pairs) * 2 * 2 * model.embedding_size * others  # either way round
    return heads + similarities + 2 * model.hidden_size * vocab_size * sample.targets
