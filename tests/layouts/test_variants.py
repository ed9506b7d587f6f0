"""The parity matrix beside layouts: settings for speed and memory, uneven work, and other optimizers and MoE layers,
each over a few layouts against one process (tests/layouts/matrix.py)."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from mmmoe_pretrain.moe.lending import Loans
from mmmoe_pretrain.parallel.groups import Groups
from mmmoe_pretrain.parallel.runtime import process_group
from tests.distributed import run_ranks
from tests.layouts import matrix
from tests.layouts.cases import (
    ALONE,
    FIXED_ROUTING,
    GLOBAL,
    HOLD,
    LAYOUTS,
    LENDING,
    MICROBATCHES,
    OTHER_BLOCKS,
    SGD,
    TWO_MICROBATCHES,
    Case,
    brief,
)
from tests.layouts.train import reference, start_ranks, train_case
from tests.support import VECTORS

STEPS = 2  # the second is made with weights, moments and prefetch orders that the first has left


def case(layout: str, zero_stage: int = 0, engine: str = "megatron", **more: Any) -> Case:
    """``more``: fields of the case; keys that it does not have belong to its section ``parallel``."""
    ranks, degrees = LAYOUTS[layout]
    own = {key: more.pop(key) for key in list(more) if key not in Case.__dataclass_fields__}
    return brief(Case(layout, ranks, engine, zero_stage, {**degrees, **own}, **more))


BLOCKS = {"recompute": "blocks"}
CACHED, SIGMOID = {"cached": True}, {"kind": "sigmoid_contrastive"}
CORRELATED = {
    "cca": {"kind": "deep_cca", "pairs": {"image-text": 0.1, "image-audio": 0.1}, "cached": True},
    "gcca": {"kind": "deep_gcca", "representations": ["image", "audio", "text"], "weight": 0.1, "cached": True},
}
MASKED = {"masked": {"kind": "masked", "parts": ["image", "audio", "text"], "missing": "allow",
                     "hidden": {"image": 0.5, "audio": 0.5, "text": 0.5}}}  # fmt: skip
AUTOENCODER = {"autoencoder": {"kind": "masked", "parts": ["image", "audio"], "missing": "allow", "decoder_layers": 1,
                               "hidden": {"image": 0.5, "audio": 0.5}}}  # fmt: skip
TAUGHT = {"taught": {"kind": "self_distillation", "pairs": {"image-text": 1.0, "audio-text": 1.0}},
          "kept": {"kind": "distillation", "representations": ["image", "text"]}}  # fmt: skip
ANCHORS = {"anchors": {"kind": "semantic_anchors", "of": "image", "text": "text", "size": 8, "margin": 0.5,
                       "vectors": str(VECTORS)}}  # fmt: skip
DOMAINS = {"moments": {"kind": "moment_alignment", "of": "image", "field": "subset", "target": ["b"]},
           "adversary": {"kind": "domain_adversarial", "of": "text", "field": "subset", "target": ["b"]}}  # fmt: skip
# A target that nothing else reads, and a density, whose loss has no learned weight.
HEARD = {"heard": {"kind": "late", "parts": ["image", "audio"], "missing": "allow"}}
COMPLETED = {"completed": {"kind": "completion", "source": "image", "target": "heard", "hidden_size": 12,
                           "from_average": True}}  # fmt: skip
DENSITY = {"density": {"kind": "completion", "source": ["image", "text"], "target": "audio", "head": "mixture",
                       "components": 2, "hidden_size": 12, "weight": 0.1}}  # fmt: skip
# Autoencoders with latent variables, whose losses are densities, too: draws, random subsets, and a loss over the
# posteriors of all ranks.
LATENT = {"latent": {"kind": "multimodal_vae", "modalities": ["image", "audio", "text"], "latent_size": 3,
                     "private": {"audio": 2}, "hidden_size": 8, "total_correlation": 10.0, "weight": 0.01},
          "by_field": {"kind": "multimodal_vae", "modalities": ["image", "text"], "joint": "mixture",
                       "latent_size": 3, "hidden_size": 8, "condition": {"subset": ["a", "b"]},
                       "weight": 0.01}}  # fmt: skip
# Of four experts, the first two are those of samples with an image or audio alone.
COMBINED = {"losses": {"combination": 0.1, "combination_modalities": ["image", "audio"], "balance": 0.01}}
QUEUE = {"queue_size": 2 * MICROBATCHES * len(GLOBAL)}
SCENE = {"scene": {"kind": "late", "parts": ["image", "audio"], "modulation": {"alpha": 0.5, "noise": True}}}
CLASSES = {"classes": {"kind": "classify", "of": "image", "field": "subset", "classes": ["a", "b"]}}
# A task that enters at the second step.
OWN_HEAD = {"reading": {"kind": "next_token", "parts": ["text"], "head": "reader",
                        "weight": [[0, 0.0], [1, 0.3]]}}  # fmt: skip
# Of a run with every objective, weights that are learned, a teacher and a queue of its features, and gradients that
# are balanced.
METHODS = {
    "objectives": {**MASKED, **AUTOENCODER, **TAUGHT, **ANCHORS, **DOMAINS, **COMPLETED, **CLASSES, **OWN_HEAD},
    "representations": {**HEARD, **SCENE},
    "contrastive": {**QUEUE, "queue_from_average": True, "pairs": {"image-text": 1.0, "scene-text": 1.0}},
    "optimizer": {"eps": 1e-4, "average": 0.5},
    "train": {"loss_weighting": "uncertainty"},
    "moe": COMBINED,
}
GATHERED = {"overlap_grad_reduce": True, "overlap_param_gather": True}
BUCKETS = {"overlap_comm": True, "reduce_bucket_size": 1000, "round_robin_gradients": True}
SMALL_BUCKETS = {"zero_optimization": BUCKETS}
MEGATRON_LEVERS = [
    case("EP2", train={"recompute": "experts"}, moe={"dispatch_chunks": 2}),
    case("EP2", train=BLOCKS, overlap_grad_reduce=True),
    case("PP2 x VPP2", train=BLOCKS),
    case("TP2 + SP", train=BLOCKS),
    case("PP2", overlap_grad_reduce=True, contrastive=CACHED, objectives=LATENT),
    case("DP2", 1, **GATHERED),
    case("PP2 x VPP2", 1, **GATHERED),
    case("DP2", contrastive=CACHED),
    case("TP2 + SP", contrastive=CACHED, objectives=LATENT),
    case("EP2", contrastive={**SIGMOID, **QUEUE}),
    case("PP2 x VPP2", contrastive={**SIGMOID, **CACHED, **QUEUE}),
    case("DP2", objectives={**CORRELATED, **DENSITY, **LATENT}),
]
DEEPSPEED_LEVERS = [
    case("EP2", 0, "deepspeed"),
    case("TP2 + SP", 0, "deepspeed"),
    case("DP2", 1, "deepspeed", deepspeed=SMALL_BUCKETS),
    case("EP2", 2, "deepspeed", deepspeed=SMALL_BUCKETS),
    case("EP2", 2, "deepspeed", train=BLOCKS),
    case("EP2", 3, "deepspeed", train=BLOCKS, offload_optimizer="cpu"),
    case("TP2 + SP", 2, "deepspeed", contrastive=SIGMOID),
    case("EP2", 3, "deepspeed", contrastive=CACHED, objectives={**CORRELATED, **DENSITY, **LATENT}),
]  # ZeRO-1 with its optimizer on the CPU: METHOD_CASES
METHOD_CASES = [
    case("EP2", 1, **GATHERED, **METHODS),
    case("PP2 x VPP2", **METHODS),
    case("TP2 + SP", **{**METHODS, "contrastive": {**CACHED, **METHODS["contrastive"]}}),
    case("EP2", 1, "deepspeed", offload_optimizer="cpu", **METHODS),
    case("TP2 + SP", 2, "deepspeed", **METHODS),
    case("EP2", 3, "deepspeed", **METHODS),
]
SGD_CASES = [
    case("EP2", optimizer=SGD),
    case("TP2 + SP", optimizer=SGD),
    case("PP2 x VPP2", optimizer=SGD),
    case("EP2", 0, "deepspeed", optimizer=SGD),
    case("EP2", 1, "deepspeed", optimizer=SGD),
    case("DP2", 2, "deepspeed", optimizer=SGD, offload_optimizer="cpu"),
    case("EP2", 3, "deepspeed", optimizer=SGD),
]

HOLD_CASES = [
    case("EP2", optimizer=HOLD),
    case("TP2 + SP", optimizer=HOLD),
    case("PP2", 1, optimizer=HOLD),
    case("DP2", 0, "deepspeed", optimizer=HOLD),
    case("EP2", 1, "deepspeed", optimizer=HOLD, offload_optimizer="cpu"),
    case("TP2 + SP", 2, "deepspeed", optimizer=HOLD),
    case("EP2", 3, "deepspeed", optimizer=HOLD),
]

# MoE layers of every kind. What config_of sets of its own is switched off first.
EVERY_LOSS = {"local_entropy": 0.01, "global_entropy": 0.01, "importance": 0.01, "load": 0.01, "balance": 0.01,
              "balance_scope": "global_batch", "z": 0.001, "orthogonality": 0.01,
              "per_modality": ["balance", "importance"]}  # fmt: skip
PLAIN = {"router": "softmax_top_k", "shared_expert_hidden_size": 0, "identity_experts": 0, "bias_balancing": {}}
BALANCED_BY_MODALITY = {"null_experts": 1, "bias_balancing": {"rate": 0.01, "per_modality": True},
                        "losses": EVERY_LOSS, "dispatch_chunks": 2}  # fmt: skip
EXPERT_GROUPS = {
    **PLAIN, "num_experts": 8, "gate": "laplace", "task_conditioned": True, "losses": EVERY_LOSS,
    "expert_groups": [{"modalities": ["image"], "num_experts": 2},
                      {"modalities": ["audio", "text"], "num_experts": 4},
                      {"num_experts": 2, "expert_hidden_size": 16}],
}  # fmt: skip
UNLIKE_LAYERS = {
    **PLAIN, "every": 1, "task_conditioned": ["captioning"], "task_input": "alone",
    "router": "group_limited", "node_groups": 2, "groups_per_token": 1,
    "losses": {"balance": 0.01, "balance_scope": "sequence"},
    "layers": {1: {"num_experts": 8, "router": "softmax_top_k", "node_groups": 1, "activation": "gelu",
                   "experts_per_token": 3}},
}  # fmt: skip
# Experts that see each other's outputs, and routers that remember: in the second step neither is 0 any more.
COMMUNICATING = {"every": 1, "expert_attention_size": 4, "routing_memory_size": 3}
DENSE = {**PLAIN, "num_experts": 1, "experts_per_token": 1, "losses": {}}
IN_HALF = {**OTHER_BLOCKS, **FIXED_ROUTING, "router_bias": False}  # biases stay fp32 beside half matrices
MOE_CASES = [
    case("EP2", moe=BALANCED_BY_MODALITY),
    case("EP2", moe=EXPERT_GROUPS),
    case("EP2", moe=UNLIKE_LAYERS),
    case("EP2", moe={**PLAIN, "router": "hash"}),
    case("DP2", moe=DENSE),
    case("EP2", 3, "deepspeed", moe=OTHER_BLOCKS),
    case("TP2 + SP", moe=OTHER_BLOCKS),
    case("EP2", 1, precision="bf16", moe=IN_HALF),
]

# The expert groups of EP2 x EDP2 see different loads: one of them has no token, and lends nothing.
ON_TWO_RANKS = (("iat", "it", "ia", "iat", "", "", "", ""),)
COMMUNICATING_CASES = [
    case("EP2", train=BLOCKS, moe={**COMMUNICATING, "dispatch_chunks": 2}),
    case("EP2", 3, "deepspeed", moe=COMMUNICATING),
    case("TP2 + SP", moe={**COMMUNICATING, "expert_backend": "grouped_mm"}, train=BLOCKS),
    case("PP2 x VPP2", 1, moe=COMMUNICATING),
    case("PP2", 1, precision="bf16", moe={**COMMUNICATING, **FIXED_ROUTING, "routing_memory_size": 0}),
]
LENDING_CASES = [
    case("EP2", train=BLOCKS, moe=LENDING, one_expert=True),
    case("EP2", 2, "deepspeed", moe=LENDING, one_expert=True),
    case("PP2 x EP2", 1, moe={**OTHER_BLOCKS, **LENDING}, train={"recompute": "experts"}),
    case("EP2", 1, precision="bf16", moe={**IN_HALF, **LENDING}),
    case("EP2", 2, "deepspeed", train=BLOCKS, precision="bf16", moe={**IN_HALF, **LENDING}),
    case("EP2 x EDP2", 1, **GATHERED, moe={**LENDING, "expert_backend": "grouped_mm"}, samples=ON_TWO_RANKS),
]

# Fused representations of every kind, each aligned with a modality or with another one.
FUSED = {
    "early": {"kind": "early", "parts": ["image", "audio"], "missing": "allow"},
    "late": SCENE["scene"],
    "gated": {"kind": "gated", "parts": ["audio", "image"], "missing": "allow", "modulation": {}},
    "tensor": {"kind": "tensor", "parts": ["image", "audio", "text"], "size": 3, "missing": "bank"},
    "low_rank": {"kind": "low_rank", "parts": ["image", "text"], "rank": 2, "missing": "bank"},
    "latents": {"kind": "latents", "parts": ["image", "audio"], "num_latents": 3, "missing": "bank"},
    "mult": {"kind": "mult", "parts": ["image", "audio"], "missing": "allow"},
    "graph": {"kind": "graph", "parts": ["audio", "image"], "edges": ["modality", "time"], "missing": "allow"},
    "bottleneck": {"kind": "bottleneck", "parts": ["image", "audio"], "num_bottlenecks": 2, "missing": "allow"},
}
FUSED_PAIRS = {"pairs": {"early-text": 1.0, "late-text": 1.0, "gated-text": 1.0, "tensor-low_rank": 0.5,
                         "latents-text": 1.0, "mult-text": 0.5, "bottleneck-graph": 0.5}}  # fmt: skip
FUSION = {"representations": FUSED, "contrastive": FUSED_PAIRS}
FUSION_CASES = [
    case("DP2", **FUSION),
    case("EP2", 3, "deepspeed", **FUSION),
    case("TP2 + SP", **FUSION),
    case("PP2", 1, **FUSION, **GATHERED),
]

# Ranks that have less to do than others, or nothing: each step but the first begins with what such a one has left.
DATA = [("EP2", 1, "megatron"), ("EP2", 2, "deepspeed"), ("DP2", 3, "deepspeed")]
MODEL = [("PP2", 0, "megatron"), ("PP2 x VPP2", 1, "megatron"), ("TP2 + SP", 0, "megatron"), ("TP2", 1, "deepspeed")]
SOME, NONE = ("iat", "it", "ia", "iat"), ("",) * 4
NO_IMAGE = ("at", "t", "a", "at", "t", "at", "a", "t")
NOT_ON_LATER_RANKS, NOT_ON_FIRST_RANKS, NOWHERE = (*SOME, *NONE), (*NONE, *SOME), (*NONE, *NONE)
CUT_SHORT = (*SOME, "it", "", "", "")


def uneven(layouts: list[tuple[str, int, str]], *samples: tuple[str, ...], one_expert: bool = False) -> list[Case]:
    return [case(*layout, train=TWO_MICROBATCHES, samples=samples, one_expert=one_expert) for layout in layouts]


UNEVEN_CASES = [
    *uneven(DATA, NOT_ON_LATER_RANKS, NOWHERE, NO_IMAGE, NOT_ON_FIRST_RANKS, CUT_SHORT),
    *uneven(MODEL, NOWHERE, NO_IMAGE, CUT_SHORT),
    *uneven(DATA + MODEL[1:], (*SOME, "t", "at", "a", "t"), one_expert=True),
]
FAMILIES = {
    "levers of megatron": MEGATRON_LEVERS,
    "levers of deepspeed": DEEPSPEED_LEVERS,
    "SGD with momentum": SGD_CASES,
    "weights that are held": HOLD_CASES,
    "MoE layers of every kind": MOE_CASES,
    "experts that communicate": COMMUNICATING_CASES,
    "lent experts": LENDING_CASES,
    "fused representations": FUSION_CASES,
    "all objectives": METHOD_CASES,
    "uneven work": UNEVEN_CASES,
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("family", FAMILIES)
def test_it_trains_like_one_process(family: str) -> None:
    comparisons = matrix.run(FAMILIES[family], STEPS)
    assert all(comparison.passed for comparison in comparisons), [v for v in comparisons if not v.passed]


def lent_in(case: Case) -> list[int]:
    """The number of experts that any rank of the group lends, of each MoE layer and microbatch of a step."""
    found, make = [], Loans.of

    def noted(borrowed_RS: np.ndarray, local: int, groups: Groups) -> Loans | None:
        found.append(int((borrowed_RS < local * groups.expert_size).sum()))
        return make(borrowed_RS, local, groups)

    with process_group(timeout_minutes=1) as device, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loans, "of", noted)
        train_case(case, 1, device)
    return found


@pytest.mark.parametrize("number", [0, 3])
def test_experts_are_lent_in_every_layer_and_microbatch(number: int) -> None:
    case = LENDING_CASES[number]
    first, other = run_ranks(case.ranks, lent_in, case)
    assert first == other and all(first)
    again = int("recompute" in case.train)  # of two MoE layers, the last of which is in the last block and kept
    assert len(first) == (2 + again) * case.config().train.num_microbatches


def test_the_references_have_what_is_compared() -> None:
    """Settings of the reference that do nothing would be equal under every layout."""
    plain, sgd, other = (reference(dataclasses.replace(ALONE, moe=moe, optimizer=optimizer), STEPS)
                         for moe, optimizer in (({}, {}), ({}, SGD), (OTHER_BLOCKS, {})))  # fmt: skip
    assert sgd.losses[-1]["total"] != pytest.approx(plain.losses[-1]["total"], rel=1e-3)
    assert reference(METHOD_CASES[0].alone, STEPS).losses[0]["aux/combination"] > 0
    held = reference(HOLD_CASES[0].alone, STEPS)
    assert held.norms[0] < 0.95 * plain.norms[0]  # what is frozen counts in no norm
    name = "mmmoe.trunk.blocks.2.attention.out.weight"  # not frozen, so it is pulled
    assert np.abs(held.parameters[name][1][0][1] - plain.parameters[name][1][0][1]).max() > 1e-4
    for name in ("experts.up_bias", "experts.down_bias", "router.logit_bias", "shared.gate.weight"):
        trained = [key for key in other.moments if key.endswith(f"ffn.{name}")]
        assert trained and all(other.moments[key][1][0][1].any() for key in trained), name
    fused = {key: held for key, held in reference(FUSION_CASES[0].alone, STEPS).moments.items() if ".fusions." in key}
    assert {key.split(".")[2] for key in fused} == FUSED.keys() - {"early"}
    assert all(held[1][0][1].any() for held in fused.values())
    parameters = reference(FUSION_CASES[0].alone, STEPS).parameters
    scores = [parameters[f"modulations.late.score_{part}"][1][0][1].item() for part in ("image", "audio")]
    assert min(scores) > 0 and scores[0] != pytest.approx(scores[1], rel=1e-3)


def test_the_vectors_of_banks_are_trained_by_samples_of_their_combination() -> None:
    """Those of ``GLOBAL``, in which no sample is an image alone; negatives among them."""
    moments = reference(FUSION_CASES[0].alone, STEPS).moments
    banks = {key.partition(".banks.")[2]: held[1][0][1] for key, held in moments.items() if ".banks." in key}
    expected = {
        "tensor": "audio given image-text, text given audio-image, image given text, audio given text, "
        "image given audio-text, image given audio, text given audio",
        "low_rank": "image given text, text given image",
        "latents": "image given audio, audio given image",
    }
    found = {f"{name}.parts.{way.replace(' given ', '.given.')}"
             for name, ways in expected.items() for way in ways.split(", ")}  # fmt: skip
    assert {key for key, moment in banks.items() if moment.any()} == found
    assert len(banks) == 9 + 2 + 2


def test_half_precision_trains_like_fp32() -> None:
    """bf16 keeps 8 bits of each activation: losses stay within 5% of fp32 over ten steps, in which they fall."""
    runs = [(dataclasses.replace(ALONE, precision=kind, moe=FIXED_ROUTING), 10) for kind in ("fp32", "bf16")]
    fp32, bf16 = ([step["total"] for step in found.losses] for found in start_ranks(1, runs, 90)[0])
    assert fp32[-1] < 0.9 * fp32[0]
    np.testing.assert_allclose(bf16, fp32, rtol=0.05)
