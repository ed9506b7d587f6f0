from __future__ import annotations

import errno
import io
import json
from dataclasses import replace

import numpy as np
import pytest
import soundfile
from PIL import Image

from mmmoe_pretrain.data.sources.source import open_indexed
from mmmoe_pretrain.data.sources.survey import survey
from mmmoe_pretrain.data_prep.inspect.measure import Kind, measure
from mmmoe_pretrain.data_prep.rows.manifest import read_manifest
from mmmoe_pretrain.data_prep.shards.shard import shard_rows
from mmmoe_pretrain.data_prep.shards.shard_files import EncodedSample, hash_file, write_shard, write_shard_list
from mmmoe_pretrain.data_prep.shards.writing import ShardOptions
from mmmoe_pretrain.data_prep.verify import Seen, run, split_specs, verify_folder
from mmmoe_pretrain.progress import Progress
from tests.data.servers import http_server
from tests.support import write_tar


def write(manifest, **changes):
    """The manifest's rows with these changes as shards, in the folder beside it."""
    rows = [replace(row, **changes) for row in read_manifest(manifest)]
    out = manifest.parent.parent / "out"
    shard_rows(rows, manifest.parent, out, ShardOptions(workers=1))
    return out


def png():
    buffer = io.BytesIO()
    Image.new("RGB", (40, 20), "red").save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def shards(make_manifest):
    return write(make_manifest(6))


def problems(folder):
    return list(verify_folder(folder, Seen()))


def test_fresh_shards_are_well_and_inspect_counts_the_same_in_them_and_in_their_manifest(shards):
    seen = Seen()
    assert list(verify_folder(shards, seen)) == []
    assert (seen.survey.samples, seen.shards) == (6, 2)
    [note] = seen.notes()
    assert note.startswith("no index of ")
    for split in ("train", "test"):
        open_indexed(shards / split)
    seen = Seen()
    assert [*verify_folder(shards, seen), *seen.notes()] == []
    of_manifest, of_shards = measure(shards.parent / "corpus").totals, measure(shards).totals
    assert of_manifest.keys() == of_shards.keys()
    kind = Kind("train", "odd", "en", "image+audio+text")  # rows 0 and 4 of 0, 1, 3, 4
    assert of_shards[kind].rows == of_manifest[kind].rows == 2
    assert of_shards[kind].seconds == pytest.approx(0.2)  # 2 x 800 samples at 8 kHz


def test_good_shards_from_elsewhere_are_well_and_what_is_not_read_is_noted(tmp_path):
    caption = json.dumps({"key": "000", "caption": "red", "group": 3}).encode()
    for shard in ("0", "1"):  # written side by side, so with equal keys
        members = [(f"set.v1/{i:03}.{name}", png()) for i in range(3) for name in ("left.jpg", "right.jpg", "cls")]
        write_tar(tmp_path / f"{shard}.tar", [*members, ("set.v1/003.jpg", png()), ("set.v1/003.json", b"{}")])
    write_tar(tmp_path / "2.tar", [("000.jpg", png()), ("000.json", caption)])
    seen = Seen()
    assert list(verify_folder(tmp_path, seen)) == []
    assert (seen.survey.samples, seen.shards) == (9, 3)
    notes = "\n".join(seen.notes())
    assert notes.startswith("not read: right.jpg (6)\n")
    assert "no shards.json in" in notes
    assert f"no index of {tmp_path}: it is made on first use" in notes
    totals, left_out = (measured := measure(tmp_path)).totals, measured.left_out
    assert left_out == "right.jpg (6)"
    assert {kind.modalities: total.rows for kind, total in totals.items()} == {"image": 8, "image+text": 1}


@pytest.mark.parametrize(
    ("members", "problem"),
    [
        ({"b.cls": b"7"}, "sample b has no image, audio or text (its files: cls)"),
        ({"b.txt": "\u200b \n".encode()}, "sample b has no image, audio or text"),
        ({"b.png": b"", "b.json": b"{"}, "sample b: json is damaged"),
        ({"b.png": b"", "b.json": b'{"caption": "half of \\ud83d"}'}, "sample b: json holds half of a character"),
        ({"b.0000.png": b"", "b.0001.png": b""}, "under the key 'b'"),
        ({"b.png": b"", "c.png": b"", "b.txt": b"red"}, "holds key 'b' twice"),
    ],
)
def test_what_the_loader_could_not_use_is_a_problem(tmp_path, members, problem):
    good = [("a.png", b""), ("a.txt", b" "), ("t.txt", b"a text")]
    write_tar(tmp_path / "0.tar", good)
    assert problems(tmp_path) == []
    write_tar(tmp_path / "0.tar", [*good, *members.items()])
    [found] = problems(tmp_path)
    assert problem in found
    assert str(tmp_path / "0.tar") in found


def test_verify_and_inspect_see_the_shards_that_the_loader_sees(tmp_path):
    pair = {"png": png(), "json": json.dumps({"key": "bucket/7", "transcript": "red", "label": 3}).encode()}
    for name in ("train/a.tar", "validation/sub/b.tar", "more/c.tar"):
        write_tar(tmp_path / name, [(f"0.{extension}", data) for extension, data in pair.items()])
    write_tar(tmp_path / "more/c.tar", [("0.png", b"x"), ("0.json", b"{")])
    (tmp_path / "validation/shards.json").write_text(json.dumps({"shardlist": [{"url": "sub/b.tar"}]}))
    (tmp_path / "train/d.tar.gz").touch()
    (tmp_path / "validation/e.tar").touch()
    seen = Seen()
    found = list(verify_folder(tmp_path, seen))
    assert (seen.survey.samples, seen.shards) == (3, 4)
    wanted = ("more/c.tar: sample 0: json", "validation/e.tar: not named", "validation/e.tar is not a whole tar")
    assert all(part in problem for problem, part in zip(found, wanted, strict=True))
    assert seen.survey.left_out() == "*.tar.gz (1)"
    totals, left_out = (measured := measure(tmp_path)).totals, measured.left_out
    assert {(kind.split, kind.modalities): total.rows for kind, total in totals.items()} == {
        ("train", "image+text"): 1, ("val", "image+text"): 1, ("(none)", "(damaged)"): 1,
    }  # fmt: skip
    assert sorted(left_out.split(", ")) == [
        f"*.tar not named in {tmp_path}/validation/shards.json (1)",
        "*.tar.gz (1)",
    ]
    folders = [open_indexed(tmp_path / name) for name in ("train", "validation", "more")]
    assert [len(folder) for folder in folders] == [1, 1, 1]
    assert survey(folders).left_out() == left_out


def test_the_json_of_another_sample_is_a_problem_of_shards_that_were_written_here(tmp_path):
    def written(key):
        sample = EncodedSample("a", {"png": b"", "json": json.dumps({"key": key}).encode()})
        write_shard_list(tmp_path, [write_shard(tmp_path / "0.tar", [sample])])
        return problems(tmp_path)

    assert written("a") == []
    [found] = written("b")
    assert "sample a has the json of 'b'" in found


@pytest.mark.parametrize("name", ["0.mp3", "0.flac"])
def test_every_format_of_audio_that_is_sharded_is_known(make_manifest, name):
    manifest = make_manifest(1)
    soundfile.write(manifest.parent / name, np.zeros(8000), 8000)
    out = write(manifest, audio=name)
    assert problems(out) == []
    assert [found.seconds for found in measure(out).totals.values()] == [pytest.approx(1.0)]


def test_a_flipped_byte_is_found(shards):
    path = shards / "train/train-000000.tar"
    data = bytearray(path.read_bytes())
    data[data.index(b"fLaC" if b"fLaC" in data else b"RIFF") + 100] ^= 1
    path.write_bytes(data)
    [found] = problems(shards)
    assert "00000.tar: xxh3_128 is" in found


def test_a_truncated_tar_and_an_index_of_another_shard_are_found(shards):
    path = shards / "train/train-000000.tar"
    data = path.read_bytes()
    for keep in (0.5, 0.97):
        path.write_bytes(data[: int(len(data) * keep)])
        assert any("bytes, shards.json says" in problem for problem in problems(shards))
    path.write_bytes(data)
    other = shards.parent / "other"
    other.mkdir()
    (other / path.name).write_bytes((shards / "test/test-000000.tar").read_bytes())
    open_indexed(other)
    (shards / "train/shards.index").write_bytes((other / "shards.index").read_bytes())
    [found] = problems(shards)
    assert "shards.index does not describe the members" in found
    (shards / "train/shards.index").write_bytes(b"x")
    [found] = problems(shards)
    assert "train/shards.index is too short; remove it" in found


def test_missing_and_unlisted_shards_and_leftovers_are_found(shards):
    (shards / "train/train-000000.tar").rename(shards / "train/train-000007.tar")
    (shards / "test/test-000001.tar.tmp").touch()
    found = "\n".join(problems(shards))
    assert "shards.json names train-000000.tar, which does not exist" in found
    assert "train-000007.tar: not named in shards.json" in found
    assert "left behind by a run that was killed or failed" in found


def test_a_shard_that_the_disk_does_not_give_is_a_problem_and_the_others_are_verified(shards, monkeypatch):
    def broken(path):
        if path.name.endswith("000000.tar"):
            raise OSError(errno.EIO, "Input/output error")
        return hash_file(path)

    monkeypatch.setattr("mmmoe_pretrain.data_prep.verify.hash_file", broken)
    seen = Seen()
    found = list(verify_folder(shards, seen))
    message = "-000000.tar: cannot be read (Input/output error)"
    assert found == [f"{shards}/train/train{message}", f"{shards}/test/test{message}"]
    assert seen.shards == 2


def test_a_group_in_two_splits_is_found(make_manifest):
    found = problems(write(make_manifest(6), group="same"))
    assert any("of group same is in test, another of its group in train" in problem for problem in found)


@pytest.mark.parametrize("name", ["0.tar.gz", "train/0.tgz", "train/0.tar.zst"])
@pytest.mark.parametrize("read", [problems, measure])
def test_compressed_shards_are_named_with_what_to_do(tmp_path, name, read):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(ValueError, match=rf"compressed shard {tmp_path / name} cannot be read .*; unpack by "):
            read(path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), r"holds no shards; `mmmoe-data shard \S+ --out FOLDER` makes some"),
        (("a/train", "b/val", "c/x/train"), r"name one: \S+/a, \S+/b$"),
        (("building.tmp/train",), "unfinished command; wait for it, or repeat it"),
    ],
)
def test_a_folder_without_shards_is_refused_with_what_lies_in_it(tmp_path, names, message):
    for name in names:
        write_tar(tmp_path / name / "0.tar", [("a.txt", b"red")])
    with pytest.raises(ValueError, match=message):
        split_specs(str(tmp_path))


def test_a_folder_of_several_sets_is_refused_with_their_names_by_every_tool(shards):
    with pytest.raises(ValueError, match=f"folders in it hold splits; name one: {shards}$"):
        measure(shards.parent)


def test_progress_of_verify_counts_the_samples_of_a_shard(tmp_path, monkeypatch):
    write_tar(tmp_path / "0.tar", [(f"{n}.txt", b"red") for n in range(9)])
    open_indexed(tmp_path)
    seen, end = [], Progress.__exit__

    def ended(self, *error):
        seen.append((self.what, self.done, self.total))
        end(self, *error)

    monkeypatch.setattr(Progress, "__exit__", ended)
    assert problems(tmp_path) == []
    assert seen[-1] == (f"verifying {tmp_path.name}, shard 1 of 1", 9, 9)


def test_decoding_finds_and_counts_what_the_loader_could_not_use(tmp_path, capsys):
    whole = png()
    wave = io.BytesIO()
    soundfile.write(wave, np.zeros(800), 8000, format="WAV")
    good = [("a.png", whole), ("a.txt", b"red"), ("b.wav", wave.getvalue())]
    document = json.dumps({"parts": [{"member": "x.png"}, {"text": "red"}]}).encode()
    bad = [("c.png", whole[:60]), ("d.png", whole[:62]), ("e.wav", b"RIFF"), ("f.x.png", b"no"), ("f.json", document)]
    write_tar(tmp_path / "0.tar", good)
    assert run(str(tmp_path), workers=1)
    assert "decoded 2 samples, of which 0 are bad" in capsys.readouterr().out
    write_tar(tmp_path / "1.tar", bad)
    assert run(str(tmp_path))  # nothing is decoded
    capsys.readouterr()
    assert not run(str(tmp_path), workers=1, as_json=True)
    answer = json.loads(capsys.readouterr().out)
    assert (answer["problems"]["count"], answer["samples"], answer["decoded"]) == (4, 6, 6)
    assert [problem.split(": ")[1] for problem in answer["problems"]["first"]] == [f"sample {key}" for key in "cdef"]
    assert sorted(answer["bad"].values()) == [1, 1, 2]  # c and d for the same reason


def test_what_other_tools_mean_by_a_group_is_a_note(tmp_path):
    for split in ("train", "test"):
        write_tar(tmp_path / split / "0.tar", [("a.txt", b"red"), ("a.json", b'{"group": "g"}')])
    seen = Seen()
    assert list(verify_folder(tmp_path, seen)) == []
    assert "sample a of group g is in test, another of its group in train" in "\n".join(seen.notes())


def test_remote_shards_are_compared_with_their_list_and_a_stream_is_refused(shards, tmp_path):
    with http_server(tmp_path) as server:
        url = f"{server.url}/{shards.relative_to(tmp_path)}/train"
        assert not list(verify_folder(url, Seen()))
        path = shards / "train/train-000000.tar"
        path.write_bytes(path.read_bytes() + bytes(10240))
        [found] = verify_folder(url, Seen())
        assert "bytes, shards.json says" in found
    with pytest.raises(ValueError, match="output of a command is read once"):
        list(verify_folder("pipe:cat a.tar", Seen()))
