"""The guarantees of docs/reliability.md about untrusted files, one test each."""

from __future__ import annotations

import ast
import json
import os
import pickle
import struct
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from mmmoe_pretrain import config as run_config
from mmmoe_pretrain import limits
from mmmoe_pretrain.checkpoint import store
from mmmoe_pretrain.data.sources.source import open_indexed
from mmmoe_pretrain.data_prep import verify
from mmmoe_pretrain.data_prep.rows.manifest import read_manifest
from mmmoe_pretrain.data_prep.shards.encode import Encoder
from mmmoe_pretrain.data_prep.shards.media import MediaOptions
from mmmoe_pretrain.data_prep.shards.shard import shard_rows
from mmmoe_pretrain.data_prep.shards.writing import ShardOptions
from mmmoe_pretrain.modalities import BadSampleError, Tokenizer
from mmmoe_pretrain.modalities.audio import Audio
from mmmoe_pretrain.modalities.audio_settings import AudioSettings
from mmmoe_pretrain.modalities.image import Image as ImageModality
from mmmoe_pretrain.modalities.image import ImageSettings
from mmmoe_pretrain.untrusted import parse_json, parse_yaml
from tests.fuzz import folders
from tests.fuzz.mutate import aliases, code, merges, payload, tar_checksums
from tests.fuzz.run import reset_peak, status
from tests.support import audio_bytes, image_bytes

IMAGES, CLIPS = ImageModality("image", ImageSettings()), Audio("audio", AudioSettings())
ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("mmmoe_pretrain", "data_prep", "launch")
# Modules that run code in a file, or serve a network.
IMPORTS = {
    "pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "code", "pty",
    "http.server", "socketserver", "xmlrpc.server", "wsgiref", "aiohttp", "flask", "fastapi", "uvicorn",
    "prometheus_client", "tensorboard.program",
}  # fmt: skip
CALLS = ("eval", "exec", "compile", "__import__", "os.system", "os.popen", "runpy.run_path", "input")
ENDS = ("torch.load", "jit.load", "hub.load", "np.load", "numpy.load", "read_pickle", "load_obj",
        ".listen", ".bind", "start_http_server", "start_server", "TCPStore")  # fmt: skip
YAML = ("yaml.safe_load", "yaml.safe_load_all", "yaml.safe_dump", "yaml.safe_dump_all", "yaml.SafeLoader",
        "yaml.dump_all", "yaml.SafeDumper")  # fmt: skip
ALLOWED = {
    "mmmoe_pretrain/data/workers/worker.py": "pickle",  # between processes of one run that forked each other; no file
    "mmmoe_pretrain/data/workers/server.py": "pickle",  # likewise
    "mmmoe_pretrain/data/workers/arena.py": "pickle",  # in their memory, and between the ranks of a job
    "mmmoe_pretrain/doctor/peer.py": "dist.TCPStore",  # between the hosts of a job
    "mmmoe_pretrain/exit_codes.py": "dist.TCPStore",  # a client of torchrun's own
    "mmmoe_pretrain/launcher.py": "listener.bind",  # asks whether an address is this machine's, and never listens
    "mmmoe_pretrain/train/heartbeats.py": "dist.TCPStore",  # between the ranks of a job, as torchrun's own
}


def dangers(tree: ast.Module) -> Iterator[str]:
    """Imports and calls that could run code of a file or a config, or serve a network. A subprocess gets a list: a
    string would be split by a shell, or by us."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names}
            if isinstance(node, ast.ImportFrom):
                names = {node.module or "", *(f"{node.module}.{name}" for name in names)}
            yield from IMPORTS & (names | {name.partition(".")[0] for name in names})
        if not isinstance(node, ast.Call):
            continue
        # Of x.y(...).z(...) the last name alone: x.y(...) is a call of its own.
        name = f".{node.func.attr}" if isinstance(node.func, ast.Attribute) else ""
        if not any(isinstance(part, ast.Call) for part in ast.walk(node.func)):
            name = ast.unparse(node.func)
        split = name.startswith("subprocess.") and isinstance(node.args[0], ast.Constant | ast.JoinedStr | ast.BinOp)
        arrays = name == "np.load" and any(ast.unparse(k) == "allow_pickle=False" for k in node.keywords)
        if (
            name in CALLS
            or (name.endswith(ENDS) and not arrays)
            or (name.startswith("yaml.") and name not in YAML)
            or split
        ):
            yield name
        for keyword in node.keywords:
            harmless = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
            if keyword.arg in ("shell", "allow_pickle") and not harmless:
                yield f"{keyword.arg}="


def test_nothing_in_the_source_unpickles_files_evaluates_text_starts_a_shell_or_serves() -> None:
    for folder in SOURCES:
        for path in (ROOT / folder).rglob("*.py"):
            name = path.relative_to(ROOT).as_posix()
            found = set(dangers(ast.parse(path.read_text(encoding="utf-8"))))
            assert found <= {ALLOWED.get(name)}, f"{name}: {found}"


@pytest.mark.parametrize("line", [
    "import os; os.system('x')", "eval('1')", "torch.load(p)", "yaml.load(t)", "yaml.unsafe_load(t)",
    "subprocess.run('x', shell=True)", "subprocess.run(f'ls {x}')", "np.load(p)", "import pickle",
    "np.load(p, allow_pickle=True)",
    "from http import server", "from pickle import loads", "socket.socket().listen()", "dist.TCPStore('', 1)",
])  # fmt: skip
def test_the_look_at_the_source_sees_what_it_is_for(line: str) -> None:
    assert list(dangers(ast.parse(line)))


def write_tar(path: Path, name: str, **headers: str) -> None:
    format = tarfile.PAX_FORMAT if headers else tarfile.GNU_FORMAT
    with tarfile.open(path, "w", format=format) as tar:
        info = tarfile.TarInfo(name)
        info.pax_headers = headers
        tar.addfile(info)


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../up.txt", "a/../../b.txt", "./../x.txt", "n" * 150 + "/../../x.txt"]
)
def test_tar_members_with_absolute_or_parent_paths_are_refused(tmp_path: Path, name: str) -> None:
    write_tar(tmp_path / "00000.tar", name)
    with pytest.raises(ValueError, match=r"00000\.tar .*leaves its folder"):
        open_indexed(tmp_path)


@pytest.mark.parametrize(("kind", "name"), [
    (tarfile.SYMTYPE, "a symbolic link"), (tarfile.LNKTYPE, "a hard link"), (tarfile.CHRTYPE, "a device"),
    (tarfile.BLKTYPE, "a device"), (tarfile.FIFOTYPE, "a pipe"), (tarfile.GNUTYPE_SPARSE, ""), (b"V", ""), (b"?", ""),
])  # fmt: skip
def test_tar_links_devices_pipes_and_unknown_kinds_are_refused(tmp_path: Path, kind: bytes, name: str) -> None:
    write_tar(tmp_path / "00000.tar", "a.txt")
    data = bytearray((tmp_path / "00000.tar").read_bytes())
    data[156:157] = kind
    (tmp_path / "00000.tar").write_bytes(tar_checksums(bytes(data)))
    with pytest.raises(ValueError, match=rf"00000\.tar holds 'a\.txt', .*{name}.*; make it again with plain files"):
        open_indexed(tmp_path)


def test_a_pipe_or_a_folder_in_the_place_of_a_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    for name in ("run.yaml", "tokens.model", "shards/00000.tar", "manifest/manifest.jsonl", "images/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        os.mkfifo(tmp_path / name)
    for read in (
        lambda: run_config.load(tmp_path / "run.yaml"),
        lambda: Tokenizer(tmp_path / "tokens.model"),
        lambda: open_indexed(tmp_path / "shards"),
        lambda: read_manifest(tmp_path / "manifest"),
        lambda: Encoder(tmp_path / "images", MediaOptions()).media("image", "a.png"),
    ):
        with pytest.raises(ValueError, match=r"run\.yaml|tokens\.model|00000\.tar|manifest|a\.png"):
            read()
    assert any("is not a plain file" in found for found in verify.verify_folder(tmp_path / "shards", verify.Seen()))


@pytest.mark.parametrize("size", ["-1024", "99999999999999999999", "1" * 5000, "x"])
def test_a_size_that_sends_a_tar_reader_in_circles_is_refused(tmp_path: Path, size: str) -> None:
    """Python's tarfile, where it is not patched, never ends on a negative size (CVE-2025-8194)."""
    write_tar(tmp_path / "00000.tar", "a.txt", size=size)
    with pytest.raises(ValueError, match=r"00000\.tar"):
        open_indexed(tmp_path)


@contextmanager
def little_memory() -> Iterator[None]:
    """At most 64 MiB: one byte a pixel of the largest image."""
    before = reset_peak()
    yield
    assert status("VmHWM") - before < 64 << 20


def png(width: int, height: int, rows: bytes) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("width,height", [(8000, 8001), (1, 64_000_000), (2**31 - 1, 2**31 - 1), (65_536, 1)])
def test_a_bomb_of_pixels_is_refused_by_its_header(tmp_path: Path, width: int, height: int) -> None:
    bomb = png(width, height, zlib.compress(bytes(1 << 20)))
    (tmp_path / "bomb.png").write_bytes(bomb)
    with (
        little_memory(),
        pytest.raises(BadSampleError, match=r"exceeds the limit|DecompressionBomb|cannot be decoded"),
    ):
        IMAGES.decode(bomb)
    with little_memory(), pytest.raises(ValueError, match=r"bomb\.png .*(exceeds the limit|bomb)"):
        Encoder(tmp_path, MediaOptions(image_size=16)).media("image", "bomb.png")


def test_a_jpeg_of_many_scans_is_refused_by_its_header() -> None:
    """Each scan of a progressive JPEG goes over all its pixels, and takes a few bytes."""
    whole = image_bytes(Image.new("L", (4000, 4000)), "JPEG", progressive=True)
    scan = whole.rindex(b"\xff\xda")
    bomb = whole[:scan] + whole[scan:-2] * 1000 + b"\xff\xd9"
    with pytest.raises(BadSampleError, match=r"4000 x 4000 pixels in \d+ scans exceeds the limit"):
        IMAGES.decode(bomb)
    assert IMAGES.decode(whole).shape == (3, 48, 48)  # type: ignore[union-attr]


@pytest.mark.parametrize("frames,channels,rate,what", [
    (601 * 1000, 1, 1000, "601 s exceeds the limit of 600 s"),
    (200_000, 8, 8000, "200000 x 8 samples exceeds the limit"),
])  # fmt: skip
def test_a_bomb_of_seconds_or_samples_is_refused_by_its_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, frames: int, channels: int, rate: int, what: str
) -> None:
    monkeypatch.setattr(limits, "MAX_CLIP_SAMPLES", 1_000_000)
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda *a, **k: pytest.fail("it was decoded"))
    bomb = audio_bytes(np.zeros((frames, channels), np.int16), "FLAC", rate=rate)  # silence packs 1,000 : 1
    assert len(bomb) < frames * channels / 10
    (tmp_path / "bomb.flac").write_bytes(bomb)
    with pytest.raises(BadSampleError, match=what):
        CLIPS.decode(bomb)
    with pytest.raises(ValueError, match=rf"bomb\.flac .*{what}"):
        Encoder(tmp_path, MediaOptions()).media("audio", "bomb.flac")


@pytest.mark.parametrize(
    "data", [b"FORM\0\0\0\0AIFF", b"MATLAB 5.0 MAT-file", b".snd" + bytes(40), b"caff" + bytes(40)]
)
def test_only_the_documented_kinds_of_sound_reach_the_decoder(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(soundfile.SoundFile, "__init__", lambda *a, **k: pytest.fail("libsndfile saw it"))
    with pytest.raises(BadSampleError, match="not WAV, FLAC, OGG or MP3"):
        CLIPS.decode(data)


def test_the_size_and_depth_of_json_are_bounded() -> None:
    with pytest.raises(ValueError, match="at most 10 are read"):
        parse_json(b"[1, 2, 3, 4]", "x.json", limit=10)
    with pytest.raises(ValueError, match=r"x\.json .*nested too deeply"):
        parse_json(b"[" * 100_000, "x.json")


@pytest.mark.parametrize("number", range(6))
def test_yaml_runs_no_code(tmp_path: Path, number: int) -> None:
    marker = tmp_path / "marker"
    path = tmp_path / "run.yaml"
    path.write_text(f"name: {code(marker)[number]}\n")
    with pytest.raises(ValueError, match=r"run\.yaml is not valid YAML: could not determine a constructor"):
        run_config.load(path)
    path.write_text("name: a\n")
    with pytest.raises(ValueError, match=r"override .* is not valid YAML"):
        run_config.load(path, [f"name={code(marker)[number]}"])
    assert not marker.exists()


@pytest.mark.parametrize("text,why", [
    (aliases(9, 9), "more than 20000 values"), (merges(9, 9), "more than 20000 values"), ("&a [*a]", "holds itself"),
    ("[" * 3000, "nested"), ("a: 1\na: 2", "'a' stands twice"), ("a: 2001-99-99", "not of its kind"),
])  # fmt: skip
def test_yaml_that_multiplies_or_says_two_things_is_refused(text: str, why: str) -> None:
    with little_memory(), pytest.raises(ValueError, match=f"here is not valid YAML.*{why}"):
        parse_yaml(text, "here")


def test_yaml_anchors_and_merges_of_people_are_read() -> None:
    assert parse_yaml("a: &x {b: 1}\nc: {<<: *x, d: 2}\ne: *x", "here") == {"a": {"b": 1}, "c": {"b": 1, "d": 2},
                                                                          "e": {"b": 1}}  # fmt: skip


@pytest.mark.parametrize(
    "file", ["index.json", "boxes.bin", "meta.json", "manifest.json", "rank_00000.safetensors", "latest"]
)
def test_nothing_is_unpickled_from_a_checkpoint(tmp_path: Path, file: str) -> None:
    folders.write_checkpoint(tmp_path)
    marker = tmp_path / "marker"
    path = tmp_path / file if file == "latest" else tmp_path / folders.CHECKPOINT / file
    path.write_bytes(payload(marker))
    checkpoint = store.Checkpoint(str(tmp_path), folders.CHECKPOINT, folders.STEP)
    for use in (store.verify, store.read_meta, store.read_state, lambda c: store.find_latest(tmp_path)):
        try:
            use(checkpoint)
        except ValueError as error:
            assert folders.CHECKPOINT in str(error)
    if file != "latest":
        with pytest.raises(ValueError, match=folders.CHECKPOINT):
            store.verify(checkpoint)
    assert not marker.exists()
    pickle.loads(payload(marker))  # the payload works: elsewhere it would have been seen
    assert marker.exists()


def test_a_checkpoint_cannot_ask_for_more_memory_than_it_has_bytes(tmp_path: Path) -> None:
    folders.write_checkpoint(tmp_path)
    folder = tmp_path / folders.CHECKPOINT
    index = json.loads((folder / "index.json").read_bytes())
    key = next(iter(index["tensors"]))
    index["tensors"][key]["shape"] = [1 << 20, 1 << 20]
    (folder / "index.json").write_text(json.dumps(index))
    folders.repair(folder)
    with little_memory(), pytest.raises(ValueError, match=folders.CHECKPOINT):
        store.read_state(store.Checkpoint(str(tmp_path), folders.CHECKPOINT, folders.STEP))


def test_nothing_is_unpickled_from_a_shard(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / "shards.index").write_bytes(payload(marker))
    for name in ("00000.tar", "shards.json"):
        (folder / name).write_bytes(payload(marker))
        with pytest.raises(ValueError, match=name):
            open_indexed(folder)
        assert list(verify.verify_folder(folder, verify.Seen()))
    assert not marker.exists()


def test_a_manifest_takes_images_and_audio_alone_from_outside_of_its_folder_and_says_so(
    tmp_path: Path, caplog
) -> None:
    """A manifest is its user's own file, so it may name any; one from elsewhere gets no secrets into a shard."""
    (tmp_path / "secret.png").write_bytes(b"-----BEGIN PRIVATE KEY-----")
    folder = tmp_path / "corpus"
    folder.mkdir()
    names = ["/etc/passwd", "../secret.png", "a/../../secret.png", str(tmp_path / "secret.png")]
    rows = [{"key": str(i), "image": name} for i, name in enumerate(names)] + [{"key": "good", "text": "x"}]
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ShardOptions(workers=1, max_bad_fraction=1)
    report = shard_rows(read_manifest(folder), folder, tmp_path / "out", options)
    assert sorted(bad.key for bad in report.skipped) == ["0", "1", "2", "3"]
    assert "PRIVATE" not in str(report.skipped)
    assert "4 files outside of" in caplog.text
    # What is not decoded is taken from the folder alone, through no link either.
    (tmp_path / "secret.txt").write_text("-----BEGIN PRIVATE KEY-----")
    (folder / "link.txt").symlink_to(tmp_path / "secret.txt")
    names = ["../secret.txt", "/etc/hosts.txt", str(tmp_path / "secret.txt"), "link.txt"]
    rows = [{"key": str(i), "parts": [{"text": "x"}, {"file": name}]} for i, name in enumerate(names)]
    (folder / "manifest.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [*rows, {"key": "b", "text": "x"}])
    )
    report = shard_rows(read_manifest(folder), folder, tmp_path / "documents", options)
    assert sorted(bad.key for bad in report.skipped) == ["0", "1", "2", "3"]
    assert all("lies outside of the folder of the rows" in bad.reason for bad in report.skipped)
    (folder / "manifest.jsonl").write_text(json.dumps({"key": "a", "image": "a\0.png"}) + "\n")
    with pytest.raises(ValueError, match=r"manifest\.jsonl line 1, key 'a': .*holds a NUL"):
        read_manifest(folder)
