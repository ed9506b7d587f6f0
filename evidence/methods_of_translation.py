"""The studies of docs/methods.md in which a model writes what it sees or hears."""

from __future__ import annotations

from evidence.studies import dense
from evidence.study import TEST, Method, Metric, Study, Variant

WIDTH = 512  # of an expert, as of the dense layer
WORDS = Metric(f"{TEST}captions_wer", "word error rate", percent=True)
LETTERS = Metric(f"{TEST}captions_cer", "character error rate", percent=True)
PERPLEXITY = Metric(f"{TEST}captions_perplexity", "perplexity")

TRANSLATION = (
    Study(
        name="recognition",
        title="The words of recordings, written token by token",
        question="How many words of a recording does a model get wrong, and how many would it without hearing it?",
        config="configs/methods/speech_to_text.yaml",
        corpus="demo",
        metrics=(WORDS, LETTERS, PERPLEXITY),
        reference="unheard",
        variants=(
            Variant("unheard", "names alone, without the recording", ("objectives.captions.parts=[text]",)),
            Variant("dense", "from recordings, dense", dense(WIDTH), experts=1),
            Method("speech_to_text", "from recordings, 8 experts", item="translation", paper="LAS, arXiv 1508.01211"),
        ),
        panels=(),
        setting="The demo's recordings of the names of stamps in eleven languages, of which the held-out ones are of "
        "other stamps. Texts are generated greedily. The reference has learned the names without the recordings: it "
        "writes the same text each time. Scores are of `mmmoe evaluate`; `report.md` in the folder of a run has the "
        "rates of each language.",
        evaluated=True,
    ),
    Study(
        name="captioning",
        title="The names of stamps, written token by token",
        question="How well does a model name a stamp that it has not seen, and how well without its image?",
        config="configs/methods/stamp_captions.yaml",
        corpus="demo",
        metrics=(PERPLEXITY, LETTERS, WORDS),
        reference="unseen",
        variants=(
            Variant("unseen", "names alone, without the image", ("objectives.captions.parts=[language,text]",)),
            Variant("dense", "from images, dense", dense(WIDTH), experts=1),
            Method(
                "stamp_captions",
                "from images, 8 experts",
                item="translation",
                paper="Show and Tell, arXiv 1411.4555",
            ),
        ),
        panels=(),
        setting="The names of the demo's stamps in many languages, of which the language is given. Held-out stamps "
        "show other things than those trained on. Texts are generated greedily, of 512 held-out names. Scores are of "
        "`mmmoe evaluate`.",
        evaluated=True,
    ),
)
