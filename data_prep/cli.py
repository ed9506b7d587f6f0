"""``mmmoe-data``: the commands and their options. The work of each is in the file of its name.

Heavy modules are imported inside the commands, so that ``--help`` answers at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmmoe_pretrain import __version__
from mmmoe_pretrain.data_prep import console
from mmmoe_pretrain.data_prep import options as o
from mmmoe_pretrain.data_prep.console import kept
from mmmoe_pretrain.paths import given

RESUMES = "finished shards are kept in {}/building.tmp; repeat the command to resume"

app = typer.Typer(
    name="mmmoe-data",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="From raw files to shards: corpora, shards and tokenizers for MMMoE.",
    epilog="Exit codes: 0 done, 1 problems found, 2 bad input or usage, 130 after Ctrl-C, 143 after SIGTERM.",
)


@app.callback(invoke_without_command=True)
def options(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """The options before a command."""
    if version:
        print(f"mmmoe-data {__version__}")
        raise typer.Exit


@app.command(epilog="Example: mmmoe-data corpus mini --out data/mini")
def corpus(
    name: Annotated[
        str,
        typer.Argument(
            help="tuxpaint, emoji, cldr-emoji, asterisk, gcide, wordnet, debian-handbook, installation-guide, "
            "package-descriptions or mini."
        ),
    ],
    out: Annotated[Path, typer.Option(callback=given, help="Folder for the files and manifest.jsonl.")],
    language: Annotated[
        list[str] | None,
        typer.Option(help="Only these languages (may be repeated); of tuxpaint, those of the translated subset."),
    ] = None,
    dry_run: o.DryRun = False,
    as_json: o.Json = False,
) -> None:
    """Fetch a real corpus and write its manifest.

    Splits hold within one manifest: mini has recordings of asterisk and images of emoji in splits of
    its own, so a model trained on those must not be tested on mini, or the reverse.
    """
    from mmmoe_pretrain.data_prep import corpus as work

    with kept(f"what was downloaded is kept in {out}; repeat the command to resume"):
        work.run(name, out, tuple(language or ()), dry_run, as_json)


@app.command(
    epilog="Example: mmmoe-data shard photos --out data/photos --image-size 256 --ratio train=9 --ratio test=1"
)
def shard(
    context: typer.Context,
    source: o.Source,
    out: o.Out,
    column: o.Column = None,
    set_: o.Set = None,
    form: o.Form = "",
    ratio: o.Ratio = None,
    order: o.Order = None,
    samples_per_shard: o.SamplesPerShard = 10_000,
    shard_size: o.ShardSize = 1000,
    workers: o.Workers = 2,
    max_bad_fraction: o.MaxBadFraction = 0.01,
    retry: o.Retry = False,
    overwrite: o.Overwrite = False,
    dry_run: o.DryRun = False,
    as_json: o.Json = False,
    image_size: o.ImageSize = None,
    image_side: o.ImageSide = "longest",
    crop: o.Crop = False,
    image_format: o.ImageFormat = "auto",
    image_quality: o.ImageQuality = 90,
    audio_rate: o.AudioRate = None,
    audio_format: o.AudioFormat = "keep",
    audio_channels: o.AudioChannels = "",
    filter: o.Filter = None,
    min_size: o.MinSize = None,
    max_size: o.MaxSize = None,
    max_aspect: o.MaxAspect = None,
    min_seconds: o.MinSeconds = None,
    max_seconds: o.MaxSeconds = None,
    min_characters: o.MinCharacters = None,
    max_characters: o.MaxCharacters = None,
    language: o.Languages = None,
    threads: o.Threads = 16,
    per_host: o.PerHost = 16,
    timeout: o.Timeout = 10.0,
    retries: o.Retries = 2,
    ignore_robots_tag: o.IgnoreRobotsTag = False,
    allow_private: o.AllowPrivate = False,
) -> None:
    """Write what people have as shards with indices; an interrupted run resumes when it is repeated."""
    from mmmoe_pretrain.data_prep.quality.filters import Filters, languages
    from mmmoe_pretrain.data_prep.rows.inputs import open_input
    from mmmoe_pretrain.data_prep.shards import shard as work
    from mmmoe_pretrain.data_prep.shards.fetch import FetchOptions
    from mmmoe_pretrain.data_prep.shards.media import MediaOptions
    from mmmoe_pretrain.data_prep.shards.writing import ShardOptions

    media = MediaOptions(
        image_size, audio_rate, image_format, image_quality, image_side, crop, audio_format, audio_channels
    )
    filters = Filters(
        min_size, max_size, max_aspect, min_seconds, max_seconds, min_characters, max_characters, languages(language)
    )
    fetch = FetchOptions(threads, per_host, timeout, retries, ignore_robots_tag, allow_private)
    size = int(shard_size * 10**6)
    options = ShardOptions(samples_per_shard, size, media, workers, max_bad_fraction, overwrite, fetch, filters)
    choice = work.Choice(
        tuple(filter or ()), work.ratios_of(ratio or ()), retry, work.order_of(order), tuple(column or ()),
        work.constants_of(set_ or ()),
    )  # fmt: skip
    if retry:
        options, choice = work.continued(out, options, choice, o.given_names(context))
    rows = open_input(source, choice.columns, form)
    if dry_run:
        work.show_plan(work.plan(rows, out, choice, options), as_json)
        return
    with kept(RESUMES.format(out)):
        work.show(work.run(rows, out, choice, options), out, as_json)


@app.command(epilog="Example: mmmoe-data reshard data/many --out data/few --shard-size 500 --filter language=en")
def reshard(
    sources: o.Shards,
    out: o.Out,
    samples_per_shard: o.SamplesPerShard = 10_000,
    shard_size: o.ShardSize = 1000,
    order: Annotated[str, typer.Option(help="input: as it is; shuffled: by a hash of the key.")] = "input",
    split: Annotated[str, typer.Option(help="Of shards that lie in no folder named after a split.")] = "train",
    number_keys: o.NumberKeys = False,
    workers: o.Workers = 2,
    overwrite: o.Overwrite = False,
    dry_run: o.DryRun = False,
    as_json: o.Json = False,
    keys: Annotated[
        Path | None,
        typer.Option(callback=given, help="Only samples whose key this file has.", rich_help_panel=o.FILTERS),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(min=1, help="Only so many, chosen by a hash of the key.", rich_help_panel=o.FILTERS),
    ] = None,
    filter: o.Filter = None,
    min_size: o.MinSize = None,
    max_size: o.MaxSize = None,
    max_aspect: o.MaxAspect = None,
    min_seconds: o.MinSeconds = None,
    max_seconds: o.MaxSeconds = None,
    min_characters: o.MinCharacters = None,
    max_characters: o.MaxCharacters = None,
    language: o.Languages = None,
) -> None:
    """Write the samples of shards as shards of another size or order, or a subset; files stay as they are."""
    from mmmoe_pretrain.data_prep import reshard as work
    from mmmoe_pretrain.data_prep.quality.filters import Filters, languages
    from mmmoe_pretrain.data_prep.shards.shard import order_of

    filters = Filters(
        min_size, max_size, max_aspect, min_seconds, max_seconds, min_characters, max_characters, languages(language)
    )
    parts = work.open_parts(sources, split)
    work.choose(parts, work.Subset(tuple(filter or ()), work.read_keys(keys) if keys else None, samples))
    options = work.copied(samples_per_shard, shard_size, workers, overwrite, filters)
    with kept(RESUMES.format(out)):
        work.run(parts, out, options, order_of(order) or "input", number_keys, dry_run, as_json)


@app.command(epilog="Example: mmmoe-data mix data/web/train=3 data/books/train=1 --out data/blend")
def mix(
    sources: Annotated[list[str], typer.Argument(callback=given, help="SOURCE=WEIGHT, each shards of one split.")],
    out: o.Out,
    samples: Annotated[int | None, typer.Option(min=1, help="In all; default: as many as the shares allow.")] = None,
    samples_per_shard: o.SamplesPerShard = 10_000,
    shard_size: o.ShardSize = 1000,
    number_keys: o.NumberKeys = False,
    workers: o.Workers = 2,
    overwrite: o.Overwrite = False,
    dry_run: o.DryRun = False,
    as_json: o.Json = False,
) -> None:
    """Write a blend of several sources by weights as shuffled shards; no sample comes twice."""
    from mmmoe_pretrain.data_prep import reshard as work

    parts, options = work.mix(sources, samples), work.copied(samples_per_shard, shard_size, workers, overwrite)
    with kept(RESUMES.format(out)):
        work.run(parts, out, options, "shuffled", number_keys, dry_run, as_json)


@app.command(epilog="Example: mmmoe-data dedup data/shards --near --against data/test --out data/clean")
def dedup(
    shards: Annotated[
        list[str], typer.Argument(callback=given, help="Shards: folders of splits, splits, tars or URLs.")
    ],
    against: Annotated[
        list[str] | None,
        typer.Option(
            callback=given, help="Held-out samples, which are never dropped: shards, or hashes (.txt, .parquet)."
        ),
    ] = None,
    near: Annotated[bool, typer.Option("--near", help="Also near duplicates: edited images, similar texts.")] = False,
    by: Annotated[
        str, typer.Option(help="A sample is compared by the first of these that it has; image+text: by both.")
    ] = "image,audio,text",
    image_distance: Annotated[
        int, typer.Option(min=0, max=10, help="Bits of 64 by which the hashes of near images differ, at most.")
    ] = 4,
    text_similarity: Annotated[
        float, typer.Option(min=0.5, max=1, help="Share of runs of 5 characters that near texts have in common.")
    ] = 0.8,
    report: Annotated[Path | None, o.path("A Parquet file of the samples to drop, and of what they repeat.")] = None,
    hashes: Annotated[Path | None, o.path("A Parquet file of the hashes of the others, for --against.")] = None,
    out: Annotated[Path | None, o.path("Folder for shards of the samples that remain.")] = None,
    quarantine: Annotated[Path | None, o.path("Folder for shards of the samples that are dropped.")] = None,
    number_keys: o.NumberKeys = False,
    overwrite: o.Overwrite = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write no shards; --report and --hashes are written.")
    ] = False,
    as_json: o.Json = False,
    workers: Annotated[int, typer.Option(min=1, help="Processes that read and hash.")] = 2,
) -> None:
    """Find duplicates within shards, between their splits, and of held-out samples.

    Kept is the first of equal samples: of --against, then of test, of val, of train, in the order of the shards.
    """
    from mmmoe_pretrain.data_prep.quality import dedup as work
    from mmmoe_pretrain.data_prep.quality.samples import Settings, read_by

    settings = Settings(read_by(by), near, image_distance, text_similarity)
    files = report, hashes, out, quarantine
    options = work.Options(tuple(against or ()), settings, *files, number_keys, overwrite, dry_run, workers)
    with kept("the shards are as they were; repeat the command"):
        work.run(shards, options, as_json)


@app.command(epilog="Example: mmmoe-data tokenizer data/shards more.jsonl --vocab-size 8000 --out data/t.model")
def tokenizer(
    paths: Annotated[
        list[str], typer.Argument(callback=given, help="Shards, manifests, tables or folders, in any mix.")
    ],
    out: Annotated[Path, typer.Option(callback=given, help="The .model file to write.")],
    vocab_size: Annotated[int, typer.Option(help="Pieces, including 4 control and 256 byte pieces.")],
    model_type: Annotated[str, typer.Option(help="bpe or unigram.")] = "bpe",
    split: Annotated[
        str, typer.Option(help="The split to train on; samples that name none belong to train.")
    ] = "train",
    casefold: Annotated[
        bool | None, typer.Option(help="Fold or keep case; folded by default, except with identity.")
    ] = None,
    normalization: Annotated[
        str,
        typer.Option(
            help="nfkc: merge compatible characters. nfc: merge only equivalent spellings. identity: none. "
            "nmt_nfkc: nfkc with control and zero-width characters as spaces, which breaks Persian and Indic words."
        ),
    ] = "nfkc",
    max_texts: Annotated[
        int, typer.Option(min=1, help="Of more distinct texts, as many are drawn by their hash: always the same.")
    ] = 5_000_000,
    character_coverage: Annotated[
        float,
        typer.Option(help="Share of the texts' characters that have a piece; the rarest are written in bytes."),
    ] = 0.9995,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
    dry_run: o.DryRun = False,
    as_json: o.Json = False,
) -> None:
    """Train a sentencepiece model on the texts of a split; the same texts give the same model."""
    from mmmoe_pretrain.data_prep import tokenizer as work

    options = work.TokenizerOptions(vocab_size, model_type, casefold, normalization, max_texts, character_coverage)
    with kept(f"{out} was not written; repeat the command"):
        work.run(paths, out, split, options, overwrite, dry_run, as_json)


@app.command(epilog="Example: mmmoe-data words data/shards --filter language=en --out data/words.npz")
def words(
    paths: Annotated[
        list[str], typer.Argument(callback=given, help="Shards, manifests, tables or folders, in any mix.")
    ],
    out: Annotated[Path, typer.Option(callback=given, help="The .npz file to write.")],
    dimension: Annotated[int, typer.Option(help="Numbers of a vector.")] = 64,
    window: Annotated[int, typer.Option(help="A word predicts others up to so many words away.")] = 5,
    negatives: Annotated[int, typer.Option(help="Words that are no neighbours, for each that is one.")] = 5,
    epochs: Annotated[int, typer.Option(help="Passes over the texts.")] = 10,
    min_count: Annotated[int, typer.Option(help="Words that come less often have no vector.")] = 2,
    sample: Annotated[
        float, typer.Option(help="Words of a larger share of all are left out at random; 0: none is.")
    ] = 1e-3,
    seed: Annotated[int, typer.Option(help="Of all random numbers.")] = 1,
    split: Annotated[
        str, typer.Option(help="The split to train on; samples that name none belong to train.")
    ] = "train",
    filter: o.Filter = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
    as_json: o.Json = False,
) -> None:
    """Train vectors of words by skip-gram on the texts of a split; the same texts give the same vectors."""
    from mmmoe_pretrain.data_prep import words as work

    options = work.WordOptions(dimension, window, negatives, epochs, min_count, sample, seed)
    with kept(f"{out} was not written; repeat the command"):
        work.run(paths, out, split, tuple(filter or ()), options, overwrite, as_json)


@app.command(epilog="Example: mmmoe-data codes data/shards --modality image --setting size=48 --out data/codes.npz")
def codes(
    paths: Annotated[
        list[str], typer.Argument(callback=given, help="Shards, manifests, tables or folders, in any mix.")
    ],
    modality: Annotated[str, typer.Option(help="The kind of the files to read: image or audio.")],
    out: Annotated[Path, typer.Option(callback=given, help="The .npz file to write.")],
    setting: Annotated[
        list[str] | None,
        typer.Option(help="KEY=VALUE of the kind's settings in a config, such as size=48 (may be repeated)."),
    ] = None,
    patch: Annotated[
        str, typer.Option(help="ROWSxCOLUMNS of a code: pixels, or bands x frames; one number for both.")
    ] = "",
    levels: Annotated[str, typer.Option(help="Values of each quantized channel; their product is the codes.")] = (
        "8,5,5,5"
    ),
    width: Annotated[int, typer.Option(help="Channels of the network.")] = 32,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 1000,
    batch: Annotated[int, typer.Option(help="Values of a step.")] = 32,
    rate: Annotated[float, typer.Option(help="Learning rate, which falls to 0.")] = 4e-3,
    max_values: Annotated[
        int, typer.Option(help="Of more distinct files, as many are taken by their hash: always the same.")
    ] = 20_000,
    seed: Annotated[int, typer.Option(help="Of all random numbers.")] = 1,
    split: Annotated[
        str, typer.Option(help="The split to train on; samples that name none belong to train.")
    ] = "train",
    held_out: Annotated[str, typer.Option(help="The split to measure on.")] = "test",
    filter: o.Filter = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
    as_json: o.Json = False,
) -> None:
    """Train a discrete tokenizer of images or audio (FSQ) on the files of a split, and measure it on another."""
    from mmmoe_pretrain.data_prep import codes as work

    options = work.CodesOptions(
        work.numbers_of("--levels", levels, ","), work.patch_of(patch, modality), width, steps, batch, rate,
        max_values, seed,
    )  # fmt: skip
    with kept(f"{out} was not written; repeat the command"):
        work.run(paths, out, modality, tuple(setting or ()), split, held_out, tuple(filter or ()), options, overwrite,
                 as_json)  # fmt: skip


@app.command(epilog="Example: mmmoe-data index data/shards/train s3://bucket/more --workers 8")
def index(
    specs: Annotated[
        list[str],
        typer.Argument(
            callback=given, help="Configs with key=value, or sources as in data.train: folders, tars, URLs."
        ),
    ],
    workers: Annotated[int, typer.Option(min=1, help="Processes that read the headers of local shards.")] = 2,
    lengths: Annotated[
        bool,
        typer.Option("--lengths", help="Of a config: also decode every sample of data.train once for its tokens."),
    ] = False,
    dry_run: o.DryRun = False,
    as_json: o.Json = False,
) -> None:
    """Index shards, so that training opens them at once; shards that are indexed are not read again."""
    from mmmoe_pretrain.data_prep import index as work

    with kept("indices that were finished are kept; repeat the command for the others"):
        work.run(specs, workers, lengths, dry_run, as_json)


@app.command(epilog="Example: mmmoe-data verify data/shards --decode")
def verify(
    folder: Annotated[
        str, typer.Argument(callback=given, help="Shards: a folder of splits, a split, a tar or a URL.")
    ],
    decode: Annotated[
        bool, typer.Option("--decode", help="Also decode every image, clip and text as training does.")
    ] = False,
    workers: Annotated[int, typer.Option(min=1, help="Processes that decode.")] = 2,
    as_json: o.Json = False,
) -> None:
    """Check hashes, indices and samples of shards; exits 1 where something is wrong."""
    from mmmoe_pretrain.data_prep import verify as work

    with kept("nothing was changed; repeat the command to verify all"):
        if not work.run(folder, workers if decode else 0, as_json):
            raise typer.Exit(console.PROBLEMS)


@app.command(epilog="Example: mmmoe-data inspect data/shards --html shards.html")
def inspect(
    path: Annotated[str, typer.Argument(callback=given, help="Shards, a manifest, a table or a folder of files.")],
    html: Annotated[Path | None, o.path("Write a page that shows and plays samples, in one file.")] = None,
    sheet: Annotated[Path | None, o.path("Write a PNG with thumbnails of samples.")] = None,
    samples: Annotated[int, typer.Option(min=1, max=1000, help="Samples that --html and --sheet show.")] = 60,
    seed: Annotated[int, typer.Option(help="Which samples: the same seed, the same ones.")] = 0,
    max_mb: Annotated[float, typer.Option(min=0.1, max=1000, help="Of --html, at most.")] = 20,
    as_json: o.Json = False,
) -> None:
    """Count rows, hours and bytes by split, subset, language and modality; show sizes, lengths and samples."""
    from mmmoe_pretrain.data_prep.inspect import command as work

    with kept("nothing was written; repeat the command"):
        work.run(path, work.Output(html, sheet, samples, seed, int(max_mb * 10**6), as_json))


@app.command(epilog="Example: mmmoe-data preview configs/demo.yaml train.steps=1000")
def preview(
    config: Annotated[Path, typer.Argument(callback=given, help="The run's YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, as for mmmoe train.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Samples that are read.")] = 512,
    data_parallel_size: Annotated[
        int | None,
        typer.Option(min=1, help="Ranks whose tokens are compared; default: the most up to 8 that divide a batch."),
    ] = None,
    as_json: o.Json = False,
) -> None:
    """Show what a run would read, without training: shares, epochs, tokens, padding, seconds of decoding."""
    from mmmoe_pretrain.data_prep import preview as work

    with kept("nothing was changed; repeat the command"):
        work.run(config, tuple(overrides or ()), samples, data_parallel_size, as_json)


@app.command(hidden=True, epilog="Example: mmmoe-data build-mini --work DIR")
def build_mini(
    work_dir: Annotated[Path, typer.Option("--work", callback=given, help="Folder for the downloads.")],
    out: Annotated[Path, typer.Option(callback=given, help="The folder of mini.tar in the source tree.")] = Path(
        "tests/assets/mini"
    ),
) -> None:
    """Rebuild the corpus that ships with the repository (maintainers; needs a network)."""
    from mmmoe_pretrain.data_prep.corpora import build_mini as work

    with kept(f"downloads are kept in {work_dir}; repeat the command"):
        work.run(work_dir, out)


def main() -> None:
    """Entry point of the console script."""
    console.run(app, "mmmoe-data")


if __name__ == "__main__":
    main()
