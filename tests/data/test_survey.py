"""What shards hold is counted, and data that no objective can use is refused before training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmmoe_pretrain.data.sources.source import Indexed, open_indexed
from mmmoe_pretrain.data.sources.survey import refuse_useless, survey
from mmmoe_pretrain.modalities import Modalities, build_modalities
from mmmoe_pretrain.objectives import build_objectives
from tests.support import objectives, tiny_config, tiny_values, write_tar

CAPTION, LABEL = json.dumps({"caption": "red"}).encode(), json.dumps({"label": "red"}).encode()


def folders(root: Path, *kinds: dict[str, bytes], modalities: Modalities | None = None) -> list[Indexed]:
    members = [(f"k{i}.{name}", data) for i, kind in enumerate(kinds) for name, data in kind.items()]
    root.mkdir(exist_ok=True)
    write_tar(root / "x.tar", members)
    return [open_indexed(root, modalities=modalities)]


def refused(found: list[Indexed], root: Path, pairs: dict[str, float], **sections: Any) -> list[str]:
    config = tiny_config(root, **{"objectives": objectives({"pairs": pairs}, None), **sections})
    modalities = build_modalities(config.modalities, decoding=False)
    needs = build_objectives(config.objectives, modalities, config.representations).needs()
    return refuse_useless(found, survey(found), needs)


def test_samples_are_counted_by_modality_and_files_left_out_by_extension(tmp_path: Path) -> None:
    kinds = [{"png": b"", "txt": b""}] * 2 + [{"left.png": b"", "right.png": b"", "cls": b"", "json": CAPTION}]
    found = survey(folders(tmp_path, *kinds, {"npy": b"", "cls": b""}))
    assert found.samples == 4
    assert found.modalities == {("image", "text"): 3, (): 1}
    assert found.unread == {"right.png": 1, "npy": 1}  # cls holds the class
    assert found.content() == "image+text 3, nothing 1"
    assert found.left_out() == "right.png (1), npy (1)"


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
    modalities = tiny_values(tmp_path)["modalities"]
    modalities["text"] |= {"label_probability": 0.5}
    known = build_modalities(tiny_config(tmp_path, modalities=modalities).modalities, decoding=False)
    found = folders(tmp_path / "shards", {"png": b"", "json": LABEL}, modalities=known)
    assert refused(found, tmp_path, {"image-text": 1.0}) == []


def test_the_texts_of_documents_count(tmp_path: Path) -> None:
    pages = {"png": b"", "json": json.dumps({"parts": [{"member": "png"}, {"text": "red"}]}).encode()}
    found = folders(tmp_path / "shards", pages)
    assert survey(found).modalities == {("image", "text"): 1}
    reading = {"reading": {"kind": "next_token"}}
    assert refused(found, tmp_path, {}, objectives=reading) == []
    with pytest.raises(ValueError, match="reading of text needs text"):
        refused(folders(tmp_path / "images", {"png": b""}), tmp_path, {}, objectives=reading)


def test_the_modality_that_a_part_names_counts(tmp_path: Path) -> None:
    """Of a file that either of two modalities could read."""
    pages = {"1.png": b"", "json": json.dumps({"parts": [{"member": "1.png", "modality": "right"}]}).encode()}
    images = {name: {"kind": "image", "size": 16} for name in ("left", "right")}
    texts = {"text": {"kind": "text"}}
    sections: dict[str, Any] = {"modalities": {**images, **texts}, "objectives": {"reading": {"kind": "next_token"}}}
    known = build_modalities(tiny_config(tmp_path, **sections).modalities, decoding=False)
    found = folders(tmp_path / "shards", pages, modalities=known)
    assert survey(found).modalities == {("right",): 1}


def test_of_many_jsons_a_bounded_number_is_read_before_a_run_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmmoe_pretrain.data.sources.survey.LOOKED_AT_ALL", 2)
    monkeypatch.setattr("mmmoe_pretrain.data.sources.survey.SEARCHED", 10)
    reads, inner = [], Indexed.read

    def read(source: Indexed, i: int, only: Any = None) -> Any:
        reads.append(i)
        return inner(source, i, only)

    monkeypatch.setattr(Indexed, "read", read)
    kinds = [{"png": b"", "json": b"{}"}] * 60 + [{f"{n}.png": b"", "json": b"{}"} for n in range(3)]
    found = folders(tmp_path / "shards", *kinds)
    with pytest.raises(ValueError, match="of each source 10 JSONs at most were searched"):
        refused(found, tmp_path, {"image-text": 1.0})
    assert 2 <= len(reads) <= 2 + 10


def test_one_caption_among_many_jsons_is_found_before_a_run_is_refused(tmp_path: Path) -> None:
    kinds = [{"png": b"", "json": b"{}"}] * 50 + [{"png": b"", "json": CAPTION}] + [{"png": b"", "json": b"{}"}] * 50
    found = folders(tmp_path / "shards", *kinds)
    assert refused(found, tmp_path, {"image-text": 1.0}) == []
