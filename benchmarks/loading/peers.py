"""One loader over shards of images and texts, or of audio: run as a script in the loader's own environment.

Reads no module of this project, so that it runs where that is not installed. Each loader works as its users run it:
Pillow decodes the whole image, resizes its shorter side to 224 with BICUBIC and crops the centre; sentencepiece makes
the tokens; torch.stft makes the log-mel spectrogram. One worker process, batches of 64.

Its standard input is a line for each turn: the number of batches to time. Its answer is a line of JSON: samples,
seconds of the clock and of CPU over all its processes.
"""

from __future__ import annotations

import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

BATCH, SIDE = 64, 224
WARM_UP = 4  # batches that are not timed
RATE, N_FFT, HOP, MELS = 16_000, 512, 160, 64
TICKS = os.sysconf("SC_CLK_TCK")
Decoder = Callable[[bytes, str], tuple[torch.Tensor, torch.Tensor]]  # (content, text) -> its tensors


def cpu_seconds(root: int | None = None) -> float:
    """User and system seconds of a process and all its living descendants."""
    children: dict[int, list[int]] = {}
    used: dict[int, float] = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        children.setdefault(int(fields[1]), []).append(int(entry))
        used[int(entry)] = (int(fields[11]) + int(fields[12])) / TICKS
    total, todo = 0.0, [root or os.getpid()]
    while todo:
        process = todo.pop()
        total += used.get(process, 0.0)
        todo += children.get(process, [])
    return total


def timed(batches: Iterator[Any], count: int) -> dict[str, float]:
    """The next ``count`` batches. The last one of an epoch may have fewer than BATCH samples."""
    began, cpu, samples = time.perf_counter(), cpu_seconds(), 0
    for _ in range(count):
        _, ids = next(batches)
        samples += len(ids)
    return {"samples": samples, "seconds": time.perf_counter() - began, "cpu": cpu_seconds() - cpu}


def image_of(data: bytes) -> torch.Tensor:
    """uint8 [3, 224, 224]."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    scale = SIDE / min(image.size)
    wide, high = (round(side * scale) for side in image.size)
    image = image.resize((wide, high), Image.Resampling.BICUBIC)
    left, top = (wide - SIDE) // 2, (high - SIDE) // 2
    image = image.crop((left, top, left + SIDE, top + SIDE))
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).contiguous()


class Tokens:
    """Texts -> int64 ids, by the sentencepiece model of the benchmark."""

    def __init__(self, model: str) -> None:
        import sentencepiece

        self._model = sentencepiece.SentencePieceProcessor(model_file=model)

    def __call__(self, text: str) -> torch.Tensor:
        return torch.tensor(self._model.encode(text, add_bos=True, add_eos=True))


class LogMel:
    """Encoded audio -> float32 [MELS, frames]."""

    def __init__(self) -> None:
        points = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + RATE / 2 / 700), MELS + 2) / 2595) - 1)
        bins = np.linspace(0, RATE / 2, N_FFT // 2 + 1)
        rising = (bins - points[:-2, None]) / (points[1:-1] - points[:-2])[:, None]
        falling = (points[2:, None] - bins) / (points[2:] - points[1:-1])[:, None]
        self._filters = torch.from_numpy(np.maximum(0, np.minimum(rising, falling)).astype(np.float32))
        self._window = torch.hann_window(N_FFT)

    def __call__(self, data: bytes) -> torch.Tensor:
        import soundfile

        wave, _ = soundfile.read(io.BytesIO(data), dtype="float32")
        spectrum = torch.stft(torch.from_numpy(wave), N_FFT, HOP, window=self._window, return_complex=True)
        return torch.log10(torch.clamp(self._filters @ spectrum.abs().square(), min=1e-10))


def collated(samples: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Padded to the longest."""
    first = [a for a, _ in samples]
    wide = max(a.shape[-1] for a in first)
    first = [torch.nn.functional.pad(a, (0, wide - a.shape[-1])) for a in first]
    ids = torch.nn.utils.rnn.pad_sequence([b for _, b in samples], batch_first=True)
    return torch.stack(first), ids


def decoder(kind: str, tokenizer: str) -> Decoder:
    """(content, text) -> its tensors."""
    tokens, first = Tokens(tokenizer), LogMel() if kind == "audio" else image_of
    return lambda data, text: (first(data), tokens(text))


def webdataset_batches(
    shards: Path, kind: str, tokenizer: str, workers: int, of: Decoder | None = None
) -> Iterator[Any]:
    """``of``: another decoder than that of its users."""
    import webdataset

    of = of or decoder(kind, tokenizer)
    member = "flac" if kind == "audio" else "jpg"
    urls = [str(path) for path in sorted(shards.glob("*.tar"))]
    dataset = (
        webdataset.WebDataset(urls, shardshuffle=len(urls), workersplitter=None, empty_check=False)
        .repeat()
        .shuffle(500)
        .to_tuple(member, "txt")
        .map(lambda pair: of(pair[0], pair[1].decode()))
        .batched(BATCH, collation_fn=collated)
    )
    return iter(webdataset.WebLoader(dataset, batch_size=None, num_workers=workers))


def energon_batches(shards: Path, kind: str, tokenizer: str, workers: int) -> Iterator[Any]:
    """A folder that ``energon prepare`` has seen, as crude samples and a cooker."""
    from megatron.energon import (
        Cooker,
        DefaultTaskEncoder,
        WorkerConfig,
        basic_sample_keys,
        edataclass,
        get_loader,
        get_train_dataset,
        stateless,
    )
    from megatron.energon import Sample as EnergonSample

    of = decoder(kind, tokenizer)
    member = "flac" if kind == "audio" else "jpg"

    @edataclass
    class Pair(EnergonSample):
        first: Any
        ids: Any

    @stateless
    def cook(sample: dict[str, Any]) -> Any:
        text = sample["txt"]
        first, ids = of(sample[member], text if isinstance(text, str) else text.decode())
        return Pair(**basic_sample_keys(sample), first=first, ids=ids)

    class Encoder(DefaultTaskEncoder):
        decoder = None
        cookers = (Cooker(cook),)

        def batch(self, samples: list[Any]) -> Any:
            return collated([(sample.first, sample.ids) for sample in samples])

    dataset = get_train_dataset(
        shards,
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=workers),
        batch_size=BATCH,
        shuffle_buffer_size=500,
        max_samples_per_sequence=100,
        task_encoder=Encoder(),
    )
    return iter(get_loader(dataset))


def litdata_batches(shards: Path, kind: str, tokenizer: str, workers: int) -> Iterator[Any]:
    """A folder of litdata's chunks with the same bytes."""
    from litdata import StreamingDataLoader, StreamingDataset

    of = decoder(kind, tokenizer)

    class Decoded(StreamingDataset):
        def __getitem__(self, index: Any) -> Any:
            row = super().__getitem__(index)
            return of(row["data"], row["text"])

    def endless() -> Iterator[Any]:
        dataset = Decoded(str(shards), shuffle=True)
        loader = StreamingDataLoader(
            dataset,
            batch_size=BATCH,
            num_workers=workers,
            collate_fn=collated,
            drop_last=True,
            persistent_workers=workers > 0,
        )
        while True:
            yield from loader

    return endless()


def make_litdata(source: Path, out: Path) -> None:
    """The samples of the tars ``source`` as litdata's chunks."""
    import litdata

    tars = [str(path) for path in sorted(source.glob("*.tar"))]
    litdata.optimize(fn=_rows_of_tar, inputs=tars, output_dir=str(out), chunk_bytes="64MB", num_workers=1)


def _rows_of_tar(path: str) -> Iterator[dict[str, Any]]:
    import tarfile

    with tarfile.open(path) as tar:
        found: dict[str, dict[str, bytes]] = {}
        for member in tar:
            key, _, extension = member.name.partition(".")
            file = tar.extractfile(member)
            assert file is not None
            found.setdefault(key, {})[extension] = file.read()
    for members in found.values():
        text = members.pop("txt").decode()
        members.pop("json", None)
        (data,) = members.values()
        yield {"data": data, "text": text}


LOADERS: dict[str, Callable[[Path, str, str, int], Iterator[Any]]] = {
    "webdataset": webdataset_batches,
    "energon": energon_batches,
    "litdata": litdata_batches,
}


def serve(batches: Iterator[Any]) -> None:
    """Measure as asked by the lines of the standard input."""
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    for _ in range(WARM_UP):
        next(batches)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(timed(batches, int(line))), file=answers, flush=True)
    os._exit(0)  # a peer's workers are not waited for


def main() -> None:
    name, folder, kind, tokenizer, workers = sys.argv[1:]
    if name == "make_litdata":
        make_litdata(Path(folder), Path(kind))
    else:
        serve(LOADERS[name](Path(folder), kind, tokenizer, int(workers)))


if __name__ == "__main__":
    main()
