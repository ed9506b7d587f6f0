"""The studies of docs/evidence.md: sparse models beside dense ones, and ways to route, capacity and losses."""

from __future__ import annotations

import dataclasses

from evidence.study import TEST, TOWERS, Metric, Start, Study, Variant, recall


def dense(width: int) -> tuple[str, ...]:
    """Overrides that make every MoE layer one expert of ``width``."""
    return ("moe.num_experts=1", "moe.experts_per_token=1", f"moe.expert_hidden_size={width}")


def experts(*numbers: int) -> tuple[Variant, ...]:
    return tuple(
        Variant(f"e{number}", f"{number} experts", (f"moe.num_experts={number}",), experts=number)
        for number in numbers
    )


def of_width(hidden: int) -> tuple[str, ...]:
    """Overrides of captions.yaml: a head has 32 numbers, an expert twice the model's width."""
    sizes = {"model.hidden_size": hidden, "model.num_heads": hidden // 32, "model.ffn_hidden_size": 2 * hidden,
             "moe.expert_hidden_size": 2 * hidden}  # fmt: skip
    return tuple(f"{key}={value}" for key, value in sizes.items())


def losses(values: str) -> str:
    """The override that sets these auxiliary losses and no others."""
    return f"moe.losses={{{values}}}"


def entropies(*, local: bool = True, whole: bool = True, modalities: str = "image, text") -> str:
    """LIMoE's losses: ``local``, a confident choice for each token; ``whole``, many experts for each modality."""
    terms = [f"entropy_modalities: [{modalities}]"]
    terms += ["local_entropy: 0.02"] if local else []
    terms += ["global_entropy: 0.02", "min_experts: {image: 8, text: 8}"] if whole else []
    return losses(", ".join(terms))


CAPTIONS = Metric("captions_perplexity", "perplexity of names")
PROSE = Metric("prose_perplexity", "perplexity")
RECALL = Metric("text_to_image_r1", "recall@1 of the image", lower_is_better=False, percent=True)
LOSS = Metric("pairs/image-text", "loss", compared=False)
NAMES_OF_STAMPS = (
    recall("image", "text"),
    recall("text", "image"),
    recall("speech", "text"),
    recall("text", "speech"),
)
SPECIALISATION = Metric("routing/specialisation", "specialisation", percent=True, compared=False)
EXPERTS_USED = Metric("routing/experts_used", "experts of the modality that uses fewest", compared=False)
DEAD = Metric("routing/dead", "dead experts", percent=True, compared=False)
LARGEST_LOAD = Metric("routing/largest_load", "largest load over the mean", compared=False)
DROPPED_IMAGE = Metric("routing/dropped/image", "image tokens dropped", percent=True, compared=False)
DROPPED_TEXT = Metric("routing/dropped/text", "text tokens dropped", percent=True, compared=False)
SHORT = ("train.steps=400", "evaluate.every=200", "evaluate.validation=[data/evidence/emoji/shards/val]")
SWEEP = "400 steps, one seed, scored on the validation split, so that the test split has no part in the choice."
NARROW, WIDTH = 128, 256  # of an expert and of the dense layer of equal active FLOPs: captions and prose; retrieval
DENSE = Variant("dense", "dense", dense(WIDTH), experts=1)
OF_ALL = (
    "A name has to find its image among the 1,657 different ones of the 4,548 held-out pairs, whose emoji were seen "
    "with names in other languages. Batches have 128 pairs; for 6% of them, in all variants alike, another name of "
    "the same emoji is among the negatives."
)
RECIPE = losses(
    "importance: 0.01, load: 0.01, local_entropy: 0.01, local_entropy_modalities: [text], global_entropy: 0.01, "
    "min_experts: {image: 8, text: 8}"
)
AT_THE_END = (
    "Loads are those of the last batch of training; the *largest* is that of any layer. *Specialisation*: how "
    "much of a token's modality its expert tells, as a share of the bits: 0% where every modality visits all "
    "experts alike, 100% where none shares an expert with another. *Experts of the modality that uses fewest*: "
    "the exponential of the entropy of its load, mean of the layers. A *dead* expert has less than 1% of an even "
    "share in every modality."
)


def scaling(long_steps: int) -> tuple[Variant, ...]:
    """``long_steps``: those that a dense model takes in the core-hours of 16 experts, by the time of a step of each;
    the page shows the core-hours of both."""
    return (
        Variant("dense", "dense", dense(NARROW), experts=1),
        *experts(4, 16, 64),
        Variant("long", "dense, as many core-hours as 16 experts", (*dense(NARROW), f"train.steps={long_steps}")),
        Variant("wide", "dense, as many parameters as 16 experts", dense(16 * NARROW)),
    )


STUDIES = (
    Study(
        name="captions",
        title="Emoji named in 91 languages",
        question="Does a sparse model name images in many languages better than a dense one of equal active FLOPs?",
        config="evidence/configs/captions.yaml",
        setting="A name in one language is held out; the emoji was seen with its names in others. The learning rate "
        "is that of the dictionary's study and was not tuned here. The router of 64 experts adds 6% to the FLOPs.",
        corpus="emoji",
        metrics=(CAPTIONS,),
        reference="dense",
        variants=scaling(4020),
        panels=("steps", "flops", "hours", "experts"),
    ),
    Study(
        name="prose",
        title="The entries of a dictionary",
        question="Does a sparse language model predict prose better than a dense one of equal active FLOPs?",
        config="evidence/configs/prose.yaml",
        setting="The vocabulary has 512 pieces, so that the trunk is most of the model. Of the learning rates 0.008, "
        "0.016 and 0.024 the second gave the dense model its lowest perplexity, on the same held-out entries, in "
        "trials of one seed that were not recorded. All variants have it. The router of 64 experts adds 7% to the "
        "FLOPs.",
        corpus="gcide",
        metrics=(PROSE,),
        reference="dense",
        variants=(
            *scaling(1420),
            Variant("hash", "16 experts, hash of the piece", ("moe.num_experts=16", "moe.router=hash", losses(""))),
        ),
        panels=("steps", "flops", "hours", "experts"),
    ),
    Study(
        name="retrieval",
        title="Emoji found by their names",
        question="Does a sparse model match emoji with their names in twelve languages of Europe better than a dense "
        "one of equal active FLOPs?",
        config="evidence/configs/retrieval.yaml",
        corpus="europe",
        metrics=(RECALL, LOSS),
        reference="dense",
        variants=(DENSE, *experts(16, 64)),
        panels=("steps", "flops", "hours", "experts"),
        setting=f"{OF_ALL} In trials of the dense model (one seed, on the validation split, not recorded), "
        "the learning rates 0.0005 and 0.001 were about equal, and 0.002, 0.004 and 0.008 worse. The router of 64 "
        "experts adds 5% to the FLOPs.",
    ),
    Study(
        name="limoe",
        title="One sparse trunk for images and texts, and its auxiliary losses",
        question="LIMoE (arXiv 2206.02770) reports that without auxiliary losses of entropy the experts of one "
        "modality collapse, and that one sparse trunk is better than two dense towers. Does it hold here?",
        config="evidence/configs/retrieval.yaml",
        corpus="europe",
        metrics=(RECALL, LOSS, SPECIALISATION, EXPERTS_USED, DEAD, LARGEST_LOAD),
        reference="classic",
        variants=(
            Variant("none", "no auxiliary loss", (losses(""),)),
            Variant("classic", "importance and load", (losses("importance: 0.02, load: 0.02"),)),
            Variant("entropy", "local and global entropy", (entropies(),)),
            Variant("recipe", "LIMoE's recipe", (RECIPE,)),
            Variant("local", "local entropy alone", (entropies(whole=False),)),
            Variant("global", "global entropy alone", (entropies(local=False),)),
            Variant("image", "local and global entropy of images alone", (entropies(modalities="image"),)),
            Variant("text", "local and global entropy of texts alone", (entropies(modalities="text"),)),
            Variant("dense", "one dense trunk", same_as="retrieval/dense"),
            Variant("towers", "two dense towers", dense(WIDTH), program=TOWERS),
        ),
        panels=("final", "specialisation", "load"),
        setting="16 experts, one a token. A loss has the weight 0.02; the global entropy of a modality is a loss "
        "only while it uses fewer than 8 experts. LIMoE's recipe is importance, load, the local entropy of texts "
        f"and the global one of both, 0.01 each, as in configs/limoe_b16.yaml. {OF_ALL} {AT_THE_END}",
    ),
    Study(
        name="capacity",
        title="Experts with a limited capacity",
        question="An expert takes at most its share of the tokens times a capacity factor. Is it better to drop "
        "those of which the router is least sure (batch priority, V-MoE, arXiv 2106.05974) than the last ones?",
        config="evidence/configs/retrieval.yaml",
        corpus="europe",
        metrics=(RECALL, LOSS, DROPPED_IMAGE, DROPPED_TEXT),
        reference="dropless",
        variants=(
            Variant("dropless", "no limit", same_as="retrieval/e16"),
            *(
                Variant(
                    f"{'bpr' if first else 'fifo'}-{factor}",
                    f"{factor}, {'batch priority' if first else 'in their order'}",
                    (f"moe.capacity_factor={factor}", f"moe.batch_priority={str(first).lower()}"),
                )
                for factor in ("1.0", "0.5", "0.25")
                for first in (True, False)
            ),
        ),
        panels=("final", "load"),
        setting="16 experts, one a token. FLOPs are counted as if no token was dropped. In the order of the batch "
        "recall falls and the loss does not. A likely reason: which tokens are dropped depends on the place in "
        "the batch, which an image and its name share, so the model can match the two by it within a batch, as "
        f"the loss does, and not among all held-out images, as recall does. {OF_ALL} The loads of the picture are "
        "the largest of any layer.",
    ),
    Study(
        name="routers",
        title="Routers side by side",
        question="Which router, at equal active FLOPs?",
        config="evidence/configs/retrieval.yaml",
        corpus="europe",
        metrics=(RECALL, LOSS, LARGEST_LOAD, SPECIALISATION),
        reference="softmax",
        variants=(
            Variant("softmax", "softmax, balance loss", same_as="retrieval/e16"),
            Variant("entropy", "softmax, entropy losses", same_as="limoe/entropy"),
            Variant(
                "sigmoid",
                "sigmoid, biases that balance",
                ("moe.router=sigmoid_top_k", "moe.bias_balancing.rate=0.01", losses("")),
            ),
            Variant("noisy", "noisy top-1", ("moe.router=noisy_top_k", losses("importance: 0.02, load: 0.02"))),
            Variant("laplace", "Laplace gate", ("moe.gate=laplace",)),
            Variant(
                "grouped",
                "the best of 4 groups",
                ("moe.router=group_limited", "moe.node_groups=4", "moe.scores_per_group=2"),
            ),
            Variant("expert_choice", "experts choose", ("moe.router=expert_choice", losses(""))),
            Variant("hash", "hash of the token", ("moe.router=hash", losses(""))),
            Variant(
                "modalities",
                "8 experts a modality",
                (
                    "moe.expert_groups=[{modalities: [image], num_experts: 8}, {modalities: [text], num_experts: 8}]",
                    losses("balance: 0.02, per_modality: [balance]"),
                ),
            ),
            Variant(
                "shared",
                "half a shared expert",
                (f"moe.expert_hidden_size={WIDTH // 2}", f"moe.shared_expert_hidden_size={WIDTH // 2}"),
            ),
            Variant(
                "fine",
                "2 of 32 experts of half the width",
                ("moe.num_experts=32", "moe.experts_per_token=2", f"moe.expert_hidden_size={WIDTH // 2}"),
            ),
            Variant("dense", "dense", same_as="retrieval/dense"),
        ),
        panels=("final", "load", "specialisation"),
        setting="16 experts, one a token, unless a row says so. The hash learns nothing: it sends a piece of text by "
        "its id, and a patch by its place in the image, to the same expert in every layer. The dictionary's study "
        f"has it, too. {OF_ALL} {AT_THE_END}",
    ),
    Study(
        name="upcycling",
        title="A dense model that becomes sparse",
        question="Is it better to train a sparse model from the start, or to make it of a dense one (sparse "
        "upcycling, arXiv 2212.05055) that was trained with half of the FLOPs?",
        config="evidence/configs/captions.yaml",
        corpus="emoji",
        metrics=(CAPTIONS,),
        reference="dense",
        variants=(
            Variant("dense", "dense", same_as="captions/dense"),
            Variant("sparse", "16 experts, two a token", ("moe.experts_per_token=2", "train.steps=2193")),
            Variant(
                "upcycled",
                "dense, then 16 experts",
                ("moe.experts_per_token=2", "train.steps=2595"),
                start=Start(1500 / 2595, dense(NARROW), ("experts", "upcycle", "--num-experts=16")),
            ),
        ),
        panels=("flops", "hours"),
        setting="Experts are copies of the dense layer at first, and a token visits two, which makes a step 37% more "
        "expensive than a dense one. So runs have fewer steps: all have equal FLOPs.",
    ),
    Study(
        name="rates",
        title="Learning rates by width",
        question="Which learning rate, at two widths?",
        config="evidence/configs/captions.yaml",
        corpus="emoji",
        metrics=(dataclasses.replace(CAPTIONS, compared=False),),
        reference="w128-2e-3",
        variants=tuple(
            Variant(
                f"w{width}-{rate}",
                f"width {width}, {rate}",
                (*of_width(width), *SHORT, f"optimizer.learning_rate={float(rate)}"),
                line=f"width {width}",
                x=float(rate),
            )
            for width in (64, 128)
            for rate in ("5e-4", "1e-3", "2e-3", "4e-3", "8e-3")
        ),
        panels=("sweep",),
        setting=f"16 experts, one a token. {SWEEP}",
        seeds=(1,),
        axis="learning rate",
    ),
    Study(
        name="balance",
        title="Weights of the balance loss",
        question="Which weight of the balance loss?",
        config="evidence/configs/captions.yaml",
        corpus="emoji",
        metrics=(dataclasses.replace(CAPTIONS, compared=False), LARGEST_LOAD, DEAD),
        reference="b0.02",
        variants=tuple(
            Variant(
                f"b{weight}",
                f"{weight}",
                (*of_width(64), *SHORT, losses(f"balance: {weight}"), "optimizer.learning_rate=0.004"),
                line="width 64",
                x=float(weight),
            )
            for weight in ("0.0", "0.002", "0.02", "0.2")
        ),
        panels=("sweep", "load"),
        setting="16 experts, one a token, learning rate 0.004. The largest load is that of any layer, in the last "
        f"batch of training; a dead expert has less than 1% of an even share. {SWEEP}",
        seeds=(1,),
        axis="weight of the balance loss",
    ),
    Study(
        name="demo",
        title="The demo: stamps, their names and their spoken names",
        question="The demo's data are small: 785 stamps, their names in many languages, and recordings of the names. "
        "Does sparsity pay there?",
        config="configs/demo.yaml",
        corpus="demo",
        metrics=(
            *NAMES_OF_STAMPS,
            Metric(f"{TEST}image_to_text_zero_shot", "zero-shot class", False, percent=True),
            Metric(f"{TEST}image_to_text_zero_shot_balanced", "zero-shot class, balanced", False, percent=True),
            Metric(f"{TEST}captions_perplexity", "perplexity of captions"),
        ),
        reference="dense",
        variants=(Variant("dense", "dense", dense(512)), Variant("moe", "8 experts")),
        panels=(),
        setting="A token visits one of 8 experts; the dense model has one expert of the same width, so equal "
        "active FLOPs. Scores are of `mmmoe evaluate` on the held-out stamps; `report.md` in the folder of a run "
        "has chance and the best fixed answer beside each. A run has one process, where `make demo` has two: the "
        "losses of both are equal up to rounding, which grows over 1,000 steps. The data are too small for "
        "capacity to matter much, so the study does not show what sparsity gains on larger data. Class names are "
        "among the training texts: zero-shot is over unseen images, not over unseen classes.",
        evaluated=True,
    ),
)
