"""``mmmoe-data``: the commands and their options. The work of each is in the file of its name.

Heavy modules are imported inside the commands, so that ``--help`` answers at once.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

from mmmoe_pretrain.paths import given

app = typer.Typer(
    name="mmmoe-data",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Corpora, shards and tokenizers for MMMoE.",
)


@app.command()
def corpus(
    name: Annotated[str, typer.Argument(help="tuxpaint, emoji, asterisk, gcide or mini.")],
    out: Annotated[Path, typer.Option(callback=given, help="Folder for the files and manifest.jsonl.")],
    language: Annotated[
        list[str] | None,
        typer.Option(help="Only these languages (may be repeated); of tuxpaint, those of the translated subset."),
    ] = None,
) -> None:
    """Fetch a real corpus and write its manifest.

    Splits hold within one manifest: mini has recordings of asterisk and images of emoji in splits of
    its own, so a model trained on those must not be tested on mini, or the reverse.
    """
    from data_prep import corpus as work

    work.run(name, out, tuple(language or ()))


@app.command()
def shard(
    manifest: Annotated[Path, typer.Argument(callback=given, help="manifest.jsonl, or the folder that holds it.")],
    out: Annotated[Path, typer.Option(callback=given, help="Folder for the shards, with one folder per split.")],
    samples_per_shard: Annotated[int, typer.Option(min=1, help="Samples per shard.")] = 1000,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Shrink the longest side to this many pixels, on white, as PNG.")
    ] = None,
    audio_rate: Annotated[
        int | None, typer.Option(min=1000, max=192_000, help="Resample to mono FLAC at this rate in Hz.")
    ] = None,
    filter: Annotated[
        list[str] | None,
        typer.Option(help="Only rows with field=value (may be repeated; values of one field are alternatives)."),
    ] = None,
    workers: Annotated[int, typer.Option(help="Processes that decode and encode.")] = 2,
    max_bad_fraction: Annotated[
        float, typer.Option(min=0, max=1, help="Fail if more than this share of the samples is broken.")
    ] = 0.01,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the shards in a folder.")] = False,
) -> None:
    """Write a manifest's samples as shards with indices; an interrupted run resumes when it is repeated."""
    from data_prep import shard as work

    options = work.ShardOptions(samples_per_shard, image_size, audio_rate, workers, max_bad_fraction, overwrite)
    work.run(manifest, out, tuple(filter or ()), options)


@app.command()
def tokenizer(
    manifests: Annotated[list[Path], typer.Argument(callback=given, help="One or more manifests.")],
    out: Annotated[Path, typer.Option(callback=given, help="The .model file to write.")],
    vocab_size: Annotated[int, typer.Option(help="Pieces, including 4 control and 256 byte pieces.")],
    model_type: Annotated[str, typer.Option(help="bpe or unigram.")] = "bpe",
    split: Annotated[str, typer.Option(help="The split to train on.")] = "train",
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
) -> None:
    """Train a sentencepiece model on the texts of a split."""
    from data_prep import tokenizer as work

    work.run(manifests, out, vocab_size, model_type, split, casefold, normalization)


@app.command()
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
) -> None:
    """Index shards, so that training opens them at once; shards that are indexed are not read again."""
    from data_prep import index as work

    work.run(specs, workers, lengths)


@app.command()
def verify(
    folder: Annotated[
        str, typer.Argument(callback=given, help="Shards: a folder of splits, a split, a tar or a URL.")
    ],
) -> None:
    """Check hashes, indices and samples of shards; exits 1 where something is wrong."""
    from data_prep import verify as work

    if not work.run(folder):
        raise typer.Exit(1)


@app.command()
def inspect(path: Annotated[str, typer.Argument(callback=given, help="Shards or a manifest.")]) -> None:
    """Count rows, hours and bytes by split, subset, language and modality."""
    from data_prep import inspect as work

    work.run(path)


@app.command()
def preview(
    config: Annotated[Path, typer.Argument(callback=given, help="The run's YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, as for mmmoe train.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Samples that are read.")] = 512,
    data_parallel_size: Annotated[
        int | None,
        typer.Option(min=1, help="Ranks whose tokens are compared; default: the most up to 8 that divide a batch."),
    ] = None,
) -> None:
    """Show what a run would read, without training: shares, epochs, tokens, padding, seconds of decoding."""
    from data_prep import preview as work

    work.run(config, tuple(overrides or ()), samples, data_parallel_size)


@app.command(hidden=True)
def build_mini(
    work_dir: Annotated[Path, typer.Option("--work", callback=given, help="Folder for the downloads.")],
    out: Annotated[Path, typer.Option(callback=given, help="The folder of mini.tar in the source tree.")] = Path(
        "tests/assets/mini"
    ),
) -> None:
    """Rebuild the corpus that ships with the repository (maintainers; needs a network)."""
    from data_prep import build_mini as work

    work.run(work_dir, out)


class _Stderr:
    """What stderr is now: while a bar of progress is shown, it prints above the bar."""

    def write(self, text: str) -> int:
        return sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()


def main() -> None:
    """Entry point: an error that a user can fix prints one line on stderr and exits with code 2."""
    logging.basicConfig(level=logging.WARNING, stream=_Stderr(), format="%(levelname)s %(message)s")
    try:
        app()
    except (ValueError, OSError) as error:
        print(f"mmmoe-data: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
