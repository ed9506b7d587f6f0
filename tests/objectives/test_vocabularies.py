"""Tokens with a vocabulary of their own beside those of a tokenizer: heads, losses and scores, on any layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mmmoe_pretrain.batch import Item, Sample, SampleMeta
from mmmoe_pretrain.config import ParallelConfig, RunConfig
from mmmoe_pretrain.data.pack import pack
from mmmoe_pretrain.engines.apply import build_engine
from mmmoe_pretrain.evaluate.features import contents, held_out, vocabularies_of
from mmmoe_pretrain.models.costs import model_costs
from mmmoe_pretrain.models.pretraining import PretrainingModel
from mmmoe_pretrain.parallel.layout import resolve_layout
from mmmoe_pretrain.parallel.mesh import destroy_groups
from mmmoe_pretrain.parallel.runtime import process_group
from tests.distributed import groups_of, run_ranks
from tests.layouts.train import microbatches_of
from tests.support import pack_settings, tiny_config

TEXT = {"kind": "text", "max_tokens": 4}
PICTURE = {"kind": "image_codes", "tokenizer": "none.npz", "codes": 12, "max_tokens": 4}  # marks 12 and 13, of 16 ids
BOTH = {"kind": "next_token", "parts": ["text", "picture"]}
NAMES = ("text", "picture")


def config_of(modalities: dict[str, Any], **tasks: Any) -> RunConfig:
    moe = {"num_experts": 4, "expert_hidden_size": 8, "losses": {"balance": 0.01}}
    return tiny_config(Path("unused"), modalities=modalities, objectives=tasks, moe=moe)


def both(**more: Any) -> RunConfig:
    return config_of({"text": TEXT, "picture": PICTURE}, drawing={**BOTH, **more})


def sample(*codes: int, text: tuple[int, ...] = (5, 6)) -> Sample:
    items = [Item("text", np.asarray([1, *text, 2]))] if text else []
    items += [Item("picture", np.asarray([12, *codes, 13]))] if codes else []
    return Sample(SampleMeta("a"), tuple(items))


def test_targets_know_their_vocabulary_and_their_loss_is_within_it() -> None:
    """begin 5 6 | begin 3 0 7 2 predict 5 6 end and 3 0 7 2 end; rows 0 to 2 and 3 to 7, and of a second sample 8 to
    10 and 11 to 15. The reference takes each row's softmax over the ids of its own head."""
    config = both()
    model, batch = PretrainingModel(config), pack([sample(3, 0, 7, 2), sample(1, 1, 0, 9)], pack_settings(config))
    targets = batch.targets["drawing"]
    assert targets.rows.tolist() == list(range(16))
    assert targets.ids.tolist() == [5, 6, 2, 3, 0, 7, 2, 13, 5, 6, 2, 1, 1, 0, 9, 13]
    of = {name: which.tolist() for name, which in targets.of_vocabulary.items()}
    assert of == {"": [0, 1, 2, 8, 9, 10], "picture": [*range(3, 8), *range(11, 16)]}
    x_nD, _ = model.mmmoe.run_stage(batch, None)
    heads = {"": model.mmmoe.language_head, "picture": model.mmmoe.code_heads["picture"]}
    assert {name: head.weight.shape for name, head in heads.items()} == {"": (48, 16), "picture": (16, 16)}
    expected = torch.empty(16)
    for name, rows in of.items():
        for row in rows:
            expected[row] = -F.log_softmax(heads[name].weight @ x_nD[row], dim=0)[targets.ids[row]]
    nll = model.mmmoe.heads(x_nD, batch).token_nll["drawing"]
    torch.testing.assert_close(nll, expected, atol=1e-5, rtol=1e-5)  # of one product each, summed in another order
    loss, report = model(batch)
    assert report.losses["drawing"].item() == pytest.approx(expected.mean().item(), rel=1e-5)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for head in heads.values() for p in head.parameters())


def test_the_loss_of_texts_and_its_gradient_are_the_same_where_codes_exist() -> None:
    """Of the same samples of text, with a picture among the modalities and without, bit by bit."""
    reading = {"kind": "next_token", "parts": ["text"]}
    found = []
    for config in (
        config_of({"text": TEXT}, reading=reading),
        config_of({"text": TEXT, "picture": PICTURE}, reading=reading, drawing={**BOTH, "weight": 1e-9}),
    ):
        model = PretrainingModel(config)
        loss, report = model(pack([sample(text=(5, 6)), sample(text=(7,))], pack_settings(config)))
        report_of = report.losses["reading"]
        (gradient,) = torch.autograd.grad(loss, [model.mmmoe.language_head.weight])
        found.append((report_of, gradient))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    names = [
        {name for name, _ in PretrainingModel(config).named_parameters()}
        for config in (config_of({"text": TEXT}, reading=reading),)
    ]
    assert not any("code_heads" in name for name in names[0])


def test_only_vocabularies_that_are_predicted_have_a_head() -> None:
    model = PretrainingModel(both(loss_on=["picture"]))
    assert model.mmmoe.language_head is None and list(model.mmmoe.code_heads) == ["picture"]
    loss, report = model(pack([sample(3, 0, 7, 2), sample(text=(7,))], pack_settings(model.config)))
    assert torch.isfinite(loss) and report.losses["drawing"] > 0
    captions = config_of(
        {"text": TEXT, "picture": PICTURE},
        captions={"kind": "next_token", "parts": ["picture", "text"], "loss_on": ["text"]},
    )
    assert not PretrainingModel(captions).mmmoe.code_heads


def test_masked_codes_are_predicted_by_their_own_head() -> None:
    config = config_of({"picture": PICTURE}, masked={"kind": "masked", "hidden": {"picture": 0.5}})
    model, batch = PretrainingModel(config), pack([sample(3, 0, 7, 2, text=())], pack_settings(config))
    hidden = batch.hidden.nonzero().flatten().tolist()
    assert len(hidden) == 2 and not {0, 5} & set(hidden)  # never a mark
    assert batch.targets["masked"].ids.tolist() == [[12, 3, 0, 7, 2, 13][row] for row in hidden]
    assert batch.inputs["picture"]["ids"][torch.tensor(hidden)].tolist() == [12, 12]  # the begin mark says nothing
    assert model.mmmoe.language_head is None
    model(batch)[0].backward()


def test_scores_are_by_vocabulary() -> None:
    config = both()
    samples = [sample(3, 0, 7, 2), sample(1, 1, 0, 9)]
    batch, model = pack(samples, pack_settings(config)), PretrainingModel(config)
    with torch.no_grad():
        outputs, _ = model.mmmoe(batch)
    found = held_out(outputs, batch, contents(batch, samples, model.objectives), vocabularies_of(config)).predicted
    assert list(found) == ["drawing", "drawing[picture]"]
    assert (found["drawing"].tokens_G.tolist(), found["drawing[picture]"].tokens_G.tolist()) == ([3, 3], [5, 5])
    assert found["drawing[picture]"].targets_V.tolist() == [2, 2, 1, 1, 0, 0, 0, 1, 0, 1, 0, 0, 0, 2, 0, 0]
    total = outputs.token_nll["drawing"].sum().item()
    assert sum(its.nll_G.sum() for its in found.values()) == pytest.approx(total, rel=1e-5)


def test_heads_cost_by_their_own_vocabulary() -> None:
    """Per sample 5 targets of text with 48 ids and 5 of the picture with 16, of 10 tokens: 2 D V each, D = 16."""
    costs = [model_costs(both(**more)).last_extra for more in ({}, {"loss_on": ["picture"]}, {"loss_on": ["text"]})]
    assert costs == [2 * 16 * (5 * 48 + 5 * 16) / 10, 2 * 16 * 5 * 16 / 10, 2 * 16 * 5 * 48 / 10]


def test_a_vocabulary_that_tensor_parallelism_cannot_cut_is_told() -> None:
    config = both().model_copy(update={"parallel": ParallelConfig(tensor_parallel_size=3, expert_parallel_size=1)})
    with pytest.raises(ValueError, match=r"does not divide .*the vocabulary of modalities\.picture 16"):
        resolve_layout(config, 3)


LAYOUTS: dict[str, dict[str, Any]] = {
    "DP2": {},
    "EP2": {"expert_parallel_size": 2},
    "TP2": {"tensor_parallel_size": 2},
    "TP2 + SP": {"tensor_parallel_size": 2, "sequence_parallel": True},
    "PP2": {"pipeline_parallel_size": 2},
}


def losses_of(layouts: list[dict[str, Any]]) -> list[list[dict[str, float]]]:
    """On this rank of one or two, the losses of three steps under each layout; half of the ranks' samples have no
    picture, and some have no text."""
    found = []
    with process_group(timeout_minutes=1) as device:
        for layout in layouts:
            config = both().model_copy(update={"parallel": ParallelConfig(**{"expert_parallel_size": 1, **layout})})
            engine = build_engine(config, groups_of(config.parallel, config.moe.group_sizes), device)
            steps = [microbatches_of(engine, step, ["tp", "t", "tp", "t", "p", "t", "tp", "tp"]) for step in range(3)]
            found.append([engine.step(batches, 3e-3).losses for batches in steps])
            destroy_groups()
    return found


@pytest.mark.timeout(120)
def test_layouts_have_the_losses_of_one_process() -> None:
    """2e-5 as in tests/layouts, of losses that follow two updates."""
    (alone,) = run_ranks(1, losses_of, [{}])[0]
    for found in run_ranks(2, losses_of, list(LAYOUTS.values()), timeout=100.0):
        for layout, steps in zip(LAYOUTS, found, strict=True):
            for step, losses in enumerate(steps):
                assert losses == pytest.approx(alone[step], rel=2e-5), (layout, step)
