"""What ``mmmoe-data preview`` and ``index`` say of a run, of shards and of streams."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmmoe_pretrain import config as run_config
from mmmoe_pretrain.data_prep import index, preview
from mmmoe_pretrain.modalities import build_modalities
from tests.support import things, tiny_config, tiny_values, write_shards


@pytest.mark.parametrize("stream", [False, True])
def test_a_preview_counts_what_a_run_reads(
    tmp_path: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str], stream: bool
) -> None:
    rows = things(16)
    for part in range(2):
        write_shards(tmp_path / f"{part}", rows[part::2], lacking=("audio",) if part else ())
    second = f"pipe:cat {tmp_path}/1/00000.tar" if stream else str(tmp_path / "1")
    train = [{"path": str(tmp_path / "0"), "weight": 3}, {"path": second, "weight": 1}]
    data = {**tiny_values(tiny_data)["data"], "train": train}
    config = tiny_config(tiny_data, data=data, train={"steps": 8, "global_batch_size": 8, "num_microbatches": 1})
    found = preview.preview(config, build_modalities(config.modalities, config.data.tokenizer), 64, 2)
    assert found.samples == 64 and len(found.tokens) == 8
    assert {path: share.samples for path, share in found.sources.items()} == {str(tmp_path / "0"): 48, second: 16}
    assert {name: share.samples for name, share in found.modalities.items()} == {"image": 64, "text": 64, "audio": 48}
    assert found.epochs[str(tmp_path / "0")] == pytest.approx(48 / 8)
    preview._print(found, config, 2)
    assert ("not known" in capsys.readouterr().out) == stream, "epochs of a stream"
    assert sum(share.tokens for share in found.sources.values()) == sum(found.tokens)


def test_a_preview_has_a_row_for_each_part_and_the_shares_of_a_schedule(
    tmp_path: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # short paths, on one line
    write_shards(tmp_path / "mixed/0", things(12))
    write_shards(tmp_path / "more", things(6))
    write_shards(tmp_path / "mixed/1", things(4), lacking=("audio",))
    train = [
        {"path": "mixed/{0,1}/00000.tar", "split_by": "modalities"},
        {"path": "more", "weight": [[0, 0.0], [4, 0.0], [5, 1.0]]},
    ]
    data = {**tiny_values(tiny_data)["data"], "train": train, "lanes": 1}
    config = tiny_config(tiny_data, data=data, train={"steps": 8, "global_batch_size": 8, "num_microbatches": 1})
    run_config.dump(config, tmp_path / "run.yaml")
    with pytest.raises(ValueError, match="does not divide into"):
        preview.run(tmp_path / "run.yaml", ["train.global_batch_size=12"], 12, 8)
    preview.run(tmp_path / "run.yaml", ["train.global_batch_size=12"], 12)
    assert "longest of 6 data-parallel ranks" in capsys.readouterr().out
    preview.run(tmp_path / "run.yaml", [], 64, 1)
    rows = [
        [cell.strip() for cell in line.split("\u2502")[1:-1]]
        for line in capsys.readouterr().out.splitlines()
        if "mixed/" in line or "more " in line
    ]
    paths = [f"{train[0]['path']} [{held}]" for held in ("image+audio+text", "image+text")] + [train[1]["path"]]
    assert sorted(row[0] for row in rows[:3]) == sorted(paths), "samples and tokens of each part"
    # 12 and 4 samples of weight 1; the other has weight 0, at step 4 (a block of 6 samples, then 2) 0.5, then 1
    steps = [(12, 4, 0), (12, 4, 0), (6, 2, 4), (12, 4, 16), (12, 4, 16)]
    shares = zip(*([f"{held / sum(step):.1%}" for held in step] for step in steps), strict=True)
    assert rows[3:] == [[path, *its] for path, its in zip(paths, shares, strict=True)], "at steps 0, 3, 4, 5 and 7"


def test_a_preview_tells_a_path_that_is_named_twice_apart(
    tmp_path: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shards(tmp_path / "a", things(8))
    path = str(tmp_path / "a")
    train = [{"path": path, "weight": [[0, 1.0], [4, 1.0], [5, 3.0]]}, {"path": path}]
    data = {**tiny_values(tiny_data)["data"], "train": train, "lanes": 1}
    config = tiny_config(tiny_data, data=data, train={"steps": 8, "global_batch_size": 8, "num_microbatches": 1})
    found = preview.preview(config, build_modalities(config.modalities, config.data.tokenizer), 64, 1)
    preview._print(found, config, 1)
    assert list(found.epochs) == list(found.sources) == [path, f"{path} (2)"]
    assert sum(share.samples for share in found.sources.values()) == 64
    assert capsys.readouterr().out.replace("\n", "").count("(2)") == 2, "a row of samples, and one of shares"


def test_an_index_of_a_config_takes_overrides(
    tmp_path: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shards(tmp_path / "other", things(4))
    run_config.dump(tiny_config(tiny_data), tmp_path / "run.yaml")
    index.run([str(tmp_path / "run.yaml"), f"data.train=[{{path: {tmp_path / 'other'}}}]"], 1, lengths=False)
    assert "other: 4 samples in 1 shard," in capsys.readouterr().out.replace("\n", "")


def test_an_index_of_a_config_says_which_field_and_lengths_it_has(
    tmp_path: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shards(tmp_path / "other", [{**row, "language": "de" if i else "en"} for i, row in enumerate(things(4))])
    run_config.dump(tiny_config(tiny_data), tmp_path / "run.yaml")
    train = f"data.train=[{{path: {tmp_path / 'other'}, split_by: language}}]"
    for _ in range(2):
        index.run([str(tmp_path / "run.yaml"), train], 1, lengths=True)
        first, lengths, field = capsys.readouterr().out.splitlines()[:3]
        assert first.startswith(f"{tmp_path / 'other'}: 4 samples")
        assert lengths.startswith("  lengths: ") and field == "  language: de 3, en 1"
    path = Path(lengths.removeprefix("  lengths: "))
    known = path.stat().st_mtime_ns
    write_shards(tmp_path / "other", [{**row, "language": "en"} for row in things(4)])  # of the same sizes
    index.run([str(tmp_path / "run.yaml"), train], 1, lengths=True)
    assert "  language: en 4" in capsys.readouterr().out and path.stat().st_mtime_ns > known
