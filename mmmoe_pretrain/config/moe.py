"""The schema of an MoE layer: routers, losses, experts, dispatch, and what differs by layer.

Owns every check of the ``moe`` section that needs no hardware and no other section.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator

from mmmoe_pretrain import kinds
from mmmoe_pretrain.config.base import StrictModel, explain
from mmmoe_pretrain.config.expert_groups import ExpertGroupConfig, sized

RouterName = Annotated[str, AfterValidator(kinds.ROUTERS.check)]
RoutingTerm = Literal["importance", "load", "balance", "z"]
SELF_BALANCED = ("hash", "expert_choice")  # routers
DEFAULT_BALANCE = 0.02
WHOLE_MODEL_KEYS = ("every", "layers", "lending", "losses", "routing_memory_size")  # one value for all layers


class RoutingLossConfig(StrictModel):
    """Weights of the auxiliary losses; a weight of 0 disables the term.

    ``entropy_modalities`` take part in the LIMoE terms (None: all); ``local_entropy_modalities`` and
    ``global_entropy_modalities`` name those of one term where the two differ. ``min_experts[m]`` is S_m of
    the soft threshold log(S_m) of the global entropy (arXiv 2206.02770); absent means no threshold.
    ``combination`` drives tokens of samples that lack some of ``combination_modalities`` (None: all) to the expert of
    those that they have (Flex-MoE, arXiv 2410.08245); ``MoEConfig.combinations`` has the order of the experts.
    ``per_modality`` terms are computed on each modality's tokens alone and averaged over the
    modalities present. ``balance_scope`` says over which tokens the shares are counted.
    """

    local_entropy: float = Field(0.0, ge=0)
    global_entropy: float = Field(0.0, ge=0)
    entropy_modalities: tuple[str, ...] | None = None
    local_entropy_modalities: tuple[str, ...] | None = None  # None: entropy_modalities
    global_entropy_modalities: tuple[str, ...] | None = None
    min_experts: dict[str, float] = Field({})
    importance: float = Field(0.0, ge=0)
    load: float = Field(0.0, ge=0)
    balance: float = Field(0.0, ge=0)
    balance_scope: Literal["sequence", "microbatch", "global_batch"] = "microbatch"
    z: float = Field(0.0, ge=0)
    orthogonality: float = Field(0.0, ge=0)
    combination: float = Field(0.0, ge=0)
    combination_modalities: tuple[str, ...] | None = None
    per_modality: tuple[RoutingTerm, ...] = ()

    @model_validator(mode="after")
    def _scope(self) -> Self:
        if self.balance_scope == "sequence" and "balance" in self.per_modality:
            raise ValueError(
                "moe.losses.balance_scope sequence counts by segment, which has one modality already or is fused of "
                "several, so balance by modality has no clear meaning there; remove balance from "
                "moe.losses.per_modality, or use balance_scope microbatch or global_batch"
            )
        return self

    def entropy_terms(self, modalities: Sequence[str]) -> tuple[tuple[str, str], ...]:
        """The LIMoE terms that are on, each with a modality that takes part in it, of all ``modalities``."""
        named = {"local_entropy": self.local_entropy_modalities, "global_entropy": self.global_entropy_modalities}
        every = self.entropy_modalities if self.entropy_modalities is not None else tuple(modalities)
        taking_part = {term: every if own is None else own for term, own in named.items() if getattr(self, term)}
        order = dict.fromkeys((*every, *modalities))
        return tuple((term, m) for m in order for term, names in taking_part.items() if m in names)

    @property
    def any_of_tokens(self) -> bool:
        """Some term needs gradients through the statistics of the tokens."""
        of_all = (self.importance, self.load, self.balance, self.z, self.combination)
        return any((self.local_entropy, self.global_entropy, *of_all))


class BiasBalancingConfig(StrictModel):
    """Experts are chosen by score + bias and weighed by score; the bias of an expert with less than
    the mean load rises by ``rate`` after each optimizer step (arXiv 2408.15664). None is off; 0 keeps the
    biases that were learned, as DeepSeek-V3 does at the end of its training."""

    rate: float | None = Field(None, ge=0)
    per_modality: bool = False

    @property
    def on(self) -> bool:
        return self.rate is not None


class LendingConfig(StrictModel):
    """Where the fullest rank of an expert group has more than ``threshold`` times the mean number of rows, ranks with
    fewer rows than the mean compute some of its rows with a copy of the expert's weights (after least-loaded expert
    parallelism, arXiv 2601.17111). At least ``min_rows`` rows of an expert go to one rank (``moe/lending.py`` has the
    rule), and a rank computes for at most ``max_experts`` experts of others."""

    threshold: float = Field(1.25, ge=1)
    min_rows: int = Field(1536, ge=1)
    max_experts: int = Field(2, ge=1)


class MoEConfig(StrictModel):
    """One MoE layer; ``layers`` overrides single settings by block index."""

    router: RouterName = "softmax_top_k"
    gate: Literal["linear", "laplace"] = "linear"  # logits: w x, or -|x - w| (FuseMoE, arXiv 2402.03226)
    every: int = Field(2, ge=1)  # block i is an MoE layer where (i + 1) % every == 0
    num_experts: int = Field(8, ge=1)  # 1 is a dense model
    experts_per_token: int = Field(2, ge=1)
    expert_hidden_size: int = Field(256, ge=1)
    activation: Literal["swiglu", "gelu", "clamped_swiglu"] = "swiglu"
    expert_biases: bool = False  # on both products of the routed experts (GPT-OSS)
    expert_groups: tuple[ExpertGroupConfig, ...] = ()  # empty: every expert serves every modality
    group_multiple: int = Field(1, ge=1)  # sizes of groups that are auto are multiples of it, for expert parallelism
    shared_expert_hidden_size: int = Field(0, ge=0)  # of the expert that is applied to every token; 0 is none
    shared_expert_gate: bool = False  # its output times sigmoid(w x) (Qwen2-MoE)
    identity_experts: int = Field(0, ge=0)  # return the token itself (MoE++, arXiv 2410.07348)
    null_experts: int = Field(0, ge=0)  # return nothing
    capacity_factor: float | None = Field(None, gt=0)  # None is dropless
    batch_priority: bool = False
    renormalize: bool = True  # divide the chosen weights by their sum; never where K = 1
    routed_scaling_factor: float = Field(1.0, gt=0)  # of the weights after that (DeepSeek-V2 and V3)
    router_weight_on_input: bool = False  # weights multiply an expert's input, not its output (Llama 4)
    router_bias: bool = False  # the logits have a learned bias (GPT-OSS)
    node_groups: int = Field(1, ge=1)  # of equally many experts, for routers group_limited and sigmoid_top_k
    groups_per_token: int = Field(1, ge=1)
    scores_per_group: int | None = Field(None, ge=1)  # whose sum ranks a group; None: K / groups_per_token
    # Tasks (objectives) whose tokens' router sees a learned embedding of the task: all, none, or those named.
    task_conditioned: bool | tuple[str, ...] = False
    task_input: Literal["added", "alone"] = "added"  # to x; alone: in its place, so a task's tokens choose alike
    routing_memory_size: int = Field(0, ge=0)  # of the state that goes from router to router (RMoE); 0 is none
    expert_attention_size: int = Field(0, ge=0)  # of queries and keys among a token's experts; 0: only their sum
    jitter: float = Field(0.0, ge=0, lt=1)  # the router's input times U(1 - jitter, 1 + jitter) in training
    bias_balancing: BiasBalancingConfig = BiasBalancingConfig()
    wake_steps: int = Field(0, ge=0)  # over which the dormancy of added experts falls to 0; 0: no dormant experts
    dispatch_chunks: int = Field(1, ge=1, le=64)  # pieces whose transfers overlap; each reads all weights again
    lending: LendingConfig | None = None  # None: every rank computes all rows of its own experts
    expert_backend: Literal["auto", "blocked", "grouped_mm"] = "auto"
    losses: RoutingLossConfig = RoutingLossConfig()  # of a config that names none: ``_balanced``
    layers: dict[int, dict[str, Any]] = Field({})  # block index -> settings that differ there

    @model_validator(mode="before")
    @classmethod
    def _balanced(cls, values: Any) -> Any:
        """Where a config says nothing of losses, the balance loss with the weight that docs/evidence.md has measured;
        unless the router or its biases balance, or there is nothing to balance. ``losses: {}`` sets none."""
        if not isinstance(values, dict) or "losses" in values:
            return values
        balanced = values.get("router") in SELF_BALANCED or values.get("bias_balancing")
        if balanced or values.get("num_experts") == 1:
            return values
        return {**values, "losses": {"balance": DEFAULT_BALANCE}}

    @property
    def dense(self) -> bool:
        return self.num_experts == 1

    @property
    def router_outputs(self) -> int:
        """Experts that a token can choose, those without computation included; these come last: identity experts,
        then null experts."""
        return self.num_experts + self.identity_experts + self.null_experts

    @property
    def dropless(self) -> bool:
        """Every choice of a token is computed by an expert."""
        takes_all = self.capacity_factor is None and self.router != "expert_choice"
        return takes_all and self.router_outputs == self.num_experts

    @property
    def groups(self) -> tuple[ExpertGroupConfig, ...]:
        """The expert groups with their sizes filled in; one of all experts where none is named. Those whose number of
        experts is auto have equally many, until a run knows its tokens (``with_budgets``)."""
        named = self._sized(None) or (ExpertGroupConfig(num_experts=self.num_experts),)
        return tuple(
            group.model_copy(update={"expert_hidden_size": group.expert_hidden_size or self.expert_hidden_size})
            for group in named
        )

    def _sized(self, tokens: Mapping[str, float] | None) -> tuple[ExpertGroupConfig, ...]:
        fixed = [group for group in self.expert_groups if group.modalities is None]
        of_all = sum(group.num_experts for group in fixed) + self.identity_experts + self.null_experts
        least = max(1, self.experts_per_token - of_all)
        return sized(self.expert_groups, self.num_experts, self.group_multiple, least, tokens)

    @property
    def auto_layers(self) -> tuple[int | None, ...]:
        """Where a group's number of experts is auto: None for all layers, and numbers of those that differ."""
        layers: list[tuple[int | None, MoEConfig]] = [(None, self), *((i, self.for_layer(i)) for i in self.layers)]
        return tuple(i for i, layer in layers if any(group.auto for group in layer.expert_groups))

    def with_budgets(self, tokens: Mapping[str, float]) -> MoEConfig:
        """With numbers of experts that are auto in proportion to the ``tokens`` by modality."""
        layers = {i: dict(override) for i, override in self.layers.items()}
        for i in self.auto_layers:
            if i is not None:
                layers[i]["expert_groups"] = [its.model_dump(mode="json") for its in self.for_layer(i)._sized(tokens)]
        return self.model_copy(update={"expert_groups": self._sized(tokens), "layers": layers})

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """Numbers of experts that expert parallelism must divide: of every group of every layer."""
        layers = [self, *(self.for_layer(index) for index in self.layers)]
        return tuple(sorted({group.num_experts for layer in layers for group in layer.groups}))

    def for_layer(self, index: int) -> MoEConfig:
        """The settings of block ``index``."""
        override = self.layers.get(index)
        if not override:
            return self
        return MoEConfig.model_validate({**self.model_dump(exclude={"layers"}), **override})

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        if self.experts_per_token > self.router_outputs:
            idle = self.router_outputs - self.num_experts
            raise ValueError(
                f"moe.experts_per_token {self.experts_per_token} exceeds moe.num_experts {self.num_experts}"
                f"{f' and the {idle} without computation' if idle else ''}; lower the first (a dense model has 1 and "
                f"1) or raise the second"
            )
        if self.batch_priority and self.capacity_factor is None:
            raise ValueError(
                "moe.batch_priority orders tokens for a limited capacity, and "
                "moe.capacity_factor null has none; set e.g. capacity_factor: 1.25 or "
                "batch_priority: false"
            )
        if self.shared_expert_gate and not self.shared_expert_hidden_size:
            raise ValueError(
                "moe.shared_expert_gate weighs a shared expert, and moe.shared_expert_hidden_size is 0; set its "
                "hidden size, or shared_expert_gate: false"
            )
        self._check_lending()
        self._check_attention()
        self._check_groups()
        self._check_router()
        return self

    def _check_lending(self) -> None:
        if self.lending is None:
            return
        if self.dispatch_chunks > 1:
            raise ValueError(
                f"moe.lending sends the weights of an expert once a layer, and moe.dispatch_chunks "
                f"{self.dispatch_chunks} computes a layer in parts; set dispatch_chunks: 1, or lending: null"
            )
        if self.expert_groups:
            raise ValueError(
                f"moe.lending shares the rows of one stack of equal experts, and moe.expert_groups has "
                f"{len(self.expert_groups)}; set lending: null, or remove expert_groups"
            )

    def _check_attention(self) -> None:
        if not self.expert_attention_size or self.dense:
            return
        if self.experts_per_token < 2 or self.router == "expert_choice":
            raise ValueError(
                f"moe.expert_attention_size {self.expert_attention_size} is of the attention among several experts "
                f"that a token chooses, and with moe.router {self.router} and moe.experts_per_token "
                f"{self.experts_per_token} it chooses {'one' if self.experts_per_token < 2 else 'none'}; set "
                f"experts_per_token: 2 with another router, or expert_attention_size: 0"
            )
        if self.router_weight_on_input:
            raise ValueError(
                "moe.expert_attention_size compares outputs of experts before they are weighed, and "
                "moe.router_weight_on_input weighs what they read; set router_weight_on_input: false, or "
                "expert_attention_size: 0"
            )

    def _check_groups(self) -> None:
        if not self.expert_groups:
            return
        total = sum(group.num_experts for group in self._sized(None))
        if total != self.num_experts:
            raise ValueError(
                f"moe.expert_groups hold {total} experts together, and moe.num_experts is {self.num_experts}; "
                f"set num_experts: {total}"
            )
        if self.router == "hash" or self.node_groups > 1:
            raise ValueError(
                f"moe.router {self.router} (moe.node_groups {self.node_groups}) chooses among all experts, and "
                f"moe.expert_groups keep them apart by modality; use softmax_top_k, sigmoid_top_k, noisy_top_k or "
                f"expert_choice without node groups, or drop expert_groups"
            )

    def combinations(self, modalities: Sequence[str]) -> tuple[tuple[str, ...], ...]:
        """The combinations that a sample which lacks some of ``losses.combination_modalities`` may have, if that loss
        is on: smaller ones first, then in the order of ``modalities``. The expert of the i-th is number i."""
        if self.dense or not self.losses.combination:
            return ()
        named = self.losses.combination_modalities
        taking_part = [name for name in modalities if named is None or name in named]
        sizes = range(1, len(taking_part))
        return tuple(its for size in sizes for its in itertools.combinations(taking_part, size))

    def _check_combinations(self, modalities: Sequence[str]) -> None:
        if self.dense or not self.losses.combination:
            return
        named = self.losses.combination_modalities or tuple(modalities)
        count = 2 ** len(named) - 2
        if len(named) < 2 or len(set(named)) < len(named):
            raise ValueError(
                f"moe.losses.combination is about samples that lack some of several modalities, and "
                f"moe.losses.combination_modalities are {', '.join(named)}; name two or more, each once"
            )
        if count > self.num_experts:
            raise ValueError(
                f"moe.losses.combination has an expert for each of the {count} combinations that lack some of "
                f"{', '.join(named)}, and moe.num_experts is {self.num_experts}; raise it to {count} or more, or "
                f"name fewer modalities in moe.losses.combination_modalities"
            )
        if self.expert_groups:
            raise ValueError(
                "moe.losses.combination drives tokens of several modalities to one expert, and moe.expert_groups "
                "keep experts apart by modality; remove expert_groups, or set moe.losses.combination: 0"
            )

    def check_modalities(self, modalities: Sequence[str]) -> None:
        """Raises ValueError where one of ``modalities`` reaches too few experts, or their combinations do."""
        self._check_combinations(modalities)
        for modality in () if self.dense else modalities:
            reach = sum(group.num_experts for group in self.groups if group.serves(modality))
            reach += self.identity_experts + self.null_experts
            if reach < self.experts_per_token:
                raise ValueError(
                    f"moe.expert_groups let {modality} reach {reach} experts, fewer than moe.experts_per_token "
                    f"{self.experts_per_token}; add {modality} to a group, or lower experts_per_token"
                )
            threshold = self.losses.min_experts.get(modality, 1)
            known = not any(group.auto for group in self.expert_groups)
            if known and not 1 <= threshold <= reach:
                raise ValueError(
                    f"moe.losses.min_experts of {modality} is {threshold:g}, and its tokens reach {reach} "
                    f"experts; use 1 to {reach}"
                )

    @property
    def modalities_named(self) -> Iterator[tuple[str, Sequence[str]]]:
        """Where this section names modalities, and which."""
        losses = self.losses
        keys = (
            "entropy_modalities",
            "local_entropy_modalities",
            "global_entropy_modalities",
            "combination_modalities",
        )
        for key in keys:
            yield f"moe.losses.{key}", getattr(losses, key) or ()
        yield "moe.losses.min_experts", tuple(losses.min_experts)
        for where, layer in (("moe", self), *((f"moe.layers.{i}", self.for_layer(i)) for i in self.layers)):
            for number, group in enumerate(layer.expert_groups):
                yield f"{where}.expert_groups.{number}.modalities", group.modalities or ()

    def _check_router(self) -> None:
        if self.scores_per_group is not None and self.node_groups == 1:
            raise ValueError(
                f"moe.scores_per_group {self.scores_per_group} ranks several node groups, and "
                f"moe.node_groups is 1; raise node_groups, or remove scores_per_group"
            )
        if self.node_groups > 1 or self.groups_per_token > 1 or self.router == "group_limited":
            self._check_node_groups()
        if self.router == "expert_choice" and (self.batch_priority or self.bias_balancing.on):
            raise ValueError(
                "moe.router expert_choice fills every expert by itself, so moe.batch_priority and "
                "moe.bias_balancing have nothing to order; remove both"
            )
        if self.losses.load and self.router in ("hash", "expert_choice"):
            raise ValueError(
                f"moe.losses.load needs a router that chooses the top k experts of a token, and moe.router "
                f"{self.router} does not; set moe.losses.load: 0 (importance works with it)"
            )
        if self.losses.combination and self.router in SELF_BALANCED:
            raise ValueError(
                f"moe.losses.combination needs a router that chooses the top k experts of a token, and moe.router "
                f"{self.router} does not; set moe.losses.combination: 0, or choose softmax_top_k"
            )
        if self.task_input == "alone" and not self.task_conditioned:
            raise ValueError(
                "moe.task_input alone routes by the embedding of a task, and moe.task_conditioned names none; set "
                "task_conditioned: true, or a list of objectives, or remove task_input"
            )
        unused = (self.bias_balancing.on, self.jitter, self.task_conditioned, self.router_bias)
        if self.router == "hash" and any((*unused, self.routing_memory_size)):
            raise ValueError(
                "moe.router hash does not use the token's content, so moe.bias_balancing, moe.jitter, "
                "moe.task_conditioned, moe.router_bias and moe.routing_memory_size have no effect; remove them"
            )

    def conditioned(self, tasks: Sequence[str]) -> tuple[str, ...]:
        """Those of ``tasks`` whose tokens are routed by their task, too."""
        named = self.task_conditioned
        return tuple(task for task in tasks if named is True or (isinstance(named, tuple) and task in named))

    def _check_node_groups(self) -> None:
        if self.router not in ("group_limited", "sigmoid_top_k"):
            raise ValueError(
                f"moe.node_groups {self.node_groups} and moe.groups_per_token {self.groups_per_token} are for the "
                f"routers group_limited and sigmoid_top_k, and moe.router is {self.router}; remove them"
            )
        if self.num_experts % self.node_groups or self.groups_per_token > self.node_groups:
            raise ValueError(
                f"moe.router {self.router} splits moe.num_experts {self.num_experts} into moe.node_groups "
                f"{self.node_groups} of equal size and takes moe.groups_per_token {self.groups_per_token} of them; "
                f"use a divisor of {self.num_experts}, and at most that many groups a token"
            )
        size = self.num_experts // self.node_groups
        reach = self.groups_per_token * size
        if self.experts_per_token > reach:
            raise ValueError(
                f"moe.groups_per_token {self.groups_per_token} of {self.node_groups} leaves a token {reach} experts, "
                f"fewer than moe.experts_per_token {self.experts_per_token}; raise groups_per_token"
            )
        if (self.scores_per_group or 1) > size:
            raise ValueError(
                f"moe.scores_per_group {self.scores_per_group} exceeds the {size} experts of each of the "
                f"{self.node_groups} groups; use 1 to {size}"
            )
        if self.identity_experts or self.null_experts:
            raise ValueError(
                "moe.node_groups contain only experts on nodes; remove moe.identity_experts and moe.null_experts, "
                "or moe.node_groups"
            )

    @model_validator(mode="after")
    def _layers_are_possible(self) -> Self:
        for index, override in self.layers.items():
            whole = [key for key in WHOLE_MODEL_KEYS if key in override]
            if whole:
                raise ValueError(
                    f"moe.layers.{index}.{whole[0]} holds for all layers together; set moe.{whole[0]} instead"
                )
            if index < 0 or (index + 1) % self.every:
                raise ValueError(
                    f"moe.layers.{index}: block {index} has no experts under moe.every {self.every}; name one of "
                    f"{', '.join(str(i) for i in range(self.every - 1, 4 * self.every, self.every))}, ..."
                )
            try:
                layer = self.for_layer(index)
            except ValidationError as error:
                raise ValueError("; ".join(explain(error, ("moe", "layers", index)))) from None
            if layer.dense != self.dense:
                raise ValueError(f"moe.layers.{index}: one MoE layer cannot be dense; use num_experts: 2 or more")
        return self
