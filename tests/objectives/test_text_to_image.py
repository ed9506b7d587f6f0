"""Text to image with a known right answer: shapes of one colour on another, named by four words. A tokenizer of codes
and a small model are trained for seconds; pixels of what is generated are measured."""

from __future__ import annotations

import io
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from mmmoe_pretrain.batch import Item, Sample, SampleMeta
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.config.evaluate import GenerateConfig
from mmmoe_pretrain.data.pack import PackSettings, pack
from mmmoe_pretrain.data_prep import codes as training
from mmmoe_pretrain.data_prep.codes import CodesOptions
from mmmoe_pretrain.generate.growing import Generated
from mmmoe_pretrain.generate.tasks import Prompt, Task
from mmmoe_pretrain.modalities.codes import Codes
from mmmoe_pretrain.modalities.fsq import Codebook, Levels, Network
from mmmoe_pretrain.models.pretraining import PretrainingModel
from tests.support import BEGIN, END, pack_settings, tiny_config

COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 70, 220), "white": (240, 240, 240)}
SIZE, PATCH, CODES = 16, 4, 60
ROWS, COLUMNS = np.mgrid[0:SIZE, 0:SIZE] - (SIZE - 1) / 2
SHAPES = {
    "square": np.maximum(np.abs(ROWS), np.abs(COLUMNS)) < 5,
    "cross": np.minimum(np.abs(ROWS), np.abs(COLUMNS)) < 2,
}
WORDS = {word: 4 + number for number, word in enumerate(["on", *SHAPES, *COLOURS])}
Scene = tuple[str, str, str]  # colour, shape, background
SCENES: list[Scene] = [
    (colour, shape, ground)
    for colour, shape, ground in itertools.product(COLOURS, SHAPES, COLOURS)
    if colour != ground
]


def drawn(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """uint8 [SIZE, SIZE, 3], with colours that vary a little."""
    colour, shape, ground = scene
    front, back = (np.asarray(COLOURS[name]) + rng.integers(-12, 13, 3) for name in (colour, ground))
    return np.clip(np.where(SHAPES[shape][..., None], front, back), 0, 255).astype(np.uint8)


def measured(pixels: np.ndarray) -> Scene:
    """What an image shows: the nearest colour of each pixel, the most frequent one at the border, the other one, and
    the shape whose pixels are most nearly those of it."""
    distance = [np.square(pixels.astype(float) - colour).sum(axis=-1) for colour in COLOURS.values()]
    nearest = np.argmin(distance, axis=0)
    border = np.concatenate([nearest[[0, 0, -1, -1], [0, -1, 0, -1]], nearest[[1, 1, -2, -2], [1, -2, 1, -2]]])
    names = list(COLOURS)
    ground = int(np.bincount(border).argmax())
    others = np.bincount(nearest[nearest != ground], minlength=len(names))
    shape = max(SHAPES, key=lambda name: (SHAPES[name] == (nearest != ground)).mean())
    return names[int(others.argmax())], shape, names[ground]


def test_measuring_finds_what_was_drawn() -> None:
    rng = np.random.default_rng(0)
    assert [measured(drawn(scene, rng)) for scene in SCENES] == SCENES


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng, path = np.random.default_rng(1), tmp_path_factory.mktemp("codes") / "codes.npz"
    images = [drawn(scene, rng).transpose(2, 0, 1) / np.float32(127.5) - 1 for scene in SCENES for _ in range(8)]
    options = CodesOptions(levels=(5, 4, 3), patch=(PATCH, PATCH), width=16, steps=120, batch=24, rate=8e-3)
    network = Network(3, options.patch, options.width, Levels(options.levels))
    weights = training.train_network(network, [image.astype(np.float32) for image in images], options)
    Codebook(network, weights, {"kind": "image", "size": SIZE, "patch": PATCH, "augment": False}, {}).write(path)
    return path


def config_of(tokenizer: Path) -> RunConfig:
    picture = {"kind": "image_codes", "tokenizer": str(tokenizer), "codes": CODES, "max_tokens": (SIZE // PATCH) ** 2}
    values: dict[str, Any] = {
        "modalities": {"text": {"kind": "text", "max_tokens": 6}, "picture": picture},
        "objectives": {"drawing": {"kind": "next_token", "parts": ["text", "picture"], "loss_on": ["picture"]}},
        "model": {"hidden_size": 48, "num_layers": 2, "num_heads": 4, "ffn_hidden_size": 96, "embedding_size": 8},
        "moe": {"num_experts": 2, "expert_hidden_size": 96},
    }
    return tiny_config(tokenizer.parent, **values)


def text_of(scene: Scene) -> Item:
    colour, shape, ground = scene
    return Item("text", np.asarray([BEGIN, *(WORDS[word] for word in (colour, shape, "on", ground)), END]))


def sample_of(scene: Scene, value: np.ndarray) -> Sample:
    return Sample(SampleMeta("-".join(scene)), (text_of(scene), Item("picture", value)))


def greedy(model: PretrainingModel, settings: PackSettings, picture: Codes, scenes: list[Scene]) -> list[np.ndarray]:
    """The most probable code after each, without a cache."""
    began, end = picture.marks
    values = [np.asarray([began, end]) for _ in scenes]
    for _ in range(picture.settings.max_tokens):
        batch = pack([sample_of(scene, value) for scene, value in zip(scenes, values, strict=True)], settings)
        with torch.no_grad():
            x_nD, _ = model.mmmoe.run_stage(batch, None)
            last = torch.tensor(np.cumsum(batch.attention.lengths) - 1)
            logits = model.mmmoe.token_logits("drawing", x_nD[last], "picture").numpy()
        codes = np.where(picture.may_follow(logits.shape[1]), logits, -np.inf)[:, : picture.settings.codes].argmax(
            axis=1
        )
        values = [np.concatenate([value[:-1], [code, end]]) for value, code in zip(values, codes, strict=True)]
    return values


@pytest.mark.timeout(120)
def test_a_small_model_draws_what_a_text_says(tokenizer: Path) -> None:
    """After training right colours, shapes and backgrounds; the same model before it draws next to none of them."""
    config, rng = config_of(tokenizer), np.random.default_rng(2)
    settings, model = pack_settings(config), PretrainingModel(config)
    picture = settings.modalities["picture"]
    assert isinstance(picture, Codes)
    task = Task("drawing", model.mmmoe, settings, GenerateConfig())
    assert not task.is_text

    def png(pixels: np.ndarray) -> bytes:
        file = io.BytesIO()
        PIL.Image.fromarray(pixels).save(file, "png")
        return file.getvalue()

    def generated() -> list[tuple[Prompt, Generated]]:
        prompts = [task.begin(Sample(SampleMeta("-".join(scene)), (text_of(scene),)), ()) for scene in SCENES]
        return list(task.run([prompt for prompt in prompts if prompt is not None]))

    def shown() -> float:
        model.eval()
        made = [task.file(prompt, generated)[0] for prompt, generated in generated()]
        found = [measured(np.asarray(PIL.Image.open(io.BytesIO(data)))) for data in made]
        return float(np.mean([one == scene for one, scene in zip(found, SCENES, strict=True)]))

    assert shown() < 0.2  # one of 24 by chance
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    batches = []
    for _ in range(5):
        values = [picture.decode(png(drawn(scene, rng))) for scene in SCENES]
        samples = [sample_of(scene, value) for scene, value in zip(SCENES, values, strict=True) if value is not None]
        batches.append(pack(samples, settings))
    for step in range(100):
        model.train().begin_step(step)
        loss, _ = model(batches[step % len(batches)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert shown() > 0.9
    whole = greedy(model, settings, picture, SCENES)
    assert [its.ids for _, its in generated()] == [tuple(value[1:-1].tolist()) for value in whole]
