"""`mmmoe-data codes`: it learns, is deterministic, measures what was not trained on, and says what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from mmmoe_pretrain.data_prep import codes
from mmmoe_pretrain.data_prep.codes import CodesOptions
from mmmoe_pretrain.data_prep.rows.manifest import write_manifest
from mmmoe_pretrain.data_prep.rows.row import Row
from mmmoe_pretrain.modalities.audio_codes import AudioCodes
from mmmoe_pretrain.modalities.audio_settings import AudioSettings
from mmmoe_pretrain.modalities.fsq import Codebook

SMALL: dict[str, Any] = {"levels": (4, 3, 3), "patch": (4, 4), "width": 8, "batch": 8}
PALETTE = np.asarray([[230, 30, 30], [30, 200, 60], [40, 60, 220], [240, 240, 240]])


def picture(rng: np.random.Generator) -> np.ndarray:
    """16 x 16 pixels in quarters of plain colours."""
    return PALETTE[rng.integers(0, 4, (2, 2))].repeat(8, axis=0).repeat(8, axis=1).astype(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    rows = []
    for number in range(60):
        PIL.Image.fromarray(picture(rng)).save(root / f"{number}.png")
        rows.append(Row(str(number), image=f"{number}.png", text="x", split="train" if number < 40 else "test"))
    write_manifest(root / "manifest.jsonl", rows)
    return root


def make(folder: Path, out: Path, steps: int, **more: Any) -> Codebook:
    options = CodesOptions(**SMALL, steps=steps, **more)
    codes.run([str(folder)], out, "image", ["size=16"], "train", "test", (), options, overwrite=True, as_json=True)
    return Codebook.read(out)


def test_training_lowers_the_held_out_error_and_says_how_it_was_made(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = make(folder, tmp_path / "a.npz", 1), make(folder, tmp_path / "b.npz", 150)
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [its["held_out"]["unexplained"] for its in told] == [
        b.made["held_out"]["unexplained"] for b in (before, after)
    ]
    assert after.made["held_out"]["unexplained"] < 0.2 < 0.5 < before.made["held_out"]["unexplained"]
    assert after.made["held_out"]["values"] <= 20 and after.made["values"] <= 40  # each distinct picture once
    assert 0 < after.made["held_out"]["used"] <= 1
    assert (told[1]["codes"], told[1]["max_tokens"]) == (36, 16)
    assert after.made["seed"] == 1 and after.media["size"] == 16 and not after.media["augment"]


def test_the_same_files_and_seed_give_the_same_tokenizer(folder: Path, tmp_path: Path) -> None:
    first, again, other = (make(folder, tmp_path / f"{n}.npz", 3, seed=s) for n, s in enumerate((1, 1, 2)))
    x = np.random.default_rng(3).normal(size=(3, 16, 16)).astype(np.float32)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    np.testing.assert_array_equal(first.encode(x), again.encode(x))


def test_measures_are_those_of_the_values_by_hand(folder: Path, tmp_path: Path) -> None:
    """Of values +1 and -1 in equal numbers the variance is 1; the squares are those of what ``decode`` gives."""
    its = make(folder, tmp_path / "codes.npz", 1)
    values = [np.full((3, 16, 16), sign, dtype=np.float32) for sign in (1.0, -1.0)]
    found = codes.measure(its, values)
    made = [its.decode(its.encode(value)) for value in values]
    assert found.error == pytest.approx(np.mean([(m - v) ** 2 for m, v in zip(made, values, strict=True)]), rel=1e-5)
    assert found.unexplained == pytest.approx(found.error, rel=1e-5)
    assert found.used == len({*its.encode(values[0]).ravel(), *its.encode(values[1]).ravel()}) / 36


def test_what_is_wrong_is_told_with_its_remedy(folder: Path, tmp_path: Path) -> None:
    def run(modality: str = "image", settings: tuple[str, ...] = ("size=16",), **changed: Any) -> None:
        given = {"out": tmp_path / "x.npz", "split": "train", **changed}
        codes.run([str(folder)], given["out"], modality, settings, given["split"], "test", (), CodesOptions(**SMALL))

    with pytest.raises(ValueError, match="--modality text: codes are of audio or image"):
        run("text")
    with pytest.raises(ValueError, match="'size' is not KEY=VALUE"):
        run(settings=("size",))
    with pytest.raises(ValueError, match=r"^--setting .size=.. is not valid YAML"):
        run(settings=("size={",))
    with pytest.raises(ValueError, match="the kind is that of --modality"):
        run(settings=("kind=audio",))
    with pytest.raises(ValueError, match=r"^--setting: .*wings.*known keys: "):
        run(settings=("wings=3",))
    with pytest.raises(ValueError, match="--held-out test is the split that is trained on"):
        run(split="test")
    with pytest.raises(ValueError, match="--rate nan must be numbers above 0"):
        CodesOptions(rate=float("nan"))
    with pytest.raises(ValueError, match=r"training diverged: .* lower --rate 1e\+09"):
        make(folder, tmp_path / "x.npz", 9, rate=1e9)
    with pytest.raises(ValueError, match="'nowhere' is not one of"):
        run(split="nowhere")
    with pytest.raises(ValueError, match=r"is not the name of a file that ends with \.npz"):
        run(out=tmp_path / "x.pt")
    with pytest.raises(ValueError, match="split train has 0 values of audio"):
        run("audio", ())
    with pytest.raises(ValueError, match=r"size 18 .* whole patches \[4, 4\]; give --setting size=16"):
        run(settings=("size=18", "patch=2"))
    with pytest.raises(ValueError, match="n_mels 20 are not whole patches of 8 bands; give --setting n_mels=24"):
        AudioCodes.check_patch(AudioSettings(n_mels=20), (8, 8))
    with pytest.raises(ValueError, match="--patch '4x4x4' is not ROWSxCOLUMNS"):
        codes.patch_of("4x4x4", "image")
    assert codes.patch_of("16x8", "audio") == (16, 8) and codes.patch_of("4", "image") == (4, 4)
    assert not (tmp_path / "x.npz").exists()
