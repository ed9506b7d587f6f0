"""From a router's decision to its sums: values by hand, and a loop over tokens in fp64."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mmmoe_pretrain.config.moe import MoEConfig, RoutingLossConfig
from mmmoe_pretrain.moe.loss_sums import combination_sums, orthogonality, sequence_balance, smooth_load
from mmmoe_pretrain.moe.losses import TERMS, layer_losses, routing_losses
from mmmoe_pretrain.moe.router import Router
from mmmoe_pretrain.moe.routing import MASKED
from tests.moe.plain_losses import PlainRouting
from tests.moe.routing_inputs import NAMES, hand_stats, inputs_of, tokens_of

D = 6
COMBINED = dataclasses.replace(NAMES, combinations=(("image",), ("audio",), ("text",)))
EVERY_TERM = dict.fromkeys(TERMS, 1)
GROUPS = [{"modalities": ["image"], "num_experts": 2}, {"modalities": ["text", "audio"], "num_experts": 3},
          {"modalities": ["image", "audio", "text"], "num_experts": 1}]  # fmt: skip


def make_config(**settings: Any) -> MoEConfig:
    return MoEConfig.model_validate({"num_experts": 6, "experts_per_token": 2, **settings})


def make_router(config: MoEConfig, seed: int = 0) -> Router:
    router = Router(config, D, 0, NAMES)
    torch.nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(seed))
    return router


def phi(x: float) -> float:
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


def load_of(logits: list[float], top_k: int, allowed: list[bool] | None = None, **noise: Tensor) -> list[float]:
    """The smooth load of one token."""
    inputs = dataclasses.replace(inputs_of(torch.tensor([logits]), experts_per_token=top_k), **noise)
    return smooth_load(inputs, torch.tensor([allowed or [True] * len(logits)]))[0].tolist()


def test_smooth_load_is_the_chance_to_beat_the_kth_logit_under_noise_of_one_over_e() -> None:
    assert load_of([0.5, 0.0], top_k=1) == pytest.approx([0.5, phi(-0.5 * 2)])
    assert load_of([1.0, 0.5, 0.25], top_k=2) == pytest.approx([phi(0.5 * 3), 0.5, phi(-0.25 * 3)])
    masked = load_of([0.5, MASKED, 0.0], top_k=2, allowed=[True, False, True])
    assert masked == pytest.approx([phi(0.5 * 3), 0, 0.5])  # none where a token may not choose the expert


def test_smooth_load_of_noisy_top_k_has_its_learned_noise_and_its_noisy_threshold() -> None:
    noise = {"noise_std_nE": torch.tensor([[1.0, 2.0]]), "normal_nE": torch.tensor([[-1.0, 0.0]])}
    load = load_of([0.5, 0.0], top_k=1, **noise)
    assert load == pytest.approx([phi(0.5), 0.5])  # the noisy logits are -0.5 and 0, so eta is 0
    del noise["normal_nE"]  # outside training
    assert load_of([0.5, 0.0], top_k=1, **noise) == pytest.approx([0.5, phi(-0.25)])


def test_sequence_balance_by_hand() -> None:
    """Segment 9, whose tokens lie apart, is even over two experts; segment 4 has both tokens on one."""
    p = torch.tensor([[1.0, 0], [1, 0], [0, 1], [1, 0]])  # and so are the assignments
    segments, all_allowed = torch.tensor([9, 4, 9, 4]), torch.ones(4, 2).bool()
    assert sequence_balance(p, p, segments, all_allowed).tolist() == [1 + 2, 2]
    assert sequence_balance(p, torch.zeros(4, 2), segments, all_allowed).tolist() == [0, 2]


def test_tokens_by_combination_and_what_drives_them_by_hand() -> None:
    """Experts choose with logits whose softmax is written down; the third token's sample lacks nothing."""
    p = [[0.5, 0.25, 0.25], [0.125, 0.5, 0.375], [0.1, 0.1, 0.8], [0.25, 0.5, 0.25]]
    tokens = dataclasses.replace(tokens_of([0, 0, 1, 1]), names=COMBINED,
                                 combination_ids_n=torch.tensor([0, 0, -1, 1]))  # fmt: skip
    found = combination_sums(torch.tensor(p).log(), torch.tensor([[0], [1], [2], [1]]), tokens)
    expected = [[math.log(2) + math.log(8), 2, 1], [math.log(2), 1, 1], [0, 0, 0]]
    assert found.tolist() == [pytest.approx(row) for row in expected]
    stats = dataclasses.replace(hand_stats([[0, 0]] * 3, [[0, 0]] * 3, [2, 2, 0]), combination_C3=found)
    losses = layer_losses(stats, RoutingLossConfig(combination=0.5))
    assert losses["combination"].item() == pytest.approx(0.5 * 5 * math.log(2) / 4)  # over all four tokens
    nothing = combination_sums(torch.zeros(0, 3), torch.zeros(0, 1, dtype=torch.int64), dataclasses.replace(
        tokens_of([]), names=COMBINED, combination_ids_n=torch.zeros(0, dtype=torch.int64)))  # fmt: skip
    assert nothing.tolist() == [[0, 0, 0]] * 3


def test_routers_of_equal_direction_are_not_orthogonal() -> None:
    assert orthogonality(torch.tensor([[2.0, 0], [0, 5]])).item() == pytest.approx(0)
    assert orthogonality(torch.tensor([[2.0, 0], [5, 0]])).item() == pytest.approx(2 / 4)
    diagonal = torch.tensor([[2.0, 0], [5, 5]])  # cosine 1/sqrt 2
    assert orthogonality(diagonal).item() == pytest.approx(2 * 0.5 / 4)
    zeros = torch.zeros(3, D, requires_grad=True)
    orthogonality(zeros).backward()
    assert zeros.grad.isfinite().all()


@pytest.mark.parametrize("groups", [[], GROUPS], ids=["free", "groups"])
def test_every_term_and_its_gradient_equal_a_loop_over_tokens(groups: list[Any]) -> None:
    generator = torch.Generator().manual_seed(1)
    modalities = [0, 2, 0, 1, 0, 2, 2, 0, 1]
    segments = [0, 0, 0, 3, 3, 5, 5, 5, 5]
    x = torch.randn(len(modalities), D, generator=generator)
    combinations = [0, 2, -1, -1, 1, 2, 2, 0, 2]  # numbers of experts that these tokens reach, or of none
    tokens = dataclasses.replace(tokens_of(modalities, segments=segments), names=COMBINED,
                                 combination_ids_n=torch.tensor(combinations))  # fmt: skip
    for scope in ("microbatch", "sequence"):
        by_modality = ["importance", "load", "z"] + (["balance"] if scope == "microbatch" else [])
        for per_modality in ([], by_modality):
            losses = {**EVERY_TERM, "balance_scope": scope, "per_modality": per_modality}
            config = make_config(losses=losses, expert_groups=groups)
            router = make_router(config)
            ours = layer_losses(router(x, tokens).stats, config.losses)
            weight = router.weight.detach().double().requires_grad_()
            plain = PlainRouting(config, weight, x.double(), modalities)
            theirs = expected(plain, per_modality, scope, segments)
            theirs["combination"] = -sum(plain.p[t][e].log() for t, e in enumerate(combinations) if e >= 0) / 9
            assert theirs.keys() == ours.keys()
            for name, value in theirs.items():
                assert_close_with_gradients(name, ours[name], router.weight, value, weight)


def expected(plain: PlainRouting, per_modality: list[str], scope: str, segments: list[int]) -> dict[str, Tensor]:
    terms = {"importance": lambda tokens: plain.unevenness(plain.p, tokens),
             "load": lambda tokens: plain.unevenness(plain.load, tokens),
             "balance": plain.balance, "z": plain.z_loss}  # fmt: skip
    everything = list(range(len(segments)))
    values = {"orthogonality": plain.orthogonality()}
    for i, m in enumerate(NAMES.modalities):
        values[f"local_entropy/{m}"] = plain.local_entropy(plain.tokens_of(i)) / 3
        values[f"global_entropy/{m}"] = plain.global_entropy(plain.tokens_of(i)) / 3
    for name, term in terms.items():
        if name in per_modality:
            values |= {f"{name}/{m}": term(plain.tokens_of(i)) / 3 for i, m in enumerate(NAMES.modalities)}
        elif name == "balance" and scope == "sequence":
            runs = [[t for t in everything if segments[t] == s] for s in sorted(set(segments))]
            values[name] = sum(term(run) for run in runs) / len(runs)
        else:
            values[name] = term(everything)
    return values


def assert_close_with_gradients(
    name: str, ours: Tensor, weight: Tensor, theirs: Tensor, plain_weight: Tensor
) -> None:
    # The router works in fp32: a few units in the last place of sums over nine tokens.
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(ours.double(), theirs, **close, msg=lambda text: f"{name}: {text}")
    (mine,) = torch.autograd.grad(ours, weight, retain_graph=True)
    (reference,) = torch.autograd.grad(theirs, plain_weight, retain_graph=True)
    assert reference.abs().max() > 1e-3, f"{name}: a gradient of nothing proves nothing"
    torch.testing.assert_close(mine.double(), reference, **close, msg=lambda text: f"gradient of {name}: {text}")


@pytest.mark.parametrize("router", ["softmax_top_k", "sigmoid_top_k", "noisy_top_k", "expert_choice", "hash"])
@pytest.mark.parametrize("scope", ["sequence", "global_batch"])
def test_losses_and_gradients_are_finite_at_the_edges(router: str, scope: str) -> None:
    losses = {**EVERY_TERM, "balance_scope": scope, "per_modality": ["importance", "z"]}
    losses["load"] = losses["combination"] = float(router not in ("hash", "expert_choice"))
    cases = {"no tokens": [], "one token": [1], "no audio": [0, 0, 2], "all": [0, 1, 2, 2]}
    for groups in [[]] if router == "hash" else [[], GROUPS]:
        config = make_config(router=router, losses=losses, expert_groups=groups)
        for scale in (1.0, 1e4):  # logits of 1e4 send everything to one expert
            made = make_router(config)
            made.weight.data.mul_(scale)
            if made.noise_weight is not None:
                made.noise_weight.data.fill_(-scale)  # a learned noise of nothing
            for name, modalities in cases.items():
                x = torch.ones(len(modalities), D)
                values = routing_losses([made(x, tokens_of(modalities)).stats], config.losses)
                made.zero_grad()
                sum(values.values()).backward()
                assert all(math.isfinite(v.item()) for v in values.values()), (name, scale, values)
                for parameter in made.parameters():
                    assert parameter.grad is None or parameter.grad.isfinite().all(), (name, scale)


def test_orthogonality_alone_reaches_the_router_and_nothing_else_needs_gradients() -> None:
    config = make_config(losses={"orthogonality": 1.0})
    router = make_router(config)
    stats = router(torch.randn(4, D), tokens_of([0, 1, 2, 2])).stats
    assert not stats.probability_MXE.requires_grad
    losses = layer_losses(stats, config.losses)
    losses["orthogonality"].backward()
    assert set(losses) == {"orthogonality"}
    assert router.weight.grad.abs().max() > 1e-3


def test_without_losses_no_sum_needs_gradients() -> None:
    stats = make_router(make_config(losses={}))(torch.randn(4, D), tokens_of([0, 1, 2, 2])).stats
    assert not stats.flatten().requires_grad
    assert not stats.load_ME.any() and not stats.sequence_balance.any()
