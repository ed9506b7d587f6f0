"""Options that commands share, with their help; ``--help`` shows them in groups."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmmoe_pretrain.paths import given

IMAGES, AUDIO, FILTERS, DOWNLOADS = "Images", "Audio", "Which samples", "Downloads"

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
Form = Annotated[str, typer.Option(help="manifest, table, folder, huggingface, zip or shards, where several fit.")]
Ratio = Annotated[
    list[str] | None,
    typer.Option(help="split=share, by group or key, for rows without a split: --ratio train=9 --ratio test=1."),
]
Order = Annotated[
    str | None, typer.Option(help="shuffled: by a hash of the key; input: as it is. Default: by the input.")
]
Retry = Annotated[
    bool, typer.Option("--retry", help="Add the rows that failed before, and only those, to the shards in --out.")
]
MaxBadFraction = Annotated[
    float, typer.Option(min=0, max=1, help="Fail if more than this share of the samples is broken.")
]

# of images and audio
ImageSize = Annotated[
    int | None,
    typer.Option(min=1, help="Shrink images to this many pixels of --image-side, on white.", rich_help_panel=IMAGES),
]
ImageSide = Annotated[
    str, typer.Option(help="longest or shortest: what --image-size limits.", rich_help_panel=IMAGES)
]
Crop = Annotated[bool, typer.Option("--crop", help="Take the centre square of images.", rich_help_panel=IMAGES)]
ImageFormat = Annotated[
    str,
    typer.Option(
        help="auto: images that --image-size or --crop changes become JPEG if their format is lossy (JPEG, "
        "lossy WebP), else PNG; others stay. keep: the format stays, too. jpeg, webp, png: for all images.",
        rich_help_panel=IMAGES,
    ),
]
ImageQuality = Annotated[int, typer.Option(min=1, max=100, help="Of JPEG and WebP.", rich_help_panel=IMAGES)]
AudioRate = Annotated[
    int | None,
    typer.Option(
        min=1000, max=192_000, help="Resample audio to this rate in Hz; mono FLAC by default.", rich_help_panel=AUDIO
    ),
]
AudioFormat = Annotated[
    str,
    typer.Option(
        help="keep (FLAC where the rate or channels change), flac, opus (8, 12, 16, 24 or 48 kHz; other rates "
        "become the next higher one) or wav, with 16 bits.",
        rich_help_panel=AUDIO,
    ),
]
AudioChannels = Annotated[
    str,
    typer.Option(
        help="1: mix all audio to mono. keep: as it is. Default: mono where audio is encoded.", rich_help_panel=AUDIO
    ),
]

# of quality/filters.py
Filter = Annotated[
    list[str] | None,
    typer.Option(
        help="Only rows with field=value (may be repeated; values of one field are alternatives).",
        rich_help_panel=FILTERS,
    ),
]
MinSize = Annotated[
    int | None, typer.Option(min=1, help="Only images whose shorter side has N pixels.", rich_help_panel=FILTERS)
]
MaxSize = Annotated[
    int | None,
    typer.Option(min=1, help="Only images whose longer side is at most N pixels.", rich_help_panel=FILTERS),
]
MaxAspect = Annotated[
    float | None,
    typer.Option(
        min=1, help="Only images whose longer side is at most X times the shorter one.", rich_help_panel=FILTERS
    ),
]
MinSeconds = Annotated[
    float | None, typer.Option(min=0, help="Only clips that last so long.", rich_help_panel=FILTERS)
]
MaxSeconds = Annotated[
    float | None, typer.Option(min=0, help="Only clips that last no longer.", rich_help_panel=FILTERS)
]
MinCharacters = Annotated[
    int | None, typer.Option(min=1, help="Only texts of so many characters.", rich_help_panel=FILTERS)
]
MaxCharacters = Annotated[
    int | None, typer.Option(min=1, help="Only texts of no more characters.", rich_help_panel=FILTERS)
]
Languages = Annotated[
    str | None,
    typer.Option(
        help="Only samples of these languages, by their field: en,de (en takes en-GB, too).", rich_help_panel=FILTERS
    ),
]

# of shards/fetch.py
Threads = Annotated[
    int, typer.Option(min=1, max=512, help="Downloads at once, of each worker.", rich_help_panel=DOWNLOADS)
]
PerHost = Annotated[
    int,
    typer.Option(
        min=1,
        help="Downloads at once from one host, of all workers; at least one of each.",
        rich_help_panel=DOWNLOADS,
    ),
]
Timeout = Annotated[
    float, typer.Option(min=0.1, max=600, help="Seconds that a server may be silent.", rich_help_panel=DOWNLOADS)
]
Retries = Annotated[
    int,
    typer.Option(
        min=0,
        max=20,
        help="Of a download that timed out or broke, and of status 408, 425, 429, 5xx.",
        rich_help_panel=DOWNLOADS,
    ),
]
IgnoreRobotsTag = Annotated[
    bool,
    typer.Option(
        "--ignore-robots-tag",
        help="Also take files whose server sends X-Robots-Tag: noai or noindex.",
        rich_help_panel=DOWNLOADS,
    ),
]
AllowPrivate = Annotated[
    bool,
    typer.Option(
        "--allow-private", help="Also download from addresses of this machine and network.", rich_help_panel=DOWNLOADS
    ),
]
