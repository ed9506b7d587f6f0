"""Streams: the same samples for any ranks and workers, exact resumes, failing commands, no process left behind."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mmmoe_pretrain.data.order.mix import Stage
from mmmoe_pretrain.data.order.positions import Order
from mmmoe_pretrain.data.sources import stream_state
from mmmoe_pretrain.data.sources.stream import LaneState, Stream, open_stream
from mmmoe_pretrain.data.storage.files import Files, ReadSettings
from mmmoe_pretrain.data.storage.retry import Retries
from mmmoe_pretrain.modalities import default_modalities
from tests.support import write_tar

SIZES = (7, 4, 5, 9, 3, 6)  # samples of the shards
BATCH = 16
FILES = Files(ReadSettings(Retries(request_seconds=5.0, read_seconds=30.0, count=2, first_pause=0.01)))
HASTY = Files(ReadSettings(Retries(request_seconds=0.5, read_seconds=30.0, count=2, first_pause=0.01)))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    for shard, size in enumerate(SIZES):
        members = [(f"{shard}-{n}.txt", f"text of {shard}-{n}".encode()) for n in range(size)]
        write_tar(folder / f"{shard}.tar", members)
    return folder


def open_six(folder: Path, lanes: int, window: int = 4) -> Stream:
    """Files are read like commands, and faster."""
    stream = open_stream(f"{folder}/{{0..5}}.tar", FILES, default_modalities(), 3, window)
    stream.start([LaneState()] * lanes)
    return stream


def keys_of(stream: Stream, lane: int, numbers: range) -> list[str]:
    return [stream.read(lane, number)[0].key for number in numbers]


def in_shards(urls: list[str]) -> list[str]:
    shards = [int(Path(url).stem) for url in urls]
    return [f"{shard}-{n}" for shard in shards for n in range(SIZES[shard])]


def test_each_sub_lane_reads_every_sample_of_its_shards_once_an_epoch_in_permuted_windows(shards: Path) -> None:
    stream = open_six(shards, lanes=4)
    orders = set()
    for epoch in range(3):
        lanes = [in_shards(stream.shards_of(lane, epoch)) for lane in range(4)]
        assert Counter(key for lane in lanes for key in lane) == Counter(in_shards([f"{i}.tar" for i in range(6)]))
        orders.add(str(lanes))
    assert len(orders) == 3
    for lane in range(4):
        read_on = [in_shards(stream.shards_of(lane, epoch)) for epoch in range(3)]
        found = keys_of(stream, lane, range(sum(map(len, read_on))))
        assert found != [key for epoch in read_on for key in epoch]
        for epoch in read_on:
            for first in range(0, len(epoch), 4):  # an epoch's last window is shorter
                window, found = found[: len(epoch[first : first + 4])], found[len(epoch[first : first + 4]) :]
                assert sorted(window) == sorted(epoch[first : first + 4])
    stream.close()


def test_a_window_of_one_sample_keeps_the_order_of_the_shards(shards: Path) -> None:
    stream = open_six(shards, lanes=1, window=1)
    wanted = [key for epoch in range(2) for key in in_shards(stream.shards_of(0, epoch))]
    assert keys_of(stream, 0, range(2 * sum(SIZES))) == wanted
    assert stream.read(0, 2 * sum(SIZES) + 3)[1].number == 2 * sum(SIZES) + 3
    stream.close()


def order_of(lanes: int) -> Order:
    """Half of the samples come from a stream of six shards, half from an indexed source."""
    return Order([4, np.asarray([50])], [Stage((1, 1))], 3, lanes=lanes, window=64, chunk=8)


def test_a_state_skips_what_came_before_without_reading_the_shards_again(shards: Path, tmp_path: Path) -> None:
    spec = "::".join(f"pipe:echo {n} >> {tmp_path}/opened; cat {shards}/{n}.tar" for n in range(6))
    stream = open_stream(spec, FILES, default_modalities(), 3, 4)
    wanted, state = stream.read(0, 50)
    stream.start([state])
    (tmp_path / "opened").unlink()
    assert stream.read(0, 50)[0] == wanted
    assert len((tmp_path / "opened").read_text().split()) <= 2
    stream.close()


def test_a_stream_that_the_checkpoint_does_not_know_starts_at_the_numbers_that_come_next(shards: Path) -> None:
    order, stream = order_of(8), open_six(shards, 4)
    for saved, told in (
        ({stream.identity: [LaneState(9)]}, "the checkpoint has 1 sub-lanes of it, now 4; set data.lanes back"),
        ({f"{stream.name} 12ab": [LaneState(9)]}, "its other commands, their order, stream_window or the seed have"),
        ({"pipe:cat another 12ab": [LaneState(9)]}, "its first command is new; the checkpoint has pipe:cat another"),
    ):
        (warning,) = stream_state.start({0: (stream, 4)}, saved, order, 5 * BATCH)
        assert told in warning and stream.name in warning and "12ab" not in warning
    places = order.at(np.arange(5 * BATCH))
    read = [int((places.sub_lane == lane).sum()) for lane in range(4)]  # before that batch
    assert [state.number for state in stream.states] == read
    first_window, wanted = keys_of(stream, 0, range(read[0], read[0] + 4)), keys_of(open_six(shards, 4), 0, range(4))
    assert sorted(first_window) == sorted(wanted)


@pytest.mark.parametrize(
    "value", [[], {"a": [[1, 2, 3]]}, {"a": [[1, 2, 3, -1]]}, {"a": [[1, 2, 3, True]]}, {"a": 3}]
)
def test_a_damaged_state_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="damaged or was edited"):
        stream_state.from_json(value)


def test_lanes_that_do_not_align_with_the_ranks_are_named() -> None:
    # 8 lanes in 4 sub-lanes of 2 neighbours. Of 16 positions in 2 microbatches, a rank of 4 reads 2 neighbours.
    order = Order([4], [Stage((1,))], 3, lanes=8, window=64, chunk=8)
    assert stream_state.sharing(order, 0, 4, 16, 2, 1) == ""
    assert stream_state.sharing(order, 0, 4, 16, 2, 4) == ""
    note = stream_state.sharing(order, 0, 4, 16, 1, 4)
    assert "4 of the 4 sub-lanes of source 0" in note and "a multiple of 4 shards (" in note


FAILURES = {
    "stall": ("head -c 2000 {shard}; sleep 30", "no byte in 0.5 s"),
    "exit code": ("cat {shard}; echo no such bucket >&2; exit 3", "exit code 3: no such bucket"),
    "truncated": ("head -c 3000 {shard}", "truncated"),
    "cut between members": ("head -c 2048 {shard}", "truncated"),
    "not a command": ("no-such-command {shard}", "cannot be run .exit code 127.*no-such-command"),
    "not a tar": ("seq 1000", "is not a whole tar file"),
    "secret": ("cat {shard}; echo TOKEN=abc123 >&2; exit 3 # PASSWORD=abc123", r"TOKEN=\*\*\*"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_command_that_fails_ends_with_one_line_that_names_it(shards: Path, failure: str) -> None:
    command, message = FAILURES[failure]
    files = HASTY if failure == "stall" else FILES
    stream = open_stream(f"pipe:{command.format(shard=shards / '0.tar')}", files, default_modalities())
    began = time.monotonic()
    with pytest.raises(ValueError, match=message) as caught:
        keys_of(stream, 0, range(8))
    assert time.monotonic() - began < 10
    text = str(caught.value)
    assert "pipe:" in text and "\n" not in text and "abc123" not in text
    stream.close()


@pytest.mark.parametrize("failure", ["stall", "exit code", "truncated", "cut between members"])
def test_a_command_that_fails_once_loses_and_repeats_nothing(shards: Path, tmp_path: Path, failure: str) -> None:
    shard, mark = shards / "3.tar", tmp_path / "failed"
    fails = FAILURES[failure][0].format(shard=shard)
    command = f"pipe:if [ -e {mark} ]; then cat {shard}; else touch {mark}; {fails}; fi"
    files = HASTY if failure == "stall" else FILES
    found, wanted = (open_stream(url, files, default_modalities(), window=3) for url in (command, str(shard)))
    assert keys_of(found, 0, range(20)) == keys_of(wanted, 0, range(20))
    assert mark.exists()
    found.close()


@pytest.mark.parametrize("read", [4, 8])  # samples of 1,024 bytes before it fails; then another shard, with 6
def test_a_shard_that_changes_between_two_attempts_is_refused(shards: Path, tmp_path: Path, read: int) -> None:
    mark = tmp_path / "failed"
    fails = f"touch {mark}; head -c {1024 * read + 512} {shards}/3.tar"
    command = f"pipe:if [ -e {mark} ]; then cat {shards}/5.tar; else {fails}; fi"
    stream = open_stream(command, FILES, default_modalities(), window=1)
    with pytest.raises(ValueError, match="it was changed"):
        keys_of(stream, 0, range(9))
    stream.close()


BAD_SHARDS = {
    "equal keys": ([("a.txt", b"1"), ("b.txt", b"2"), ("a.txt", b"3")], "holds key 'a' twice"),
    "equal names": ([("a.txt", b"1"), ("a.txt", b"3")], "holds key 'a' twice"),
    "dots in keys": ([("v1.0000.png", b"1"), ("v1.0001.png", b"2")], "files of one kind under the key 'v1'"),
    "tied": ([("a.left.png", b"1"), ("a.right.png", b"2")], "has left.png, right.png, and one of them is read as"),
    "empty": ([(".DS_Store", b"1")], "holds no sample"),
}


@pytest.mark.parametrize("kind", BAD_SHARDS)
def test_the_rules_of_indexed_shards_hold_for_streams(tmp_path: Path, kind: str) -> None:
    members, message = BAD_SHARDS[kind]
    stream = open_stream(f"pipe:cat {write_tar(tmp_path / 'a.tar', members)}", FILES, default_modalities())
    with pytest.raises(ValueError, match=message):
        stream.read(0, 0)
    stream.close()


def test_members_that_no_modality_reads_are_named_and_leftovers_are_passed(tmp_path: Path) -> None:
    members = [("._a.png", b"?"), ("./a.txt", b"text"), ("./a.bin", b"0" * 2000), ("./b.TXT", b"more")]
    path = write_tar(tmp_path / "a.tar", members)
    stream = open_stream(f"pipe:cat {path}", FILES, default_modalities(), window=1)
    first, second = (stream.read(0, number)[0] for number in range(2))
    assert (first.key, first.members, first.unread) == ("a", {"txt": b"text"}, ("bin",))
    assert (second.key, second.members) == ("b", {"txt": b"more"})
    stream.close()


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_compressed_tars_are_read(shards: Path, tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    data = compress((shards / "3.tar").read_bytes())
    (tmp_path / "whole").write_bytes(data)
    (tmp_path / "cut").write_bytes(data[: len(data) // 2])
    stream = open_stream(f"pipe:cat {tmp_path}/whole", FILES, default_modalities(), window=1)
    assert keys_of(stream, 0, range(9)) == [f"3-{n}" for n in range(9)]
    cut = open_stream(f"pipe:cat {tmp_path}/cut", FILES, default_modalities())
    with pytest.raises(ValueError, match="cannot be read beyond"):
        keys_of(cut, 0, range(9))


def processes(mark: str) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if mark.encode() in command:
                found.append(entry.name)
    return found


@pytest.mark.parametrize("end", ["closed", "killed"])
def test_no_process_of_a_command_outlives_its_reader(shards: Path, end: str) -> None:
    mark = f"sleep 86{os.getpid()}.{len(end)}"  # one that no other process has
    command = f"pipe:cat {shards}/3.tar | (head -c 20000; {mark}) & {mark}"
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        for name in (signal.SIGTERM, signal.SIGINT):  # as a data worker does
            signal.signal(name, signal.SIG_IGN)
        stream = open_stream(command, FILES, default_modalities(), window=1)
        stream.read(0, 0)
        os.write(writer, b"x")
        if end == "closed":
            stream.close()
        time.sleep(20)
        os._exit(0)
    try:
        assert os.read(reader, 1) == b"x"
        if end == "killed":
            assert processes(mark)
            os.kill(child, signal.SIGKILL)
        deadline = time.monotonic() + 5
        while processes(mark) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert processes(mark) == []
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reader)
        os.close(writer)
