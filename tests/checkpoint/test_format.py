"""The files of a checkpoint: any safetensors reader reads them, and boxes of them are read alone."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mmmoe_pretrain.checkpoint import store
from mmmoe_pretrain.checkpoint.files import DTYPES, Entry, digest_of, header_of, read_box, write_tensors
from mmmoe_pretrain.checkpoint.state import ShardedTensor
from mmmoe_pretrain.checkpoint.storage import LocalStorage, ReadInto
from mmmoe_pretrain.parallel.placement import Box
from mmmoe_pretrain.parallel.runtime import process_group
from tests.checkpoint.support import boxes_in, numbers, save, small_state
from tests.distributed import run_ranks


def of_every_dtype() -> dict[str, torch.Tensor]:
    """Odd sizes, a view, a number, and nothing at all."""
    values = {name: numbers((3, 5)).to(torch.float32).clamp(max=1 if name == "BOOL" else 9).to(dtype)
              for name, dtype in DTYPES.items()}  # fmt: skip
    return {
        **values, "number": torch.tensor(2.5), "nothing": torch.empty(0, 4), "view": numbers((4, 6))[:, 1:3],
        "bf16 view": numbers((4, 6)).to(torch.bfloat16).T,
    }  # fmt: skip


def write(folder: Path, tensors: dict[str, torch.Tensor]) -> tuple[list[Entry], Path, str]:
    entries = [Entry(key, t.dtype, tuple(t.shape)) for key, t in tensors.items()]
    entries.sort(key=lambda entry: -entry.dtype.itemsize)
    storage = LocalStorage(str(folder))
    storage.make_folder("f")
    record = write_tensors(storage, "f", "rank_00000.safetensors", entries, [tensors[e.key] for e in entries])
    path = folder / "f" / record.name
    assert record.nbytes == path.stat().st_size
    assert digest_of(storage, f"f/{record.name}", record.nbytes) == record.digest
    return entries, path, record.digest


def test_safetensors_reads_every_dtype_and_size(tmp_path: Path) -> None:
    tensors = of_every_dtype()
    entries, path, _ = write(tmp_path, tensors)
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert found[key].dtype == tensor.dtype and found[key].shape == tensor.shape, key
        assert torch.equal(found[key].to(torch.float64), tensor.to(torch.float64)), key
    _, begins = header_of(entries)
    assert all(at % entry.dtype.itemsize == 0 for at, entry in zip(begins, entries, strict=True))


@st.composite
def a_box(draw: st.DrawFn) -> tuple[tuple[int, ...], Box]:
    shape = tuple(draw(st.lists(st.integers(1, 7), max_size=4)))
    offset = tuple(draw(st.integers(0, n - 1)) for n in shape)
    size = tuple(draw(st.integers(0, n - o)) for o, n in zip(offset, shape, strict=True))
    return shape, Box(offset, size)


@given(a_box(), st.sampled_from([1, 8, 30, 1 << 20]), st.sampled_from([torch.float32, torch.bfloat16]), st.booleans())
@settings(max_examples=200, deadline=None)
def test_any_box_is_read_alone_whatever_the_gap(
    case: tuple[tuple[int, ...], Box], gap: int, dtype: torch.dtype, strided: bool
) -> None:
    shape, box = case
    whole = numbers(shape).to(dtype)
    data = b"header.." + whole.reshape(-1).view(torch.uint8).numpy().tobytes()
    reads = []

    def read_into(at: int, buffer: memoryview) -> None:
        assert len(buffer) > 0 and at >= 8 and at + len(buffer) <= len(data)
        reads.append(len(buffer))
        buffer[:] = data[at : at + len(buffer)]

    target = torch.zeros(*box.size, 2 if strided else 1, dtype=dtype)[..., 0]
    read_box(read_into, 8, shape, box, gap, target)
    expected = whole[tuple(slice(o, o + n) for o, n in zip(box.offset, box.size, strict=True))]
    assert torch.equal(target, expected)
    if gap == 1:  # then nothing but the box is read
        assert sum(reads) == expected.numel() * dtype.itemsize


def save_four(root: Path) -> None:
    with process_group(timeout_minutes=0.5):
        save(root, 7, small_state(dist.get_rank(), 4), {"seed": 1}, dist.group.WORLD)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four ranks' checkpoint."""
    root = tmp_path_factory.mktemp("four")
    run_ranks(4, save_four, root)
    return root / "step_00000007"


def test_the_boxes_of_four_ranks_stand_where_the_index_says(saved: Path) -> None:
    assert sorted(p.name for p in saved.iterdir()) == [
        "boxes.bin", "index.json", "manifest.json", "meta.json", *(f"rank_0000{r}.safetensors" for r in range(4)),
    ]  # fmt: skip
    index = json.loads((saved / "index.json").read_text())
    assert len(index["tensors"]) == 7
    boxes = boxes_in(saved)
    seen = 0
    for key, tensor in index["tensors"].items():
        whole = torch.full(tensor["shape"], torch.nan)
        for file, at, offset, size in boxes[key]:
            name = f"{key}@{','.join(map(str, offset))}"
            with safe_open(saved / index["files"][file], "pt") as opened:
                box = opened.get_tensor(name)
            there = (saved / index["files"][file]).read_bytes()[at : at + 4 * math.prod(size)]
            assert box.numpy().tobytes() == there
            whole[tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))] = box
            seen += 1
        (expected,) = small_state()[key].pieces.values()
        assert torch.equal(whole, expected), key
    assert seen == 4 * 6 + 1  # the bias, which all ranks have, once
    assert json.loads((saved / "meta.json").read_text()) == {"seed": 1, "step": 7}


def test_a_folder_of_version_1_written_by_hand_is_a_checkpoint(tmp_path: Path) -> None:
    """By safetensors and json alone, as the format says: what older versions saved stays readable."""
    folder = tmp_path / "step_00000007"
    folder.mkdir()
    weight, moment = numbers((4, 3)), numbers((4, 3), 50)
    halves = {"model/w@0,0": weight[:2], "model/w@2,0": weight[2:], "optimizer/w/exp_avg@0,0": moment}
    save_file({name: tensor.contiguous() for name, tensor in halves.items()}, folder / "rank_00000.safetensors")
    data = (folder / "rank_00000.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    at = {name: 8 + length + header[name]["data_offsets"][0] for name in halves}
    boxes = {"model/w": [[0, at["model/w@0,0"], [0, 0], [2, 3]], [0, at["model/w@2,0"], [2, 0], [2, 3]]],
             "optimizer/w/exp_avg": [[0, at["optimizer/w/exp_avg@0,0"], [0, 0], [4, 3]]]}  # fmt: skip
    tensors = {key: {"shape": [4, 3], "dtype": "F32", "boxes": held} for key, held in boxes.items()}
    (folder / "index.json").write_text(json.dumps({"files": ["rank_00000.safetensors"], "tensors": tensors}))
    (folder / "meta.json").write_text(json.dumps({"step": 7}))
    files = {path.name: {"bytes": path.stat().st_size, "xxh3_128": xxhash.xxh3_128(path.read_bytes()).hexdigest()}
             for path in folder.iterdir()}  # fmt: skip
    manifest = {"format": "mmmoe-checkpoint", "version": 1, "step": 7, "files": files}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    checkpoint = store.find_latest(tmp_path)
    assert checkpoint is not None and checkpoint.step == 7
    store.verify(checkpoint)
    found = store.read_state(checkpoint)
    assert found.keys() == boxes.keys()
    assert torch.equal(found["model/w"], weight) and torch.equal(found["optimizer/w/exp_avg"], moment)


def test_a_rank_reads_little_more_than_what_it_asks_for(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    original = LocalStorage.reader

    @contextmanager
    def counting(self: LocalStorage, path: str) -> Iterator[ReadInto]:
        with original(self, path) as read_into:

            def counted(at: int, buffer: memoryview) -> None:
                read.append(len(buffer))
                read_into(at, buffer)

            yield counted

    monkeypatch.setattr(LocalStorage, "reader", counting)
    checkpoint = store.find_latest(saved.parent)
    assert checkpoint is not None
    rows = torch.zeros(8, 6)
    store.load_weights(checkpoint, {"rows": rows})
    assert torch.equal(rows, numbers((8, 6))) and sum(read) == 4 * 48 + 4 * 6 * 8  # rows of boxes.bin
    with pytest.raises(ValueError, match=r"is of another model: it lacks model/unheard_of \(1 such"):
        store.load_weights(checkpoint, {"unheard_of": torch.zeros(1)})


def test_a_dtype_that_files_cannot_hold_is_refused(tmp_path: Path) -> None:
    odd = {"model/z": ShardedTensor.whole(torch.zeros(5, dtype=torch.complex64))}
    with pytest.raises(ValueError, match=r"hold model/z as torch\.complex64"):
        save(tmp_path, 1, odd)


@pytest.mark.parametrize("shapes", [[()], [(), (3, 2)], [(0, 4)], []])
def test_numbers_empty_tensors_and_no_tensors_are_saved(tmp_path: Path, shapes: list[tuple[int, ...]]) -> None:
    state = {f"model/{number}": numbers(shape, 2.5) for number, shape in enumerate(shapes)}
    found = store.read_state(store.write_state(tmp_path, 1, state, {}))
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in state.items())
