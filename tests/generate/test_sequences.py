"""Tokens appended one at a time give the logits of the forward pass over the whole stream."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmmoe_pretrain.batch import Batch, Sample
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.config.evaluate import GenerateConfig
from mmmoe_pretrain.data.pack import pack
from mmmoe_pretrain.generate.sequences import Sequences, dropless
from mmmoe_pretrain.generate.tasks import Prompt, Task
from mmmoe_pretrain.modalities.text import Text
from mmmoe_pretrain.models.pretraining import PretrainingModel
from tests.support import BEGIN, END, pack_settings, random_sample, tiny_config

# Both compute the same products over other numbers of rows, so sums have another order: a few units in the last place
# of fp32 (1.2e-7 relative) a layer. Logits here are about 1; measured 7e-7.
TOLERANCE = 1e-5
PARTS = ["image", "audio", "title", "text"]
MORE = {
    "capacity": {"moe": {"capacity_factor": 0.25}},
    "hash and learned positions": {"moe": {"router": "hash"}, "positions": "learned"},
    "task in the router, shared and identity experts": {
        "moe": {"task_conditioned": True, "shared_expert_hidden_size": 8, "identity_experts": 1}
    },
    "grouped queries": {"model": {"num_kv_heads": 1}},
    "sigmoid, all layers, two experts": {"moe": {"router": "sigmoid_top_k", "every": 1, "experts_per_token": 2}},
}


def config_of(parts: list[str] | None, **more: Any) -> RunConfig:
    positions = more.pop("positions", "rotary")
    text = {"kind": "text", "max_tokens": 12, "positions": positions}
    moe = {"num_experts": 4, "expert_hidden_size": 8, "every": 2, **more.pop("moe", {})}
    model = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "ffn_hidden_size": 16, **more.pop("model", {})}
    tasks = {
        "pairs": {"kind": "contrastive", "pairs": {"image-text": 1.0}},
        "captions": {"kind": "next_token", **({} if parts is None else {"parts": parts, "loss_on": ["text"]})},
    }
    modalities = {
        "image": {"kind": "image", "size": 16, "stem_channels": 8},
        "audio": {"kind": "audio", "max_seconds": 0.4, "stem_channels": 8},
        "title": text,
        "text": text,
    }
    return tiny_config(Path("unused"), modalities=modalities, objectives=tasks, moe=moe, model=model)


def model_of(config: RunConfig) -> PretrainingModel:
    model = PretrainingModel(config).eval()
    with torch.no_grad():  # choices that are clear, and differ from token to token
        for router in model.mmmoe.routers:
            router.weight.mul_(30.0)
    return model


def samples_of(config: RunConfig) -> list[Sample]:
    """Three of other lengths: the random texts have 1 to 7 pieces."""
    return [random_sample(seed, "iatt", config) for seed in (3, 4, 5)]


class Marked(Text):
    """A text whose marks are those of ``random_sample``, without a tokenizer."""

    marks = BEGIN, END  # type: ignore[assignment]

    def may_follow(self, vocab_size: int) -> np.ndarray:
        return np.arange(vocab_size) > END - 1


def task_of(model: PretrainingModel, **how: Any) -> Task:
    settings = pack_settings(model.mmmoe.config)
    text = Marked("text", settings.modalities["text"].settings)
    settings.modalities["text"] = text
    return Task("captions", model.mmmoe, settings, GenerateConfig(modality="text", **how))


def prompts_of(task: Task, samples: list[Sample], kept: list[int]) -> list[Prompt]:
    found = [task.prompt(sample, position=i, given=kept[i]) for i, sample in enumerate(samples)]
    return [prompt for prompt in found if prompt is not None]


def logits_of_forward(model: PretrainingModel, batch: Batch) -> list[Tensor]:
    """By segment, [tokens, V]."""
    x_nD, _ = model.mmmoe.run_stage(batch, None)
    return list(model.mmmoe.token_logits("captions", x_nD).split(batch.attention.lengths))


@pytest.mark.parametrize("more", MORE.values(), ids=MORE)
@torch.inference_mode()
def test_appended_tokens_have_the_logits_of_the_forward_pass(more: dict[str, Any]) -> None:
    config = config_of(PARTS, **more)
    model, samples = model_of(config), samples_of(config)
    compare(config, model, samples, [0, 0, 1])


@torch.inference_mode()
def test_documents_continue_their_positions() -> None:
    config = config_of(None)
    samples = [dataclasses.replace(sample, document=True) for sample in samples_of(config)]
    compare(config, model_of(config), samples, [1, 0, 0])


def compare(config: RunConfig, model: PretrainingModel, samples: list[Sample], kept: list[int]) -> None:
    """The last text of each sample, of which ``kept`` pieces are given, token by token against the forward pass."""
    task = task_of(model)
    values = [sample.items[-1].value for sample in samples]
    prompts = prompts_of(task, samples, kept)
    with dropless(model.mmmoe):
        batch = pack(samples, pack_settings(config))
        is_of_task = [list(model.mmmoe.objectives)[x] == "captions" for x in batch.task_ids.tolist()]
        expected = [its for its, of_it in zip(logits_of_forward(model, batch), is_of_task, strict=True) if of_it]
        places = [prompt.places for prompt in prompts]
        assert places == [1 + number for number in kept] and len(expected) == len(values)
        steps = max(len(value) - 1 - place for value, place in zip(values, places, strict=True))
        sequences = Sequences(model.mmmoe, task.name, task.packed(prompts), task.modality, places, room=steps)
        prefix = [len(whole) - (len(value) - 1) for whole, value in zip(expected, values, strict=True)]
        for step in range(steps + 1):
            for s, (value, place) in enumerate(zip(values, places, strict=True)):
                if place + step < len(value):  # the row of the last token that is there
                    row = expected[s][prefix[s] + place + step - 1]
                    torch.testing.assert_close(sequences.logits_SV[s], row, atol=TOLERANCE, rtol=TOLERANCE)
            if step < steps:
                next_ids = [int(v[min(p + step, len(v) - 1)]) for v, p in zip(values, places, strict=True)]
                sequences.append(torch.tensor(next_ids))
    assert steps > 2 and len({len(value) for value in values}) > 1
    assert 0.5 < max(logits.abs().max() for logits in expected) < 10


@torch.inference_mode()
def test_selected_sequences_go_on_as_before() -> None:
    config = config_of(PARTS)
    task, samples = task_of(model_of(config)), samples_of(config)

    def made(of: list[Sample]) -> Sequences:
        prompts = prompts_of(task, of, [0] * len(of))
        return Sequences(task.model, task.name, task.packed(prompts), task.modality, [1] * len(of), room=2)

    chosen, plain = made(samples), made([samples[2], samples[0], samples[2]])
    chosen.append(torch.tensor([5, 6, 7]))
    chosen.select(torch.tensor([2, 0, 2]))
    plain.append(torch.tensor([7, 5, 7]))
    torch.testing.assert_close(chosen.logits_SV, plain.logits_SV, atol=TOLERANCE, rtol=TOLERANCE)
    for sequences in (chosen, plain):
        sequences.append(torch.tensor([8, 9, 10]))
    torch.testing.assert_close(chosen.logits_SV, plain.logits_SV, atol=TOLERANCE, rtol=TOLERANCE)
    assert not torch.allclose(chosen.logits_SV[0], chosen.logits_SV[2], atol=1e-3)  # two copies that went apart


@torch.inference_mode()
def test_without_capacity_no_token_is_displaced_and_the_setting_comes_back() -> None:
    config = config_of(PARTS, moe={"capacity_factor": 0.25})
    model = model_of(config)
    batch = pack(samples_of(config), pack_settings(config))
    with dropless(model.mmmoe):
        _, (routing,) = model.mmmoe.run_stage(batch, None)
    assert routing.dropped_MX.sum() == 0
    _, (routing,) = model.mmmoe.run_stage(batch, None)
    assert routing.dropped_MX.sum() > 0


@torch.inference_mode()
@pytest.mark.parametrize(
    "how",
    [{"method": "greedy"}, {"method": "sample", "seed": 3, "temperature": 2.0}, {"method": "beam", "beams": 3}],
    ids=lambda how: how["method"],
)
def test_what_is_generated_does_not_depend_on_the_other_samples(how: dict[str, Any]) -> None:
    config = config_of(PARTS)
    task, samples = task_of(model_of(config), **how), samples_of(config)
    prompts = prompts_of(task, samples, [0, 0, 1])
    together = [generated.ids for _, generated in task.run(prompts)]
    assert together == [generated.ids for prompt in prompts for _, generated in task.run([prompt])]
    assert len(set(together)) == 3 and all(len(ids) <= 12 for ids in together)
