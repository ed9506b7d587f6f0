"""The studies of docs/methods.md on translation into images and speech, whose tokens are codes."""

from __future__ import annotations

from evidence.study import Method, Metric, Study, Variant


def _small(modality: str, file: str, codes: int) -> tuple[str, ...]:
    """Of the small corpus: its own tokenizers of codes (evidence/data.sh mini)."""
    settings = {"tokenizer": f"{{data}}/{file}", "codes": 12, "max_tokens": codes}
    return tuple(f"modalities.{modality}.{name}={value}" for name, value in settings.items())


TRANSLATION = (
    Study(
        name="drawing",
        title="Emoji drawn from their names",
        question="Does a name tell which codes the image of an emoji has that was never seen?",
        config="configs/methods/text_to_image.yaml",
        corpus="unseen",
        metrics=(Metric("drawing", "nats a token of the image"),),
        reference="no_text",
        variants=(
            Variant("no_text", "images alone", ("objectives.drawing.parts=[picture]",)),
            Method(
                "text_to_image",
                "text to image",
                item="translation",
                paper="DALL-E, arXiv 2102.12092; FSQ, arXiv 2309.15505",
                small=_small("picture", "image_codes.npz", 4),
            ),
        ),
        panels=("steps",),
        setting="An image of 48 pixels is 36 codes of 1,000 and an end mark, which is a token, too. An eighth of the "
        "emoji is held out in all twelve languages, as in the study of emoji that were never seen, and the tokenizer "
        "of codes has seen none of them. The reference is the same model without the name. 16 experts, one a token.",
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
            Variant("no_image", "recordings alone", ("objectives.speaking.parts=[speech]",)),
            Method(
                "image_to_speech",
                "image to speech",
                item="translation",
                paper="AudioLM, arXiv 2209.03143; FSQ, arXiv 2309.15505",
                small=_small("speech", "speech_codes.npz", 52),
            ),
        ),
        panels=("steps",),
        setting="80 ms of a recording are four codes of 1,000, for 16 of 64 mel bands each; at most two seconds are "
        "predicted. Held out are stamps with their recordings. The reference is the same model without the image. "
        "16 experts, one a token.",
    ),
)
