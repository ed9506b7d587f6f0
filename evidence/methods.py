"""The methods of docs/methods.md. A study is a data set: its reference, and runs that differ from it by one method.

To add a method, write ``configs/methods/NAME.yaml`` and an entry of ``METHODS``. ``tests/methods`` trains every
config of that folder.
"""

from __future__ import annotations

from evidence.studies import OF_ALL, RECALL, STUDIES
from evidence.study import Method, Study, Variant, find

ITEMS = {
    "alignment": "Self-supervision and alignment",
    "joint": "Joint embeddings",
    "fusion": "Fusion",
    "missing": "Missing modalities",
    "co_learning": "Zero-shot and co-learning",
    "imbalance": "Imbalance",
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
                small=("objectives.pairs.queue_size=16",),  # two steps: it forgets some
            ),
            Method(
                "masked",
                "masked modelling",
                item="alignment",
                paper="SimMIM, arXiv 2111.09886; BERT, arXiv 1810.04805",
            ),
            Method("masked_joint", "joint masked modelling", item="alignment", paper="M3AE, arXiv 2205.14204"),
            Method(
                "self_distillation",
                "self-distillation",
                item="alignment",
                paper="DINO, arXiv 2104.14294",
                also=("optimizer.average",),
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
        setting=f"The baseline has InfoNCE and 16 experts, one a token. {OF_ALL}",
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
)


def study(name: str) -> Study:
    """Of either page. Raises ValueError for an unknown one."""
    return find(name, (*STUDIES, *METHODS))
