"""Small hand-made manifests: flat images, sine tones and a few texts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from mmmoe_pretrain.data_prep.rows.manifest import write_manifest
from mmmoe_pretrain.data_prep.rows.row import Row

TEXTS = ("A red square.", "Un carré rouge.", "Красный квадрат.", "Ένα κόκκινο τετράγωνο.", "赤い四角")


@pytest.fixture
def make_manifest(tmp_path: Path) -> Callable[..., Path]:
    """Makes a folder with ``count`` rows of image, audio and text; returns its manifest."""

    def make(count: int = 6) -> Path:
        root = tmp_path / "corpus"
        root.mkdir()
        Image.new("RGBA", (40, 20), (255, 0, 0, 128)).save(root / "square.png")
        rows = []
        for number in range(count):
            tone = np.sin(np.arange(800) * (0.1 + 0.01 * number)).astype("float32") / 2
            soundfile.write(root / f"{number}.wav", np.stack([tone, tone], axis=1), 8000)
            rows.append(Row(
                key=f"row-{number}", image="square.png", audio=f"{number}.wav", text=TEXTS[number % len(TEXTS)],
                language="en", audio_kind="speech", group=f"group-{number}",
                split=("train", "train", "test")[number % 3], subset=("odd", "even")[number % 2],
            ))  # fmt: skip
        write_manifest(root / "manifest.jsonl", rows)
        return root / "manifest.jsonl"

    return make
