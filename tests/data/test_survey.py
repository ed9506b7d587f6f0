"""What shards hold is counted, and data that no objective can use is refused before training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmmoe_pretrain.data.shards import ShardFolder
from mmmoe_pretrain.data.survey import refuse_useless, survey
from tests.data.test_shards import write_tar
from tests.support import tiny_config

CAPTION, LABEL = json.dumps({"caption": "red"}).encode(), json.dumps({"label": "red"}).encode()


def folders(root: Path, *kinds: dict[str, bytes]) -> list[ShardFolder]:
    members = [(f"k{i}.{name}", data) for i, kind in enumerate(kinds) for name, data in kind.items()]
    root.mkdir(exist_ok=True)
    write_tar(root / "x.tar", members)
    return [ShardFolder(root)]


def refused(found: list[ShardFolder], root: Path, pairs: dict[str, float], **sections: Any) -> list[str]:
    objectives = {"contrastive": {"pairs": pairs}}
    config = tiny_config(root, objectives=objectives, **sections)
    return refuse_useless(found, survey(found), config)


def test_samples_are_counted_by_modality_and_files_left_out_by_extension(tmp_path: Path) -> None:
    kinds = [{"png": b"", "txt": b""}] * 2 + [{"left.png": b"", "right.png": b"", "cls": b"", "json": CAPTION}]
    found = survey(folders(tmp_path, *kinds, {"npy": b"", "cls": b""}))
    assert found.samples == 4
    assert found.modalities == {("image", "text"): 3, (): 1}
    assert found.unread == {"cls": 2, "right.png": 1, "npy": 1}
    assert found.content() == "image+text 3, nothing 1"
    assert found.left_out().startswith("cls (2), ")


@pytest.mark.parametrize(
    ("kind", "served"),
    [
        ({"png": b"", "txt": b"x"}, True),
        ({"tif": b"", "caption.txt": b"x"}, True),
        ({"png": b"", "json": CAPTION}, True),
        ({"png": b"", "json": LABEL}, False),
        ({"png": b"", "json": b"{"}, False),
        ({"pgm": b"", "txt": b"x"}, False),
    ],
)
def test_data_that_no_objective_can_use_is_refused(tmp_path: Path, kind: dict[str, bytes], served: bool) -> None:
    found = folders(tmp_path / "shards", *[kind] * 3)
    if served:
        assert refused(found, tmp_path, {"image-text": 1.0, "audio-text": 1.0}) == ["contrastive audio-text"]
        return
    with pytest.raises(ValueError, match=r"contrastive image-text needs image and text.* 3 samples hold: "):
        refused(found, tmp_path, {"image-text": 1.0})


def test_labels_serve_where_they_stand_for_texts(tmp_path: Path) -> None:
    found = folders(tmp_path / "shards", {"png": b"", "json": LABEL})
    data = tiny_config(tmp_path).data.model_dump()
    assert refused(found, tmp_path, {"image-text": 1.0}, data={**data, "label_text": 0.5}) == []


def test_one_caption_among_many_jsons_is_found_before_a_run_is_refused(tmp_path: Path) -> None:
    kinds = [{"png": b"", "json": b"{}"}] * 50 + [{"png": b"", "json": CAPTION}] + [{"png": b"", "json": b"{}"}] * 50
    found = folders(tmp_path / "shards", *kinds)
    assert refused(found, tmp_path, {"image-text": 1.0}) == []
