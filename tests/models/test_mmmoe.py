"""The model: what a token may see, what padding may do, and that nothing is left untouched."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

from mmmoe_pretrain import config as run_config
from mmmoe_pretrain.batch import Batch, Item
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.data.pack import pack
from mmmoe_pretrain.models.pretraining import PretrainingModel
from mmmoe_pretrain.objectives import step_counts
from tests.support import BEGIN, END, FUSED, objectives, pack_settings, random_batch, random_sample, tiny_config

ROOT = Path("unused")


FUSED_PAIRS = {"image-text": 1.0, "audio-text": 1.0, "image-audio": 0.5, **{f"{kind}-text": 1.0 for kind in FUSED}}


def config(**sections: object) -> RunConfig:
    return tiny_config(ROOT, **{"objectives": objectives(), **sections})


def fused_config(**sections: object) -> RunConfig:
    banked = {kind: {**FUSED[kind], "missing": "bank"} for kind in ("late", "tensor", "mult", "graph")}
    both = {**FUSED, **banked}
    return config(objectives=objectives({"pairs": FUSED_PAIRS}), representations=both, **sections)


@pytest.mark.parametrize("modalities", [["iat", "it"], ["t", "t"], ["a"], ["i", "a"], ["iat"], []])
def test_every_parameter_gets_a_gradient_in_batches_without_some_modality(modalities: list[str]) -> None:
    run = fused_config()
    model = PretrainingModel(run)
    loss, _ = model(random_batch(run, modalities))
    loss.backward()
    assert torch.isfinite(loss)
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def features_of(model: PretrainingModel, batch: Batch) -> torch.Tensor:
    output, _ = model.mmmoe(batch)
    return torch.stack([output.features[m] for m in ("image", "audio", "text", *FUSED) if m in output.features])


def test_a_sample_does_not_depend_on_its_neighbours_in_the_stream() -> None:
    run = fused_config()
    model = PretrainingModel(run).eval()
    samples = [random_sample(i, has, run) for i, has in enumerate(["iat", "at", "iat", "t"])]
    together = features_of(model, pack(samples, pack_settings(run)))
    for i, sample in enumerate(samples):
        alone = features_of(model, pack([sample], pack_settings(run)))
        # The same sums over shorter and longer padded rows: fp32 rounding only.
        torch.testing.assert_close(together[:, i], alone[:, 0], rtol=1e-4, atol=1e-5)


def test_a_caption_token_sees_its_prefix_and_nothing_after_itself() -> None:
    run = config()
    model = PretrainingModel(run).eval()
    sample = random_sample(0, "it", run)
    image, _ = sample.items

    def nll(image: Item, *ids: int) -> torch.Tensor:
        text = Item("text", torch.tensor([BEGIN, *ids, END]).numpy())
        batch = pack([dataclasses.replace(sample, items=(image, text))], pack_settings(run))
        return model.mmmoe(batch)[0].token_nll["captioning"]

    base, end = nll(image, 10, 11, 12, 13, 14, 15), nll(image, 10, 11, 12, 13, 14, 20)
    other_image = nll(Item("image", 255 - image.value), 10, 11, 12, 13, 14, 15)
    torch.testing.assert_close(base[:5], end[:5])  # targets 10 to 14 stand before the change
    assert not torch.isclose(base[5:], end[5:]).any()
    assert not torch.isclose(base, other_image).any()


def test_absent_modalities_have_zero_features_and_present_ones_unit_features() -> None:
    run = config()
    model = PretrainingModel(run)
    features = features_of(model, random_batch(run, ["iat", "it", "a"]))
    norms = features.norm(dim=-1)
    expected = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 1.0], [1.0, 1.0, 0.0]])
    torch.testing.assert_close(norms, expected)


def test_samples_that_lack_parts_are_fused_of_the_others_or_not_at_all() -> None:
    batches = ["iat", "it", "a", "t"]
    some, both = [1.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]
    for missing, here in (("allow", some), ("bank", some), ("skip", both)):
        no_bank = "allow" if missing == "bank" else missing
        fused = {kind: {**its, "missing": no_bank if kind == "early" else missing} for kind, its in FUSED.items()}
        run = config(objectives=objectives({"pairs": FUSED_PAIRS}), representations=fused)
        output, _ = PretrainingModel(run).mmmoe(random_batch(run, batches))
        for kind in FUSED:
            torch.testing.assert_close(output.features[kind].norm(dim=-1), torch.tensor(here), msg=kind)


def test_one_expert_is_a_dense_model_of_the_same_code() -> None:
    dense = config(moe={"num_experts": 1, "experts_per_token": 1, "expert_hidden_size": 16})
    model = PretrainingModel(dense)
    loss, report = model(random_batch(dense, ["iat", "it"]))
    assert report.routing == ()
    assert not any("router" in name for name, _ in model.named_parameters())
    assert torch.isfinite(loss)


def test_initial_weights_depend_on_the_seed_alone() -> None:
    first, torch_seed_differs = (PretrainingModel(config()) for _ in range(2))
    other_seed = PretrainingModel(config(seed=1))
    for (name, a), b, c in zip(first.named_parameters(), torch_seed_differs.parameters(),
                               other_seed.parameters(), strict=True):  # fmt: skip
        assert torch.equal(a, b), name
        if a.ndim >= 2:
            assert not torch.equal(a, c), name


def test_what_drives_tokens_to_the_expert_of_their_combination_does_not_depend_on_how_a_step_is_cut() -> None:
    """And texts, which are not among the modalities, are not driven; nor are tokens of complete samples."""
    losses = {"combination": 0.5, "combination_modalities": ["image", "audio"]}
    run = config(moe={"num_experts": 4, "expert_hidden_size": 8, "every": 1, "losses": losses})
    samples = [random_sample(i, has, run) for i, has in enumerate(["iat", "it", "it", "at", "it", "t"])]
    found = []
    for cut in ([range(6)], [range(1), range(1, 4), range(4, 6)], [[0], [5]]):
        batches = [pack([samples[i] for i in its], pack_settings(run)) for its in cut]
        model = PretrainingModel(run)
        model.begin_step(0, step_counts(batches, model.objectives, None, torch.device("cpu")))
        parts = [model(batch) for batch in batches]
        found.append(sum(report.losses["aux/combination"].item() for _, report in parts))
    assert found[0] == pytest.approx(found[1], rel=1e-6) and found[0] > 0 == found[2]


def renamed(run: RunConfig, names: dict[str, str], **sections: object) -> RunConfig:
    """The config with other names for its modalities and objectives."""
    text = json.dumps({**run.model_dump(mode="json"), **sections})
    for old, new in names.items():
        text = re.sub(rf'"{old}(?=["-])', f'"{new}', re.sub(rf'(?<=-){old}"', f'{new}"', text))
    values = json.loads(text)
    for section, kinds in (("modalities", run.modalities), ("objectives", run.objectives)):
        for name, settings in kinds.items():
            values[section][names.get(name, name)]["kind"] = settings.kind
    return run_config.parse(values)


def test_a_run_with_other_names_is_the_same_run() -> None:
    """Losses of the first steps; weights, packing and draws depend on kinds."""
    run = fused_config(moe={"num_experts": 4, "expert_hidden_size": 8, "task_conditioned": True,
                            "losses": {"local_entropy": 0.01, "balance": 0.01}})  # fmt: skip
    names = {"image": "photo", "audio": "sound", "text": "rows", "contrastive": "text", "captioning": "image"}
    other = renamed(run, names)
    assert other.stream_names.tasks == ("text", "image") and list(other.modalities) == ["photo", "sound", "rows"]
    samples = [random_sample(i, has, run) for i, has in enumerate(["iat", "at", "iat", "t"])]
    copies = [dataclasses.replace(s, items=tuple(Item(names[i.modality], i.value) for i in s.items)) for s in samples]
    totals = []
    for its, these in ((run, samples), (other, copies)):
        loss, report = PretrainingModel(its)(pack(these, pack_settings(its)))
        totals.append([loss.item(), *(value.item() for value in report.losses.values())])
    assert totals[0] == totals[1]


def test_an_added_modality_or_objective_changes_no_weights_of_the_others() -> None:
    run = config()
    values = run.model_dump(mode="json")
    values["modalities"] = {"depth": {"kind": "series", "channels": 2}, **values["modalities"]}
    values["objectives"]["text"] = {"kind": "next_token", "parts": ["text"]}
    more = dict(PretrainingModel(run_config.parse(values)).named_parameters())
    before = dict(PretrainingModel(run).named_parameters())
    assert {name.split(".")[2] for name in more.keys() - before.keys()} == {"depth"}
    for name, parameter in before.items():
        assert torch.equal(parameter, more[name]), name


@pytest.mark.parametrize("name", ["rows", "names", "set_rows", "weight", "bias", "stem", "all", "experts"])
def test_any_name_that_is_allowed_builds_a_model_that_trains(name: str) -> None:
    """Names are keys of modules, parameters and buffers."""
    balanced = {"rate": 0.1, "per_modality": True}
    run = config(
        moe={"num_experts": 4, "expert_hidden_size": 8, "task_conditioned": True, "bias_balancing": balanced}
    )
    other = renamed(run, {"text": name, "captioning": name})
    model = PretrainingModel(other)
    samples = [random_sample(i, "iat", run) for i in range(2)]
    copies = [dataclasses.replace(s, items=tuple(Item(name if i.modality == "text" else i.modality, i.value)
                                               for i in s.items)) for s in samples]  # fmt: skip
    loss, report = model(pack(copies, pack_settings(other)))
    loss.backward()
    model.end_step(report.routing)
    assert all(parameter.grad is not None for parameter in model.parameters())
    biases = {key: value for key, value in model.state_dict().items() if ".router.bias." in key}
    assert {key.rpartition(".")[2] for key in biases} == set(other.modalities)
    assert all(value.any() for value in biases.values())


def test_jitter_repeats_for_the_same_step_and_differs_between_its_forward_passes(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, moe={"num_experts": 4, "expert_hidden_size": 8, "jitter": 0.5})
    model, batch = PretrainingModel(config), random_batch(config, ["iat", "it"])

    def two_passes(step: int) -> list[float]:
        model.begin_step(step)
        return [model(batch)[0].item() for _ in range(2)]

    first, second = two_passes(3)
    assert first != second
    assert two_passes(3) == [first, second]
    assert two_passes(4)[0] != first
