"""The routers that a config can name, one a file: logits go in, a ``Choice`` comes out."""

from __future__ import annotations

from collections.abc import Callable

from mmmoe_pretrain.moe.routers.expert_choice import expert_choice
from mmmoe_pretrain.moe.routers.group_limited import group_limited
from mmmoe_pretrain.moe.routers.hash import hash_route
from mmmoe_pretrain.moe.routers.noisy_top_k import noisy_top_k
from mmmoe_pretrain.moe.routers.sigmoid_top_k import sigmoid_top_k
from mmmoe_pretrain.moe.routers.softmax_top_k import softmax_top_k
from mmmoe_pretrain.moe.routing import Choice, RouterInputs

ROUTERS: dict[str, Callable[[RouterInputs], Choice]] = {
    "softmax_top_k": softmax_top_k,
    "sigmoid_top_k": sigmoid_top_k,
    "group_limited": group_limited,
    "noisy_top_k": noisy_top_k,
    "expert_choice": expert_choice,
    "hash": hash_route,
}
