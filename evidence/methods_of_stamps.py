"""The studies of docs/methods.md on the data of the demo: stamps, their names in many languages, and recordings."""

from __future__ import annotations

from evidence.studies import NAMES_OF_STAMPS
from evidence.study import TEST, Method, Metric, Study, Variant, recall

RECORDINGS = {  # percent of them: shards
    1: "data/evidence/stamps/spoken-43/train",
    10: "data/evidence/stamps/spoken-430/train",
    100: "data/demo/tuxpaint-spoken/train",
}
GIVEN_IMAGE = f"{TEST}scene_given_image"
UNHEARD = (
    "modalities.audio.withheld_share=0.6",
    "evaluate.impute={scene: {observed: image, neighbours: 10}}",
)


def _imputed(way: str) -> tuple[tuple[str, str], ...]:
    """The scores of another way of imputation in place of those of an objective."""
    scores = ("to_text_r10", "cosine")
    return tuple((f"{GIVEN_IMAGE}_by_complete_{score}", f"{GIVEN_IMAGE}{way}_{score}") for score in scores)


WITHHELD = (0, 30, 60, 90)  # % of images and of recordings
# What is done about samples that lack them: by the beginning of a variant's name, its line and overrides of
# configs/methods/missing_bank.yaml.
REMEDIES = {
    "none": ("nothing", ("representations.scene.missing=allow",)),
    "dropout": (
        "dropout of 30% more, anew each time",
        (
            "representations.scene.missing=allow",
            "modalities.image.dropout_share=0.3",
            "modalities.audio.dropout_share=0.3",
        ),
    ),
    "bank": ("bank", ()),
}
BANK = "bank_60"  # the variant that the config of the method itself trains
BY_PARTS = tuple(
    recall(f"scene[{parts}]", "text", title)
    for parts, title in (("audio", "recording"), ("image", "image"), ("image,audio", "both"))
)


def _remedy(remedy: str, share: int) -> Variant:
    line, overrides = REMEDIES[remedy]
    label, x = f"{share}% withheld: {line}", float(share)
    if f"{remedy}_{share}" == BANK:
        paper = "Flex-MoE, arXiv 2410.08245"
        return Method("missing_bank", label, line=line, x=x, item="missing", paper=paper)
    withheld = tuple(f"modalities.{name}.withheld_share={share / 100}" for name in ("image", "audio"))
    return Variant(f"{remedy}_{share}", label, (*overrides, *withheld), line=line, x=x)


STAMPS = (
    Study(
        name="stamps",
        title="Stamps, their names and their spoken names",
        question="Which methods match the images, names and recordings of the demo better?",
        config="configs/demo.yaml",
        corpus="demo",
        metrics=NAMES_OF_STAMPS,
        reference="contrastive",
        variants=(
            Variant("contrastive", "InfoNCE and captions", same_as="demo/moe"),
            Method(
                "instance_discrimination",
                "instance discrimination",
                item="alignment",
                paper="AVID, arXiv 2004.12943",
                small=("objectives.pairs.queue_size=16", "objectives.pairs.queue_start=1"),
            ),
            Method(
                "deep_gcca",
                "deep generalised CCA",
                item="joint",
                paper="arXiv 1702.02519",
                small=("model.embedding_size=3",),
            ),
        ),
        panels=(),
        setting="The reference is the demo's run: InfoNCE of pairs, and captions. Scores are of `mmmoe evaluate`.",
        evaluated=True,
    ),
    Study(
        name="fusion",
        title="Stamps that are seen and heard",
        question="Which fusion of an image and a recording finds the stamp's name better?",
        config="configs/methods/fusion_early.yaml",
        corpus="demo",
        metrics=(
            recall("scene", "text", "image and recording"),
            Metric(f"{TEST}text_to_scene_r10", "text → image and recording, recall@10", False, percent=True),
        ),
        reference="fusion_early",
        variants=(
            Method("fusion_early", "early: one segment", item="fusion", paper="-"),
            *(
                Method(f"fusion_{kind}", label, item="fusion", paper=paper)
                for kind, label, paper in (
                    ("late", "late: weighted sum", "-"),
                    ("gated", "gated unit", "GMU, arXiv 1702.01992"),
                    ("tensor", "tensor product", "TFN, arXiv 1707.07250"),
                    ("low_rank", "low-rank tensor product", "LMF, arXiv 1806.00064"),
                    ("latents", "latents", "Perceiver, arXiv 2103.03206"),
                    ("mult", "directional cross-attention", "MulT, arXiv 1906.00295"),
                    ("bottleneck", "bottleneck vectors", "MBT, arXiv 2107.00135"),
                    ("graph", "graph", "GCN, arXiv 1609.02907; GAT, arXiv 1710.10903"),
                )
            ),
        ),
        panels=("final",),
        setting="A vector of the image and the recording is compared with the name; both alone are, too, at half the "
        "weight. Scores are of `mmmoe evaluate`.",
        evaluated=True,
    ),
    Study(
        name="modulation",
        title="Stamps that are seen and heard, late fusion",
        question="Does it help to hold back the modality that is ahead?",
        config="configs/methods/fusion_late.yaml",
        corpus="demo",
        metrics=(recall("scene", "text", "image and recording"), recall("image", "text"), recall("speech", "text")),
        reference="fusion_late",
        variants=(
            Variant("fusion_late", "late: weighted sum", same_as="fusion/fusion_late"),
            Method("ogm_ge", "modulated gradients", item="imbalance", paper="OGM-GE, arXiv 2203.15332"),
        ),
        panels=(),
        setting="The reference is the run with late fusion of the study above. Scores are of `mmmoe evaluate`.",
        evaluated=True,
    ),
    Study(
        name="unheard",
        title="Stamps that are seen, and heard in training alone",
        question="Which vector finds the name of a stamp whose recording is missing?",
        config="configs/methods/fusion_late.yaml",
        corpus="demo",
        metrics=(
            Metric(f"{GIVEN_IMAGE}_by_complete_to_text_r10", "image → text, recall@10", False, percent=True),
            Metric(f"{GIVEN_IMAGE}_by_complete_cosine", "cosine with the vector of both", False),
            Metric(
                f"{GIVEN_IMAGE}_present_to_text_r10",
                "image and recording → text, recall@10",
                False,
                percent=True,
                compared=False,
            ),
        ),
        reference="part_missing",
        variants=(
            Variant("part_missing", "fusion of the image alone", UNHEARD, scores=_imputed("")),
            Variant(
                "neighbours",
                "mean of ten neighbours",
                UNHEARD,
                same_as="unheard/part_missing",
                scores=_imputed("_neighbours"),
            ),
            Method("completion", "completion by regression", item="missing", paper="-"),
            Method("completion_mixture", "completion by a mixture density", item="missing", paper="Bishop 1994"),
            Method(
                "hallucination",
                "hallucination from a paired teacher",
                item="missing",
                paper="Hoffman et al., CVPR 2016",
                also=("optimizer.average",),
            ),
        ),
        panels=(),
        setting="Late fusion of the image and the recording is compared with the name, and both alone at half the "
        "weight; 60% of the training samples have no recording. Held-out samples have one, and here it is missing: "
        "the vector of the image and the recording is that of the image alone, or the mean of ten training samples "
        "with near images, or is predicted from the image. Candidates are the names in one language; scores are "
        "means over languages. The last column is with the recording. Scores are of `mmmoe evaluate`.",
        evaluated=True,
    ),
    Study(
        name="missing",
        title="Stamps of which the image or the recording is missing",
        question="How much does training without some images and recordings cost, and what helps a model that has to "
        "do without one of them?",
        config="configs/methods/missing_bank.yaml",
        corpus="demo",
        metrics=BY_PARTS,
        reference="none_60",
        variants=tuple(_remedy(remedy, share) for share in WITHHELD for remedy in REMEDIES),
        panels=("sweep", "sweep of the second metric", "sweep of the third metric"),
        setting="Late fusion of the image and the recording. In training the same share of images and of recordings "
        "is withheld for good, chosen apart; a stamp that loses both has only its name. Scores are of `mmmoe "
        "evaluate` on held-out stamps that have both, of which one or none is withheld (`evaluate.subsets`). "
        "Nothing: the weight of an absent part goes to the other. Bank: a learned vector of the combination stands "
        "in for it; where nothing is withheld in training, it is not trained.",
        axis="images and recordings withheld, %",
        evaluated=True,
    ),
    Study(
        name="combinations",
        title="Stamps in one segment, of which parts are missing",
        question="Do experts of their own help stamps that lack the image or the recording?",
        config="configs/methods/combination_routing.yaml",
        corpus="demo",
        metrics=BY_PARTS,
        reference="balanced",
        variants=(
            Variant("balanced", "balance loss alone", ("moe.losses.combination=0",)),
            Method(
                "combination_routing",
                "an expert for each combination",
                item="missing",
                paper="Flex-MoE, arXiv 2410.08245",
            ),
        ),
        panels=(),
        setting="Early fusion, so tokens can tell which parts there are. In training 60% of the images and 60% of "
        "the recordings are withheld for good. Scores are of `mmmoe evaluate` on held-out stamps that have both, of "
        "which one or none is withheld (`evaluate.subsets`).",
        evaluated=True,
    ),
    Study(
        name="unpaired",
        title="Stamps and recordings that meet in their names alone",
        question="Are an image and a recording alike if each was compared with names alone? Does a recording find "
        "its class if class names were trained with images alone?",
        config="configs/methods/unpaired.yaml",
        corpus="demo",
        metrics=(
            recall("image", "speech"),
            recall("speech", "image"),
            Metric(f"{TEST}speech_to_text_zero_shot", "speech, zero-shot class", False, percent=True),
        ),
        reference="paired",
        variants=(
            Variant(
                "paired",
                "compared with each other, too",
                (
                    "objectives.pairs.pairs={image-text: 1.0, audio-text: 1.0, image-audio: 1.0}",
                    "evaluate.pairs=[]",
                    "modalities.text.label_with=[]",
                ),
            ),
            Method(
                "unpaired",
                "compared with names alone",
                item="co_learning",
                paper="ImageBind, arXiv 2305.05665",
                also=("evaluate.pairs",),
            ),
        ),
        panels=(),
        setting="In the reference images are compared with recordings, too, and class names with both. Scores are of "
        "`mmmoe evaluate`; `report.md` in the folder of a run has the chance of each.",
        evaluated=True,
    ),
    Study(
        name="co_learning",
        title="Few recordings, many images",
        question="Do images and their names help a model to understand speech, of which there is little?",
        config="configs/methods/co_learning.yaml",
        corpus="stamps",
        metrics=(
            recall("speech", "text"),
            recall("text", "speech"),
        ),
        reference="alone-10",
        variants=(
            *(
                Variant(
                    f"alone-{share}",
                    f"{share}% of the recordings alone",
                    (f"data.train=[{{path: {shards}}}]", "objectives.pairs.pairs={audio-text: 1.0}"),
                    line="recordings alone",
                    x=share,
                )
                for share, shards in RECORDINGS.items()
            ),
            Method(
                "co_learning",
                "10% of the recordings, with images",
                item="co_learning",
                paper="survey: arXiv 1705.09406",
                also=("data.train",),
                line="with images",
                x=10,
            ),
            *(
                Variant(
                    f"together-{share}",
                    f"{share}% of the recordings, with images",
                    (f"data.train=[{{path: {RECORDINGS[share]}}}, {{path: data/evidence/stamps/named/train}}]",),
                    line="with images",
                    x=share,
                )
                for share in (1, 100)
            ),
        ),
        panels=("sweep",),
        axis="recordings, % of 4,297",
        setting="The 4,297 recordings, 430 or 43 of them are trained on, alone or with 5,484 images and their names "
        "in many languages. Every run has the same steps of 64 samples; with images half of them are of images. "
        "Scores are of `mmmoe evaluate`, of recordings of other stamps.",
        evaluated=True,
    ),
    Study(
        name="languages",
        title="The words of speech in eleven languages",
        question="Of two languages there are few recordings. How to give them more weight?",
        config="configs/methods/sampling_temperature.yaml",
        corpus="demo",
        metrics=(
            Metric(f"{TEST}captions_perplexity_balanced", "perplexity, each language the same"),
            Metric(f"{TEST}captions_perplexity/nl", "perplexity, Dutch"),
            Metric(f"{TEST}captions_perplexity", "perplexity of all tokens"),
        ),
        reference="by_tokens",
        variants=(
            Variant("by_tokens", "by tokens", ("data.train=[{path: data/demo/tuxpaint-spoken/train}]",)),
            Method("balanced_tokens", "balanced token loss", item="imbalance", paper="-"),
            Method(
                "sampling_temperature",
                "sampling temperature",
                item="imbalance",
                paper="arXiv 1907.05019",
                also=("data.train",),
                small=("data.train=[{path: {data}/shards/train, split_by: modalities, temperature: 3}]",),
            ),
        ),
        panels=(),
        setting="The names of the demo's stamps are predicted from their recordings. Of 4,297 recordings 534 are "
        "French, 49 Dutch and 47 English. Scores are of `mmmoe evaluate`, of languages with 10 recordings or more.",
        evaluated=True,
    ),
    Study(
        name="budgets",
        title="Stamps, their names and their spoken names, with experts by modality",
        question="How many of 12 experts should images, speech and texts have?",
        config="configs/methods/expert_budgets.yaml",
        corpus="demo",
        metrics=(recall("image", "text"), recall("speech", "text")),
        reference="even",
        variants=(
            Variant(
                "even",
                "4 experts each",
                tuple(f"moe.expert_groups.{number}.num_experts=4" for number in range(3)),
            ),
            Method("expert_budgets", "expert budgets by tokens", item="imbalance", paper="MoMa, arXiv 2407.21770"),
        ),
        panels=(),
        setting="A token visits one of the experts of its modality. Scores are of `mmmoe evaluate`.",
        evaluated=True,
    ),
)
