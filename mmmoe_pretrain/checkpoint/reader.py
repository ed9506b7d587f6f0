"""Our checkpoint files as a storage of torch.distributed.checkpoint: reads only the bytes that a rank asks for."""

from __future__ import annotations

import os
from collections import defaultdict
from typing import Any

import torch
from torch.distributed.checkpoint import LoadPlan, LoadPlanner, Metadata, StorageReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.futures import Future

from mmmoe_pretrain.checkpoint.files import read_box
from mmmoe_pretrain.checkpoint.index import Index, StoredBox
from mmmoe_pretrain.checkpoint.storage import ReadInto, Storage
from mmmoe_pretrain.parallel.placement import Box


class CheckpointReader(StorageReader):
    """Reads the tensors of ``folder``; ``index`` is what its index.json says."""

    def __init__(self, storage: Storage, folder: str, index: Index) -> None:
        self.storage = storage
        self.folder = folder
        self.index = index

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        assert checkpoint_id is None, "the folder was given when this reader was made"

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return False

    def read_metadata(self, *args: Any) -> Metadata:
        return Metadata(
            {
                key: TensorStorageMetadata(
                    TensorProperties(tensor.dtype),
                    torch.Size(tensor.shape),
                    [ChunkStorageMetadata(torch.Size(box.offset), torch.Size(box.size)) for box in tensor.boxes],
                )
                for key, tensor in self.index.items()
            }
        )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        wanted = {item.storage_index.fqn for item in plan.items}
        boxes = {(key, box.offset): box for key in wanted for box in self.index[key].boxes}
        by_file: dict[str, list[tuple[StoredBox, ReadItem]]] = defaultdict(list)
        for item in plan.items:
            assert item.storage_index.offset is not None
            box = boxes[item.storage_index.fqn, tuple(item.storage_index.offset)]
            by_file[box.file].append((box, item))
        for file, items in by_file.items():
            items.sort(key=lambda pair: pair[0].at)
            with self.storage.reader(f"{self.folder}/{file}") as read_into:
                for box, item in items:
                    self._read(read_into, box, item, planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read(self, read_into: ReadInto, box: StoredBox, item: ReadItem, planner: LoadPlanner) -> None:
        target = planner.resolve_tensor(item).detach()
        dtype = self.index[item.storage_index.fqn].dtype
        whole = target if target.dtype == dtype else torch.empty(target.shape, dtype=dtype)
        wanted = Box(tuple(item.storage_offsets), tuple(item.lengths))
        read_box(read_into, box.at, box.size, wanted, self.storage.gap, whole)
        if whole is not target:
            target.copy_(whole)
        planner.commit_tensor(item, target)
