"""The studies of docs/methods.md about experts that communicate, and routers that remember."""

from __future__ import annotations

from evidence.studies import RECALL
from evidence.study import Method, Study, Variant

EXPERTS = (
    Study(
        name="communication",
        title="Emoji and their names, two experts a token",
        question="Does it help if the experts of a token see each other's outputs, or if a router knows how the "
        "layers before routed a token, at the same FLOPs?",
        config="evidence/configs/retrieval.yaml",
        corpus="europe",
        metrics=(RECALL,),
        reference="top_2",
        variants=(
            Variant("top_2", "plain top-2", ("moe.experts_per_token=2",)),
            Method(
                "expert_attention",
                "attention among experts",
                item="experts",
                paper="attention: arXiv 1706.03762",
            ),
            Method("routing_memory", "routing memory", item="experts", paper="RMoE, arXiv 2408.06793"),
        ),
        panels=(),
        setting="16 experts, two a token. For equal FLOPs the experts of plain top-2 have a hidden size of 256, with "
        "attention of size 12 one of 240, and with a memory of size 22 one of 248. By `mmmoe plan` a token costs "
        "0.03% more with the attention, and 0.03% less with the memory.",
    ),
)
