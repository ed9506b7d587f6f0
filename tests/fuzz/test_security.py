"""The guarantees of docs/reliability.md about untrusted files, one test each."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import struct
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from data_prep import media, verify
from data_prep.manifest import read_manifest
from data_prep.shard import ShardOptions, shard_manifest
from mmmoe_pretrain import config as run_config
from mmmoe_pretrain import limits
from mmmoe_pretrain.checkpoint import store
from mmmoe_pretrain.data.shards import ShardFolder
from mmmoe_pretrain.modalities import BadSampleError, Tokenizer
from mmmoe_pretrain.modalities.audio import Audio, AudioSettings
from mmmoe_pretrain.modalities.image import Image as ImageModality
from mmmoe_pretrain.modalities.image import ImageSettings
from mmmoe_pretrain.untrusted import parse_json, parse_yaml
from tests.fuzz import checkpoints
from tests.fuzz.runner import _reset_peak, _status
from tests.fuzz.targets import Payload
from tests.fuzz.yaml_bombs import aliases, code, merges

IMAGES, CLIPS = ImageModality("image", ImageSettings()), Audio("audio", AudioSettings())
ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("mmmoe_pretrain", "data_prep", "launch")
# Where pickle is used between processes of one run that forked each other; no file is read there.
BETWEEN_OUR_PROCESSES = {"mmmoe_pretrain/data/workers.py": {"pickle"}}
BETWEEN_RANKS = {"mmmoe_pretrain/train/heartbeats.py"}  # a TCPStore, as torchrun's own
RUN_CODE = {
    "pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "code", "pty",
}  # fmt: skip
SERVERS = {"http.server", "socketserver", "xmlrpc.server", "wsgiref", "aiohttp", "flask", "fastapi", "uvicorn",
           "prometheus_client", "tensorboard.program"}  # fmt: skip


def trees() -> Iterator[tuple[str, ast.Module]]:
    for folder in SOURCES:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def imported(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def forbidden_calls(tree: ast.Module) -> Iterator[str]:
    """Calls that run code which a file or a config could hold."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        # Of x.y(...).z(...) the last name alone: x.y(...) is a call of its own.
        name = f".{node.func.attr}" if isinstance(node.func, ast.Attribute) else ""
        if not any(isinstance(part, ast.Call) for part in ast.walk(node.func)):
            name = ast.unparse(node.func)
        if name in ("eval", "exec", "compile", "__import__", "os.system", "os.popen", "runpy.run_path", "input"):
            yield f"line {node.lineno}: {name}"
        if name.endswith(("torch.load", "jit.load", "hub.load", "np.load", "numpy.load", "read_pickle", "load_obj")):
            yield f"line {node.lineno}: {name}"
        if name.startswith("yaml.") and name not in ("yaml.safe_load", "yaml.safe_dump", "yaml.SafeLoader"):
            yield f"line {node.lineno}: {name}"
        for keyword in node.keywords:
            if keyword.arg in ("shell", "allow_pickle") and not (
                isinstance(keyword.value, ast.Constant) and keyword.value.value is False
            ):
                yield f"line {node.lineno}: {keyword.arg}="


def test_nothing_in_the_source_unpickles_files_evaluates_text_or_starts_a_shell() -> None:
    wrong = []
    for name, tree in trees():
        roots = {module.partition(".")[0] for module in imported(tree)}
        wrong += [f"{name} imports {module}" for module in roots & RUN_CODE - BETWEEN_OUR_PROCESSES.get(name, set())]
        wrong += [f"{name} {call}" for call in forbidden_calls(tree)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("line", [
    "import os; os.system('x')", "eval('1')", "torch.load(p)", "yaml.load(t)", "yaml.unsafe_load(t)",
    "subprocess.run('x', shell=True)", "np.load(p, allow_pickle=True)",
])  # fmt: skip
def test_the_look_at_the_source_sees_what_it_is_for(line: str) -> None:
    assert list(forbidden_calls(ast.parse(line)))


def test_subprocesses_get_a_list_of_arguments_and_no_shell() -> None:
    """A string would be split by a shell, or by us; values of a config never become a command line."""
    for name, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("subprocess."):
                assert not isinstance(node.args[0], ast.Constant | ast.JoinedStr | ast.BinOp), f"{name}:{node.lineno}"


def test_no_server_is_started() -> None:
    """TensorBoard's files are written, and nothing serves them. What listens is between the ranks of a job: torch's
    rendezvous and process groups, and the store of the heartbeats."""
    wrong = [f"{name} imports {module}" for name, tree in trees() for module in imported(tree) & SERVERS]
    for name, tree in trees():
        calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
        wrong += [
            f"{name}:{call.lineno} {ast.unparse(call.func)}" for call in calls
            if ast.unparse(call.func).endswith((".listen", ".bind", "start_http_server", "start_server", "TCPStore"))
            and name not in BETWEEN_RANKS
        ]  # fmt: skip
    assert not wrong, "\n".join(wrong)


def tar_of(path: Path, name: str, kind: bytes = tarfile.REGTYPE, **fields: object) -> Path:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        info = tarfile.TarInfo(name)
        info.type = kind
        for field, value in fields.items():
            setattr(info, field, value)
        tar.addfile(info)
    return path


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../up.txt", "a/../../b.txt", "./../x.txt", "n" * 150 + "/../../x.txt"]
)
def test_tar_members_with_absolute_or_parent_paths_are_refused(tmp_path: Path, name: str) -> None:
    tar_of(tmp_path / "00000.tar", name)
    with pytest.raises(ValueError, match=r"00000\.tar .*leaves its folder"):
        ShardFolder(tmp_path)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE,
                                  tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE, b"V", b"?"])  # fmt: skip
def test_tar_links_devices_pipes_and_unknown_kinds_are_refused(tmp_path: Path, kind: bytes) -> None:
    tar_of(tmp_path / "00000.tar", "a.txt", linkname="/etc/passwd")
    data = bytearray((tmp_path / "00000.tar").read_bytes())
    data[156:157] = kind
    data[148:156] = b"        "
    data[148:156] = b"%06o\0 " % sum(data[:512])
    (tmp_path / "00000.tar").write_bytes(data)
    with pytest.raises(ValueError, match=r"00000\.tar .*a link, a device"):
        ShardFolder(tmp_path)


def test_a_pipe_or_a_folder_in_the_place_of_a_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    for name in ("run.yaml", "tokens.model", "shards/00000.tar", "manifest/manifest.jsonl", "images/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        os.mkfifo(tmp_path / name)
    for read in (
        lambda: run_config.load(tmp_path / "run.yaml"),
        lambda: Tokenizer(tmp_path / "tokens.model"),
        lambda: ShardFolder(tmp_path / "shards"),
        lambda: read_manifest(tmp_path / "manifest"),
        lambda: media.image_member(tmp_path / "images" / "a.png", None),
    ):
        with pytest.raises(ValueError, match=r"run\.yaml|tokens\.model|00000\.tar|manifest|a\.png"):
            read()
    assert any("is not a plain file" in found for found in verify.verify_folder(tmp_path / "shards", verify.Seen()))


@pytest.mark.parametrize("size", ["-1024", "99999999999999999999", "1" * 5000, "x"])
def test_a_size_that_sends_a_tar_reader_in_circles_is_refused(tmp_path: Path, size: str) -> None:
    """Python's tarfile, where it is not patched, never ends on a negative size (CVE-2025-8194)."""
    with tarfile.open(tmp_path / "00000.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("a.txt")
        info.pax_headers = {"size": size}
        tar.addfile(info)
    with pytest.raises(ValueError, match=r"00000\.tar"):
        ShardFolder(tmp_path)


def png(width: int, height: int, rows: bytes) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("width,height", [(8000, 8001), (1, 64_000_000), (2**31 - 1, 2**31 - 1), (65_536, 1)])
def test_a_bomb_of_pixels_is_refused_by_its_header(tmp_path: Path, width: int, height: int) -> None:
    bomb = png(width, height, zlib.compress(bytes(1 << 20)))
    (tmp_path / "bomb.png").write_bytes(bomb)
    before = _reset_peak()
    with pytest.raises(BadSampleError, match=r"exceeds the limit|DecompressionBomb|cannot be decoded"):
        IMAGES.decode(bomb)
    with pytest.raises(ValueError, match=r"bomb\.png .*(exceeds the limit|bomb)"):
        media.image_member(tmp_path / "bomb.png", 16)
    assert _status("VmHWM") - before < 64 << 20  # one byte a pixel would be as much


def test_a_jpeg_of_many_scans_is_refused_by_its_header() -> None:
    """Each scan of a progressive JPEG goes over all its pixels, and takes a few bytes."""
    out = io.BytesIO()
    Image.new("L", (4000, 4000)).save(out, "JPEG", progressive=True)
    whole = out.getvalue()
    scan = whole.rindex(b"\xff\xda")
    bomb = whole[:scan] + whole[scan:-2] * 1000 + b"\xff\xd9"
    with pytest.raises(BadSampleError, match=r"4000 x 4000 pixels in \d+ scans exceeds the limit"):
        IMAGES.decode(bomb)
    assert IMAGES.decode(whole).shape == (3, 48, 48)  # type: ignore[union-attr]


def wav(frames: int, channels: int, rate: int) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, np.zeros((frames, channels), np.int16), rate, format="FLAC")  # silence packs 1,000 : 1
    return out.getvalue()


@pytest.mark.parametrize("frames,channels,rate,what", [
    (601 * 1000, 1, 1000, "601 s exceeds the limit of 600 s"),
    (200_000, 8, 8000, "200000 x 8 samples exceeds the limit"),
])  # fmt: skip
def test_a_bomb_of_seconds_or_samples_is_refused_by_its_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, frames: int, channels: int, rate: int, what: str
) -> None:
    monkeypatch.setattr(limits, "MAX_CLIP_SAMPLES", 1_000_000)
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda *a, **k: pytest.fail("it was decoded"))
    bomb = wav(frames, channels, rate)
    assert len(bomb) < frames * channels / 10
    (tmp_path / "bomb.flac").write_bytes(bomb)
    with pytest.raises(BadSampleError, match=what):
        CLIPS.decode(bomb)
    with pytest.raises(ValueError, match=rf"bomb\.flac .*{what}"):
        media.audio_member(tmp_path / "bomb.flac", None)


@pytest.mark.parametrize(
    "data", [b"FORM\0\0\0\0AIFF", b"MATLAB 5.0 MAT-file", b".snd" + bytes(40), b"caff" + bytes(40)]
)
def test_only_the_documented_kinds_of_sound_reach_the_decoder(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(soundfile.SoundFile, "__init__", lambda *a, **k: pytest.fail("libsndfile saw it"))
    with pytest.raises(BadSampleError, match="not WAV, FLAC, OGG or MP3"):
        CLIPS.decode(data)


def test_a_text_and_a_json_of_a_sample_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
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
    before = _reset_peak()
    with pytest.raises(ValueError, match=f"here is not valid YAML.*{why}"):
        parse_yaml(text, "here")
    assert _status("VmHWM") - before < 64 << 20


def test_yaml_anchors_and_merges_of_people_are_read() -> None:
    assert parse_yaml("a: &x {b: 1}\nc: {<<: *x, d: 2}\ne: *x", "here") == {"a": {"b": 1}, "c": {"b": 1, "d": 2},
                                                                          "e": {"b": 1}}  # fmt: skip


@pytest.mark.parametrize("file", ["index.json", "meta.json", "manifest.json", "rank_00000.safetensors", "latest"])
def test_nothing_is_unpickled_from_a_checkpoint(tmp_path: Path, file: str) -> None:
    checkpoints.write(tmp_path)
    marker = tmp_path / "marker"
    path = tmp_path / file if file == "latest" else tmp_path / checkpoints.NAME / file
    path.write_bytes(pickle.dumps(Payload(marker)))
    checkpoint = store.Checkpoint(str(tmp_path), checkpoints.NAME, checkpoints.STEP)
    for use in (store.verify, store.read_meta, store.read_state, lambda c: store.find_latest(tmp_path)):
        try:
            use(checkpoint)
        except ValueError as error:
            assert checkpoints.NAME in str(error)
    if file != "latest":
        with pytest.raises(ValueError, match=checkpoints.NAME):
            store.verify(checkpoint)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Payload(marker)))  # the payload works: elsewhere it would have been seen
    assert marker.exists()


def test_a_checkpoint_cannot_ask_for_more_memory_than_it_has_bytes(tmp_path: Path) -> None:
    checkpoints.write(tmp_path)
    folder = tmp_path / checkpoints.NAME
    index = json.loads((folder / "index.json").read_bytes())
    key = next(iter(index["tensors"]))
    index["tensors"][key]["shape"] = [1 << 20, 1 << 20]
    (folder / "index.json").write_text(json.dumps(index))
    checkpoints._repair(folder)
    before = _reset_peak()
    with pytest.raises(ValueError, match=checkpoints.NAME):
        store.read_state(store.Checkpoint(str(tmp_path), checkpoints.NAME, checkpoints.STEP))
    assert _status("VmHWM") - before < 64 << 20


def test_nothing_is_unpickled_from_a_shard(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    payload = pickle.dumps(Payload(marker))
    folder = tmp_path / "shards"
    folder.mkdir()
    for name in ("00000.tar", "00000.index.json", "shards.json"):
        (folder / name).write_bytes(payload)
        with pytest.raises(ValueError, match=name):
            ShardFolder(folder)
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
    report = shard_manifest(read_manifest(folder), folder, tmp_path / "out", options)
    assert sorted(bad.key for bad in report.skipped) == ["0", "1", "2", "3"]
    assert "PRIVATE" not in str(report.skipped)
    assert "4 files lie outside of" in caplog.text
    # What is not decoded is taken from the folder alone, through no link either.
    (tmp_path / "secret.txt").write_text("-----BEGIN PRIVATE KEY-----")
    (folder / "link.txt").symlink_to(tmp_path / "secret.txt")
    names = ["../secret.txt", "/etc/hosts.txt", str(tmp_path / "secret.txt"), "link.txt"]
    rows = [{"key": str(i), "parts": [{"text": "x"}, {"file": name}]} for i, name in enumerate(names)]
    (folder / "manifest.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [*rows, {"key": "b", "text": "x"}])
    )
    report = shard_manifest(read_manifest(folder), folder, tmp_path / "documents", options)
    assert sorted(bad.key for bad in report.skipped) == ["0", "1", "2", "3"]
    assert all("lies outside of the manifest's folder" in bad.reason for bad in report.skipped)
    (folder / "manifest.jsonl").write_text(json.dumps({"key": "a", "image": "a\0.png"}) + "\n")
    with pytest.raises(ValueError, match=r"manifest\.jsonl line 1, key 'a': .*holds a NUL"):
        read_manifest(folder)


def test_weights_are_not_executable(tmp_path: Path) -> None:
    """A checkpoint of ours is read by safetensors alone."""
    from safetensors.torch import load_file

    checkpoints.write(tmp_path)
    loaded = load_file(tmp_path / checkpoints.NAME / "rank_00000.safetensors")
    assert all(isinstance(tensor, torch.Tensor) for tensor in loaded.values())
