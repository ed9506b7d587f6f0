"""Options that commands share, with their help; ``--help`` shows them in groups."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mmmoe_pretrain.paths import given


def given_names(context: typer.Context) -> set[str]:
    """The parameters that the user has given."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name.rstrip("_") for name, source in sources.items() if source is not None and source.name != "DEFAULT"}


IMAGES, AUDIO, FILTERS, DOWNLOADS = "Images", "Audio", "Which samples", "Downloads"


def path(help: str) -> Any:
    return typer.Option(callback=given, help=help)


def _in(panel: str, help: str, *names: str, **limits: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **limits)


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object; all else goes to stderr.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done; write nothing.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the shards in a folder.")]
Workers = Annotated[int, typer.Option(help="Processes that read, decode and encode.")]
Out = Annotated[Path, typer.Option(callback=given, help="Folder for the shards, with one folder per split.")]
Shards = Annotated[list[str], typer.Argument(callback=given, help="Shards: folders, tars, URLs.")]
SamplesPerShard = Annotated[int, typer.Option(min=1, help="At most, in a shard.")]
ShardSize = Annotated[float, typer.Option(min=0.001, help="MB of a shard, at most.")]
NumberKeys = Annotated[
    bool, typer.Option("--number-keys", help="Begin each key with the number of its source, as in 0-KEY.")
]

# of shard: what holds the data
Source = Annotated[
    str,
    typer.Argument(
        callback=given,
        help="What holds the data: a folder, a table (.csv, .tsv, .jsonl, .json, .parquet, .txt of URLs), a zip, "
        "shards, a Hugging Face dataset folder or a manifest.jsonl; a path or URL, with braces, or a::b.",
    ),
]
Column = Annotated[
    list[str] | None,
    typer.Option(
        help="FIELD=COLUMN of a table, such as image=URL or audio=wavs/{id}.wav; FIELD= takes none (may be "
        "repeated). Columns with well-known names need none."
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="field=value of rows that name none, such as language=en or licence=CC-BY-4.0 (may be repeated).",
    ),
]
Form = Annotated[str, typer.Option(help="manifest, table, folder, huggingface, zip or shards, where several fit.")]
Ratio = Annotated[
    list[str] | None,
    typer.Option(help="split=share, by group or key, for rows without a split: --ratio train=9 --ratio test=1."),
]
Order = Annotated[
    str | None, typer.Option(help="shuffled: by a hash of the key; input: as it is. Default: by the input.")
]
Retry = Annotated[
    bool,
    typer.Option(
        "--retry",
        help="Add the rows that failed before, and only those, to the shards in --out, by the options of before.",
    ),
]
MaxBadFraction = Annotated[
    float, typer.Option(min=0, max=1, help="Fail if more than this share of the samples is broken.")
]

# of images and audio
ImageSize = Annotated[int | None, _in(IMAGES, "Shrink images to this many pixels of --image-side, on white.", min=1)]
ImageSide = Annotated[str, _in(IMAGES, "longest or shortest: what --image-size limits.")]
Crop = Annotated[bool, _in(IMAGES, "Take the centre square of images.", "--crop")]
ImageFormat = Annotated[
    str,
    _in(
        IMAGES,
        "auto: images that --image-size or --crop changes become JPEG if their format is lossy (JPEG, "
        "lossy WebP), else PNG; others stay. keep: the format stays, too. jpeg, webp, png: for all images.",
    ),
]
ImageQuality = Annotated[int, _in(IMAGES, "Of JPEG and WebP.", min=1, max=100)]
AudioRate = Annotated[
    int | None, _in(AUDIO, "Resample audio to this rate in Hz; mono FLAC by default.", min=1000, max=192_000)
]
AudioFormat = Annotated[
    str,
    _in(
        AUDIO,
        "keep (FLAC where the rate or channels change), flac, opus (8, 12, 16, 24 or 48 kHz; other rates "
        "become the next higher one) or wav, with 16 bits.",
    ),
]
AudioChannels = Annotated[
    str, _in(AUDIO, "1: mix all audio to mono. keep: as it is. Default: mono where audio is encoded.")
]

# of quality/filters.py
Filter = Annotated[
    list[str] | None,
    _in(FILTERS, "Only rows with field=value (may be repeated; values of one field are alternatives)."),
]
MinSize = Annotated[int | None, _in(FILTERS, "Only images whose shorter side has N pixels.", min=1)]
MaxSize = Annotated[int | None, _in(FILTERS, "Only images whose longer side is at most N pixels.", min=1)]
MaxAspect = Annotated[
    float | None, _in(FILTERS, "Only images whose longer side is at most X times the shorter one.", min=1)
]
MinSeconds = Annotated[float | None, _in(FILTERS, "Only clips that last so long.", min=0)]
MaxSeconds = Annotated[float | None, _in(FILTERS, "Only clips that last no longer.", min=0)]
MinCharacters = Annotated[int | None, _in(FILTERS, "Only texts of so many characters.", min=1)]
MaxCharacters = Annotated[int | None, _in(FILTERS, "Only texts of no more characters.", min=1)]
Languages = Annotated[
    str | None, _in(FILTERS, "Only samples of these languages, by their field: en,de (en takes en-GB, too).")
]

# of shards/fetch.py
Threads = Annotated[int, _in(DOWNLOADS, "Downloads at once, of each worker.", min=1, max=512)]
PerHost = Annotated[
    int, _in(DOWNLOADS, "Downloads at once from one host, of all workers; at least one of each.", min=1)
]
Timeout = Annotated[float, _in(DOWNLOADS, "Seconds that a server may be silent.", min=0.1, max=600)]
Retries = Annotated[
    int,
    _in(DOWNLOADS, "Of a download that timed out or broke, and of status 408, 425, 429, 5xx.", min=0, max=20),
]
IgnoreRobotsTag = Annotated[
    bool,
    _in(DOWNLOADS, "Also take files whose server sends X-Robots-Tag: noai or noindex.", "--ignore-robots-tag"),
]
AllowPrivate = Annotated[
    bool, _in(DOWNLOADS, "Also download from addresses of this machine and network.", "--allow-private")
]
