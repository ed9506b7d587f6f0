"""The studies of docs/methods.md in which a model writes what it sees or hears, or draws and says it in codes."""

from __future__ import annotations

from evidence.studies import dense
from evidence.study import TEST, Method, Metric, Study, Variant

WIDTH = 512  # of an expert, as of the dense layer
WORDS = Metric(f"{TEST}captions_wer", "word error rate", percent=True)
LETTERS = Metric(f"{TEST}captions_cer", "character error rate", percent=True)
PERPLEXITY = Metric(f"{TEST}captions_perplexity", "perplexity")


def _small(modality: str, file: str, codes: int) -> tuple[str, ...]:
    """Of the small corpus: its own tokenizers of codes (evidence/data.sh mini)."""
    settings = {"tokenizer": f"{{data}}/{file}", "codes": 12, "max_tokens": codes}
    return tuple(f"modalities.{modality}.{name}={value}" for name, value in settings.items())


PICTURE, SPEECH = _small("picture", "image_codes.npz", 4), _small("speech", "speech_codes.npz", 52)
NATS = Metric("drawing", "nats a token of the image")
ALONE = ("objectives.drawing.parts=[picture]",)
SEEN = (  # names in languages that an emoji was not trained with, where its image was
    "data.train=[{path: data/evidence/europe/shards/train}]",
    "evaluate.validation=[data/evidence/europe/shards/test]",
    "modalities.picture.tokenizer=data/evidence/europe/codes.npz",
)

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
    Study(
        name="drawing",
        title="Emoji drawn from their names",
        question="Does a name tell which codes the image of an emoji has that was never seen?",
        config="configs/methods/text_to_image.yaml",
        corpus="unseen",
        metrics=(NATS,),
        reference="no_text",
        variants=(
            Variant("no_text", "images alone", ALONE, small=PICTURE),
            Method(
                "text_to_image",
                "text to image",
                item="translation",
                paper="DALL-E, arXiv 2102.12092; FSQ, arXiv 2309.15505",
                small=PICTURE,
            ),
        ),
        panels=("steps",),
        setting="An image of 48 pixels is 36 codes of 1,000 and an end mark, which is a token, too. An eighth of the "
        "emoji is held out in all twelve languages, as in the study of emoji that were never seen, and the tokenizer "
        "of codes has seen none of them. The reference is the same model without the name. 16 experts, one a token.",
    ),
    Study(
        name="drawing_again",
        title="Emoji drawn from names in other languages",
        question="Does a name in another language tell which codes the image of an emoji has that was seen?",
        config="configs/methods/text_to_image.yaml",
        corpus="europe",
        metrics=(NATS,),
        reference="no_text",
        variants=(
            Variant("no_text", "images alone", (*SEEN, *ALONE), small=PICTURE),
            Variant("text", "text to image", SEEN, small=PICTURE),
        ),
        panels=("steps",),
        setting="As above, with all emoji in training, each with its names in some of twelve languages. The names "
        "that are held out are in the others. What is measured is whether a name finds its image, "
        "not drawing what is new.",
    ),
    Study(
        name="speaking",
        title="Stamps that say their names",
        question="Does an image tell which codes the recording of its name has?",
        config="configs/methods/image_to_speech.yaml",
        corpus="demo",
        metrics=(Metric("speaking", "nats a token of the recording"),),
        reference="no_image",
        variants=(
            Variant("no_image", "recordings alone", ("objectives.speaking.parts=[speech]",), small=SPEECH),
            Method(
                "image_to_speech",
                "image to speech",
                item="translation",
                paper="AudioLM, arXiv 2209.03143; FSQ, arXiv 2309.15505",
                small=SPEECH,
            ),
        ),
        panels=("steps",),
        setting="80 ms of a recording are four codes of 1,000, for 16 of 64 mel bands each; at most two seconds are "
        "predicted. Held out are stamps with their recordings. The reference is the same model without the image. "
        "16 experts, one a token.",
    ),
)
