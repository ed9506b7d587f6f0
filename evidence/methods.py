"""The methods of docs/methods.md. A study is a data set: its reference, and runs that differ from it by one method.

To add a method, write ``configs/methods/NAME.yaml`` and an entry of ``METHODS``, or for the demo's data of ``STAMPS``
(methods_of_stamps.py) or ``TRANSLATION`` (methods_of_translation.py). ``tests/methods`` trains every config of that
folder.
"""

from __future__ import annotations

from evidence.methods_of_stamps import STAMPS
from evidence.methods_of_translation import TRANSLATION
from evidence.studies import OF_ALL, RECALL, STUDIES, WIDTH, dense
from evidence.study import Method, Metric, Study, Variant, find

ITEMS = {
    "alignment": "Self-supervision and alignment",
    "joint": "Joint embeddings",
    "fusion": "Fusion",
    "missing": "Missing modalities",
    "co_learning": "Zero-shot and co-learning",
    "imbalance": "Imbalance",
    "translation": "Translation",
}
SHARED = ("data", "evaluate", "optimizer", "parallel", "seed", "train")  # sections of a config as of its reference
METHODS = (
    Study(
        name="europe",
        title="Emoji and their names",
        question="Which methods match emoji with their names better?",
        config="evidence/configs/retrieval.yaml",
        corpus="europe",
        metrics=(RECALL,),
        reference="baseline",
        variants=(
            Variant("baseline", "baseline", same_as="retrieval/e16"),
            Method("sigmoid_contrastive", "sigmoid loss", item="alignment", paper="SigLIP, arXiv 2303.15343"),
            Method(
                "memory_queue",
                "memory queue",
                item="alignment",
                paper="XBM, arXiv 1912.06798",
                small=("objectives.pairs.queue_size=16", "objectives.pairs.queue_start=1"),  # it forgets some
            ),
            Method(
                "momentum_queue",
                "memory queue of a momentum encoder",
                item="alignment",
                paper="MoCo, arXiv 1911.05722",
                also=("optimizer.average",),
                small=("objectives.pairs.queue_size=16",),
            ),
            Method(
                "masked",
                "masked modelling",
                item="alignment",
                paper="SimMIM, arXiv 2111.09886; BERT, arXiv 1810.04805",
            ),
            Method(
                "masked_autoencoder",
                "masked autoencoder",
                item="alignment",
                paper="MAE, arXiv 2111.06377; CrossMAE, arXiv 2401.14391",
            ),
            Method("masked_joint", "joint masked modelling", item="alignment", paper="M3AE, arXiv 2205.14204"),
            Method(
                "pretext_invariant", "pretext-invariant learning", item="alignment", paper="PIRL, arXiv 1912.01991"
            ),
            Method(
                "self_distillation",
                "self-distillation",
                item="alignment",
                paper="DINO, arXiv 2104.14294",
                also=("optimizer.average",),
            ),
            Method(
                "deep_cca",
                "deep CCA",
                item="joint",
                paper="Andrew et al., ICML 2013",
                small=("model.embedding_size=3",),  # fewer than the pairs of a step
            ),
            Method(
                "semantic_anchors",
                "semantic anchors",
                item="co_learning",
                paper="DeViSE, NIPS 2013",
                small=("objectives.anchors.vectors={data}/words.npz", "objectives.anchors.size=8"),
            ),
        ),
        panels=(),
        setting=f"The baseline has InfoNCE and 16 experts, one a token. {OF_ALL} The 8 dimensions of deep CCA were "
        "chosen in trials with 8, 16 and 32 (one seed, not recorded, two ridges with 32) on the same held-out pairs, "
        "so its score may be a little too high.",
    ),
    Study(
        name="domains",
        title="Emoji of a style that has no names",
        question="Are emoji of one style found by names that were trained with another style?",
        config="configs/methods/moment_alignment.yaml",
        corpus="domains",
        metrics=(
            Metric("text_to_image_r1", "name → image, recall@1", False, percent=True),
            Metric("image_to_text_r1", "image → name, recall@1", False, percent=True),
        ),
        reference="baseline",
        variants=(
            Variant("baseline", "baseline", ("objectives.domains.weight=0",)),
            Method("moment_alignment", "moment alignment", item="missing", paper="Deep CORAL, arXiv 1607.01719"),
            Method("domain_adversarial", "domain-adversarial", item="missing", paper="DANN, arXiv 1505.07818"),
        ),
        panels=(),
        setting="Three quarters of a batch are emoji of Noto with their names, and a quarter are images of Fluent "
        "alone. Scores are of held-out names with images of Fluent. The baseline has InfoNCE and 16 experts, one a "
        "token; it makes nothing of the images without names.",
    ),
    Study(
        name="unseen",
        title="Emoji that were never seen",
        question="Are emoji found by their names that no training sample had, in any language?",
        config="configs/methods/unseen_anchors.yaml",
        corpus="unseen",
        metrics=(
            Metric("text_to_image_r10", "name → image, recall@10", False, percent=True),
            Metric("image_to_text_r10", "image → name, recall@10", False, percent=True),
        ),
        reference="baseline",
        variants=(
            Variant("baseline", "baseline", ("objectives.anchors.weight=0",)),
            Variant("dense", "dense", ("objectives.anchors.weight=0", *dense(WIDTH)), experts=1),
            Method(
                "unseen_anchors",
                "semantic anchors",
                item="co_learning",
                paper="DeViSE, NIPS 2013",
                small=("objectives.anchors.vectors={data}/words.npz", "objectives.anchors.size=8"),
            ),
        ),
        panels=(),
        setting="An eighth of the emoji, those whose code ends in 3 or 7, is held out in all twelve languages: 2,760 "
        "names of 230 emoji. A name has to find its image among those of all 230, and an image one of its names. The "
        "baseline has InfoNCE and 16 experts, one a token. The vectors of words are of the names of all emoji, as "
        "vectors of a text corpus would be; no image of a held-out one is trained on.",
    ),
    Study(
        name="weighting",
        title="Emoji and their names, with masked modelling",
        question="Which weights of several losses match emoji with their names better?",
        config="configs/methods/uncertainty_weighting.yaml",
        corpus="europe",
        metrics=(RECALL,),
        reference="fixed",
        variants=(
            Variant("fixed", "fixed weights", ("train.loss_weighting=fixed",)),
            Method(
                "uncertainty_weighting",
                "uncertainty weighting",
                item="imbalance",
                paper="arXiv 1705.07115",
                also=("train.loss_weighting",),
            ),
        ),
        panels=(),
        setting="Fixed weights are 1 each for InfoNCE, masked modelling of images and masked modelling of names. "
        f"16 experts, one a token. {OF_ALL}",
    ),
    *STAMPS,
    *TRANSLATION,
)


def study(name: str) -> Study:
    """Of either page. Raises ValueError for an unknown one."""
    return find(name, (*STUDIES, *METHODS))
