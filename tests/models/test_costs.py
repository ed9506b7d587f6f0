"""The cost of each part, against what torch counts when the part runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mmmoe_pretrain.config import MoEConfig, RunConfig
from mmmoe_pretrain.modalities.audio_stem import AudioEmbedder
from mmmoe_pretrain.modalities.image import ImageEmbedder
from mmmoe_pretrain.models.block import FeedForward, dense_width
from mmmoe_pretrain.models.costs import block_costs, feed_forward_flops, gradient_passes
from mmmoe_pretrain.moe.experts import SharedExpert
from tests.support import objectives, tiny_config, tiny_values

VOCAB = 48
TINY = tiny_values(Path("."))["modalities"]
AUDIO_TOKENS = 6  # of 0.4 s: 41 frames, 8 a token
CONTRAST_ONLY = objectives({}, None)


def config_of(**sections: Any) -> RunConfig:
    return tiny_config(Path("."), **sections)


def with_vocabulary(config: RunConfig, vocab_size: int) -> RunConfig:
    return config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": vocab_size})})


def counted(run: Any, *inputs: Any) -> int:
    with torch.device("cpu"), FlopCounterMode(display=False) as counter:
        run(*inputs)
    return counter.get_total_flops()


def test_a_dense_block_costs_what_its_layer_runs() -> None:
    config = config_of()
    layer = FeedForward(16, dense_width(config.model, config.moe, 0))
    assert feed_forward_flops(config, 0) == counted(layer, torch.zeros(7, 16)) / 7


@pytest.mark.parametrize("activation", ["swiglu", "gelu", "clamped_swiglu"])
def test_a_moe_layer_costs_its_router_the_chosen_experts_and_the_shared_one(activation: str) -> None:
    """An expert is a SharedExpert of its size; 2 of 4 are chosen, and the router is one product."""
    moe = {"num_experts": 4, "experts_per_token": 2, "expert_hidden_size": 8, "activation": activation,
           "shared_expert_hidden_size": 12}  # fmt: skip
    x = torch.zeros(7, 16)

    def of_size(size: int, gate: bool = False) -> float:
        own = MoEConfig(activation=activation, shared_expert_hidden_size=size, shared_expert_gate=gate)
        return counted(SharedExpert(own, 16), x, x) / 7

    expert, shared = of_size(8), of_size(12)
    assert feed_forward_flops(config_of(moe=moe), 1) == 2 * expert + shared + 2 * 16 * 4
    gated = of_size(12, gate=True)
    assert gated > shared
    moe |= {"shared_expert_gate": True}
    assert feed_forward_flops(config_of(moe=moe), 1) == 2 * expert + gated + 2 * 16 * 4


def test_experts_of_unlike_size_count_by_their_number_and_those_without_computation_count_nothing() -> None:
    """Of 4 equally likely outputs two have size 8, one 20, one none: (8 + 8 + 20 + 0) / 4 = 9 a choice."""
    groups = [{"num_experts": 2}, {"num_experts": 1, "expert_hidden_size": 20}]
    moe = {"num_experts": 3, "experts_per_token": 1, "expert_hidden_size": 8, "expert_groups": groups,
           "null_experts": 1}  # fmt: skip
    assert feed_forward_flops(config_of(moe=moe), 1) == 6 * 16 * 9 + 2 * 16 * 4


def test_a_layers_own_settings_count() -> None:
    narrow = {"num_experts": 4, "expert_hidden_size": 8, "every": 1}
    config = config_of(moe={**narrow, "layers": {1: {"expert_hidden_size": 16}}})
    difference = feed_forward_flops(config, 1) - feed_forward_flops(config, 0)
    assert difference == 2 * 6 * 16 * 8  # two experts a token, 8 columns more in each of three matrices


@pytest.mark.parametrize("num_kv_heads", [None, 1])
def test_attention_is_its_products_and_the_scores_over_a_segment(num_kv_heads: int | None) -> None:
    """One text segment of 50 tokens is all there is next to images of 4 tokens and clips of 6. Two heads of 8."""
    model = {**config_of().model.model_dump(), "num_kv_heads": num_kv_heads}
    modalities = {**TINY, "text": {"kind": "text", "max_tokens": 48}}
    config = config_of(modalities=modalities, objectives=CONTRAST_ONLY, model=model)
    image, audio, text = 4, AUDIO_TOKENS, 50
    attended = (image**2 + audio**2 + text**2) / (image + audio + text)
    attention = block_costs(config).blocks[0] - feed_forward_flops(config, 0)
    keys_and_values = 2 * 8 * (num_kv_heads or 2)
    assert attention == pytest.approx(2 * 16 * (16 + keys_and_values) + 2 * 16 * 16 + 4 * attended * 16)


@pytest.mark.parametrize("stem", ["conv", "linear"])
@pytest.mark.parametrize("patch", [2, 4, 16])
def test_the_first_stage_runs_the_stems(stem: str, patch: int) -> None:
    modalities = {"image": {"kind": "image", "size": 32, "patch": patch, "stem": stem, "stem_channels": 8},
                  "audio": {**TINY["audio"], "patch": patch, "stem": stem}, "text": {"kind": "text"}}  # fmt: skip
    config = config_of(modalities=modalities, objectives=CONTRAST_ONLY)
    image: Any = config.modalities["image"]
    audio: Any = config.modalities["audio"]
    flops = counted(ImageEmbedder(image, 16), torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    frames = audio.max_frames
    flops += counted(AudioEmbedder(audio, 16), torch.zeros(1, audio.n_mels, frames), torch.tensor([frames]))
    tokens = (32 // patch) ** 2 + frames // patch + 48 + 2
    assert block_costs(config).first_extra == pytest.approx(flops / tokens)


def test_the_language_head_costs_by_the_share_of_tokens_with_a_target() -> None:
    """Half of the samples get a fused segment, after an image or a clip, with 16 + 1 targets."""
    config = config_of(objectives=objectives({}, {"fraction": 0.5}))
    image, audio, text = 4, AUDIO_TOKENS, 16
    tokens = image + audio + text + 2 + 0.25 * (image + text + 1) + 0.25 * (audio + text + 1)
    more = block_costs(with_vocabulary(config, 2 * VOCAB)).last_extra - block_costs(config).last_extra
    assert more == pytest.approx(2 * 16 * VOCAB * 0.5 * 17 / tokens)


def test_causal_tokens_attend_to_those_before_them_alone() -> None:
    """An image of 4 tokens and then 17 of a text: 4 x 4 + 17 x 4 + (1 + 2 + ... + 17) = 237 pairs of 21 tokens."""
    captions = {"captions": {"kind": "next_token", "parts": ["image", "text"]}}
    config = config_of(objectives=captions)
    attention = block_costs(config).blocks[0] - feed_forward_flops(config, 0)
    assert attention == pytest.approx(8 * 16**2 + 4 * 237 / 21 * 16)


def test_without_captions_the_last_stage_holds_heads_and_similarities_alone() -> None:
    """16 samples in 2 microbatches: 8 rows to compare with, three pairs, either way round, P = 8."""
    config = config_of(objectives=CONTRAST_ONLY)
    tokens = 4 + AUDIO_TOKENS + 18
    expected = 3 * 2 * 16 * 8 + 3 * 2 * 2 * 8 * 8
    assert block_costs(config).last_extra == pytest.approx(expected / tokens)
    assert block_costs(with_vocabulary(config, 1000 * VOCAB)).last_extra == block_costs(config).last_extra


def test_a_cached_contrast_compares_with_the_whole_step() -> None:
    plain, cached = (
        block_costs(config_of(objectives=objectives({"cached": flag}, None))).last_extra for flag in (False, True)
    )
    tokens = 4 + AUDIO_TOKENS + 18
    assert cached - plain == pytest.approx(3 * 2 * 2 * 8 * (16 - 8) / tokens)


@pytest.mark.parametrize(
    ("kind", "flops"),
    [
        ("late", 2 * 16 * 8),  # the joint head alone
        ("gated", 2 * (2 * 16 * 16 + 2 * 32 * 16) + 2 * 16 * 8),
        ("tensor", 2 * 2 * 16 * 16 + 2 * 17**2 * 8),  # of all products, no sum
        ("low_rank", 2 * 2 * 17 * 4 * 16 + 2 * 16 * 8),
        # 8 latents attend to 4 + 6 tokens: queries, output and MLP; keys and values; scores and mix
        ("latents", 2 * 16 * 16 * (4 * 8 + 2 * 10) + 2 * 2 * 8 * 10 * 16 + 2 * 16 * 8),
        # 4 tokens attend to 6 and 6 to 4: queries, output and MLP; keys and values; scores and mix
        ("mult", 2 * 16 * 16 * (4 * 10 + 2 * 10) + 2 * 2 * 2 * 4 * 6 * 16 + 2 * 32 * 8),
    ],
)
def test_a_fused_representation_costs_what_fuses_it_and_its_head(kind: str, flops: int) -> None:
    pairs = {"kind": "contrastive", "pairs": {"image-audio": 1.0, "text-image": 1.0}}
    plain = config_of(objectives={"pairs": pairs})
    more = {"kind": "contrastive", "pairs": {"image-audio": 1.0, "text-scene": 1.0}}
    fused = config_of(
        objectives={"pairs": more}, representations={"scene": {"kind": kind, "parts": ["image", "audio"]}}
    )
    tokens = 4 + AUDIO_TOKENS + 18
    assert (block_costs(fused).last_extra - block_costs(plain).last_extra) * tokens == pytest.approx(flops)


def test_modalities_that_no_objective_uses_cost_nothing() -> None:
    """Texts alone, of 18 tokens, one of which is a target only: no stem runs, and no joint head is there."""
    config = config_of(objectives={"reading": {"kind": "next_token", "fraction": 0.5}})
    costs = block_costs(config)
    assert costs.first_extra == 0
    assert costs.last_extra == pytest.approx(2 * 16 * VOCAB)  # every token has a target
    attended = 9  # of 17, on average
    assert costs.blocks[0] - feed_forward_flops(config, 0) == pytest.approx(8 * 16**2 + 4 * attended * 16)


@pytest.mark.parametrize(
    ("task_gradients", "losses", "passes"),
    [
        (None, {"balance": 0.02}, 1.0),
        ({"combine": "pcgrad"}, {"balance": 0.02}, 3.0),  # two tasks, and the losses of routing
        ({"combine": "pcgrad"}, {}, 2.0),
        ({"every": 10}, {"balance": 0.02}, 1 + 2 / 10),
        ({}, {"balance": 0.02}, 1 + 2 / 5),  # as often as there are records
    ],
)
def test_gradients_of_tasks_take_a_pass_for_each(task_gradients: Any, losses: Any, passes: float) -> None:
    train = {"log_every": 5, "task_gradients": task_gradients}
    moe = {"num_experts": 4, "expert_hidden_size": 8, "losses": losses}
    assert gradient_passes(config_of(train=train, moe=moe)) == pytest.approx(passes)
