"""The methods of docs/methods.md. A study is a data set: its reference, and runs that differ from it by one method.

To add a method, write ``configs/methods/NAME.yaml`` and an entry of ``METHODS``. ``tests/methods`` trains every
config of that folder.
"""

from __future__ import annotations

from evidence.studies import OF_ALL, RECALL, STUDIES
from evidence.study import TEST, Method, Metric, Study, Variant, find

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
        name="stamps",
        title="Stamps, their names and their spoken names",
        question="Which methods match the images, names and recordings of the demo better?",
        config="configs/demo.yaml",
        corpus="demo",
        metrics=tuple(
            Metric(f"{TEST}{source}_to_{target}_r10", f"{source} → {target}, recall@10", False, percent=True)
            for source, target in (("image", "text"), ("text", "image"), ("speech", "text"), ("text", "speech"))
        ),
        reference="contrastive",
        variants=(
            Variant("contrastive", "InfoNCE and captions", same_as="demo/moe"),
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
            Metric(f"{TEST}scene_to_text_r10", "image and recording → text, recall@10", False, percent=True),
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
        panels=(),
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
        metrics=tuple(
            Metric(f"{TEST}{source}_to_text_r10", f"{label} → text, recall@10", False, percent=True)
            for source, label in (("scene", "image and recording"), ("image", "image"), ("speech", "speech"))
        ),
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
        metrics=tuple(
            Metric(f"{TEST}{source}_to_text_r10", f"{source} → text, recall@10", False, percent=True)
            for source in ("image", "speech")
        ),
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
