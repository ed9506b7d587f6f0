"""The studies of docs/methods.md on translation into images and speech, whose tokens are codes."""

from __future__ import annotations

from evidence.study import Method, Metric, Study, Variant


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
