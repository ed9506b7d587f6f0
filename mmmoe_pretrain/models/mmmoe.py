"""The model: embedders write tokens to one stream, the trunk processes it, heads read it.

Shapes: n valid tokens, D hidden size, B samples, P size of the joint embedding space, N targets.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmmoe_pretrain import kinds
from mmmoe_pretrain.batch import OF_TOKENIZER, Batch
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.modalities import build_modalities
from mmmoe_pretrain.models.attention import Rotary, StreamPlan, plan_append, plan_stream
from mmmoe_pretrain.models.cache import KeyValueCache
from mmmoe_pretrain.models.content_decoder import ContentDecoder
from mmmoe_pretrain.models.fusion.bank import GIVEN, Bank, stream_keys
from mmmoe_pretrain.models.fusion.base import PARTS, build_fusion
from mmmoe_pretrain.models.fusion.modulation import scale_gradient
from mmmoe_pretrain.models.trunk import Trunk, set_cpu
from mmmoe_pretrain.moe.router import Router
from mmmoe_pretrain.moe.stats import RoutingStats
from mmmoe_pretrain.moe.tokens import TokenInfo
from mmmoe_pretrain.objectives import Outputs, build_objectives
from mmmoe_pretrain.parallel.groups import SINGLE, Groups
from mmmoe_pretrain.parallel.stages import Stage, whole
from mmmoe_pretrain.parallel.tensor import vocab_cross_entropy, vocab_head

BY_MODALITY = (
    "embedders", "modality_embedding", "mask_embedding", "joint_heads", "content_heads", "code_heads", PARTS,
)  # fmt: skip
NO_FACTORS: Mapping[str, Tensor] = MappingProxyType({})


class MMMoE(nn.Module):
    """A multimodal mixture-of-experts transformer, or one pipeline stage of it.

    Every parameter is used in every forward pass: an absent modality runs its embedder on zero rows. The last stage
    has a joint head for each representation that an objective reads, behind the module of its kind (``fusion/``) and
    with ``missing: bank`` its bank, the language heads by which some predict tokens of the tokenizer, a code head for
    each modality with a vocabulary of its own of which one predicts tokens, a head for each that tells classes apart,
    and a content head for each modality whose contents one predicts, or a decoder where these are not in the stream.
    """

    def __init__(self, config: RunConfig, groups: Groups = SINGLE, stage: Stage | None = None) -> None:
        super().__init__()
        hidden, joint, vocab_size = config.model.hidden_size, config.model.embedding_size, config.model.vocab_size
        self.config, self.groups = config, groups
        self.stage = stage or whole(config.model.num_layers)
        self.names = config.stream_names
        modalities = build_modalities(config.modalities, decoding=False)
        readers = [name for name, modality in modalities.items() if modality.needs_tokenizer]
        assert vocab_size or not readers, f"{readers} need RunConfig.with_vocabulary"
        self.objectives = build_objectives(config.objectives, modalities, config.representations, vocab_size)
        read = self.objectives.representations
        banked = {name: its.settings for name, its in read.items() if its.settings.missing == "bank"}
        self._streams = {
            **dict.fromkeys(BY_MODALITY, modalities.streams),
            **dict.fromkeys(("tasks", "task_embedding", "content_decoders", "class_heads"), self.objectives.streams),
            "language_heads": kinds.stream_keys({name: "head" for name in self.objectives.language_heads if name}),
            GIVEN: stream_keys(banked.values(), modalities.streams),
        }
        self.compute_dtype = torch.float32
        self._passes = 0  # forward passes since begin_step
        if self.stage.first:
            embedders = {name: modality.embedder(hidden, vocab_size, groups) for name, modality in modalities.items()}
            self.embedders = nn.ModuleDict(embedders)
            rows = {name: nn.Parameter(torch.empty(1, hidden)) for name in modalities}
            self.modality_embedding = nn.ParameterDict(rows)
            self.mask_embedding = nn.ParameterDict(
                {name: nn.Parameter(torch.empty(1, hidden)) for name in self.objectives.hidden}
            )
        self.trunk = Trunk(config.model, config.moe, groups, self.stage, self.names)
        set_cpu(self.trunk, config.train.cpu)  # here: evaluation and export compute as the run did
        self.language_head: Any = None
        if self.stage.last:
            fusions = {name: build_fusion(its.settings, config.model) for name, its in read.items()}
            heads = {name: nn.Linear(fusion.width, joint, bias=False) for name, fusion in fusions.items()}
            self.fusions, self.joint_heads = nn.ModuleDict(fusions), nn.ModuleDict(heads)
            self.banks = nn.ModuleDict({name: Bank(settings, hidden) for name, settings in banked.items()})
            named = self.objectives.language_heads
            if None in named:
                self.language_head = vocab_head(hidden, vocab_size, groups)
            self.language_heads = nn.ModuleDict(
                {name: vocab_head(hidden, vocab_size, groups) for name in named if name is not None}
            )
            own = {name: config.modalities[name].vocabulary for name in self.objectives.vocabularies if name}
            self.code_heads = nn.ModuleDict({name: vocab_head(hidden, size, groups) for name, size in own.items()})
            self.class_heads = nn.ModuleDict(
                {task: nn.Linear(joint, len(its.classes)) for task, its in self.objectives.classifying.items()}
            )
            plain = [its for its in self.objectives.values() if not its.decoder_layers]
            sizes = {name: modalities[name].content_size for its in plain for name in its.contents.values()}
            self.content_heads = nn.ModuleDict({name: nn.Linear(hidden, size) for name, size in sizes.items()})
            self.content_decoders = nn.ModuleDict(
                {
                    name: ContentDecoder(
                        its.decoder_layers, {m: modalities[m] for m in its.contents.values()}, config.model
                    )
                    for name, its in self.objectives.items()
                    if its.decoder_layers
                }
            )
        rotary = [modality.rotary for modality in modalities.values()]
        self.register_buffer("rotary_M", torch.tensor(rotary), persistent=False)

    def stream_name(self, parameter: str) -> str:
        """The key of a parameter's initial numbers: its name, with kinds in place of the names of modalities and
        objectives, so that renaming one changes no number."""
        parts = parameter.split(".")
        known = (self._streams.get(holder, {}) for holder in ("", *parts))
        return ".".join(keys.get(part, part) for keys, part in zip(known, parts, strict=False))

    def begin_step(self, seed: int) -> None:
        """Make random numbers in routing a function of ``seed`` and the number of forward passes since."""
        self._passes = 0
        for router in self.routers:
            router.begin_step(seed)

    @property
    def routers(self) -> list[Router]:
        """Of this stage's MoE layers, in their order."""
        return [module for module in self.modules() if isinstance(module, Router)]

    def forward(self, batch: Batch) -> tuple[Outputs, tuple[RoutingStats, ...]]:
        """All of the model on one batch."""
        assert self.stage.first and self.stage.last
        x_nD, routing = self.run_stage(batch, None)
        return self.heads(x_nD, batch), routing

    def run_stage(
        self, batch: Batch, received_nD: Tensor | None, cache: KeyValueCache | None = None
    ) -> tuple[Tensor, tuple[RoutingStats, ...]]:
        """This stage's blocks on what the stage before sent (the first one embeds ``batch``): the hidden
        states for the next stage or the heads, and the routing sums of each sparse block. ``cache``: is filled."""
        plan = plan_stream(batch, self.names, self._rotary, self._passes, cache)
        self._passes += 1
        if self.stage.first:
            received_nD = self._embed(batch, plan)
        assert received_nD is not None
        return self.trunk(received_nD, plan)

    @property
    def _rotary(self) -> Rotary:
        model = self.config.model
        return Rotary(model.hidden_size // model.num_heads, model.rotary_base, self.get_buffer("rotary_M"))

    def append(
        self, name: str, inputs: Mapping[str, Tensor], tokens: TokenInfo, position_S: Tensor, cache: KeyValueCache
    ) -> Tensor:
        """One more token of modality ``name``, with the embedder's ``inputs``, for every sequence of ``cache``, which
        ``run_stage`` has filled: [S, D], the trunk's output."""
        cache.advance()
        x_SD = self.embedders[name](**inputs) + self.modality_embedding[name]
        return self.trunk(x_SD.to(self.compute_dtype), plan_append(tokens, position_S, self._rotary, cache))[0]

    def heads(self, x_nD: Tensor, batch: Batch, factors: Mapping[str, Tensor] = NO_FACTORS) -> Outputs:
        """The outputs of the last stage from the trunk's output. ``factors``: by representation, [parts, B], of the
        gradients of its parts; of these there are ``Outputs.terms``."""
        projected, terms = self.projected(x_nD, batch, factors)
        features = {name: F.normalize(rows_BP, dim=-1, eps=1e-6) for name, rows_BP in projected.items()}
        found = (self._token_nll(x_nD, batch), self._contents(x_nD, batch))
        logits = {
            task: self.class_heads[task](projected[its.representations[0]])
            for task, its in self.objectives.classifying.items()
        }
        return Outputs(x_nD, features, *found, projected, terms, logits)

    def _embed(self, batch: Batch, plan: StreamPlan) -> Tensor:
        tokens = torch.cat(
            [
                embedder(**batch.inputs[name]).index_select(0, batch.source[name])
                for name, embedder in self.embedders.items()
            ]
        )
        rows = torch.cat(list(batch.rows.values()))
        place = torch.empty_like(rows)
        place[rows] = torch.arange(rows.numel(), device=rows.device)
        of_modality_MD = torch.cat([self.modality_embedding[name] for name in self.names.modalities])
        x_nD = tokens.index_select(0, place) + of_modality_MD.index_select(0, plan.tokens.modality_ids_n)
        if self.mask_embedding:
            no_mask = x_nD.new_zeros(1, x_nD.shape[1])
            masks = [self.mask_embedding.get(name, no_mask) for name in self.names.modalities]
            of_mask_MD = torch.cat(masks)
            hidden_n1 = batch.hidden[: x_nD.shape[0], None]
            x_nD = x_nD + hidden_n1 * of_mask_MD.index_select(0, plan.tokens.modality_ids_n)
        return x_nD.to(self.compute_dtype)

    def projected(
        self, x_nD: Tensor, batch: Batch, factors: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Each sample's vector, projected, by representation; zero without one. And the ``Outputs.terms``."""
        if not self.joint_heads:
            return {}, {}
        x_nD = x_nD.float()
        mean_SD = _segment_means(x_nD, batch)
        projected, terms = {}, {}
        for name, representation in self.objectives.representations.items():
            parts = representation.segment_names
            segment_PB = torch.stack([batch.pooled[part] for part in parts])
            present_PB = segment_PB >= 0
            rows = torch.where(present_PB, segment_PB, batch.num_segments).flatten()
            mean_PBD = mean_SD.index_select(0, rows).unflatten(0, segment_PB.shape)
            spans = tuple(batch.spans[part] for part in parts) if representation.settings.reads_tokens else ()
            tokens_nD = x_nD
            if name in self.banks:
                bank = cast(Bank, self.banks[name])
                tokens_nD, mean_PBD = bank(x_nD, mean_PBD, present_PB)
                present_PB, spans = bank.present(present_PB), bank.spans(spans, len(x_nD))
            present_B1 = (batch.pooled[name] >= 0)[:, None]
            if name not in factors:
                fused_BW = self.fusions[name](tokens_nD, mean_PBD, present_PB, spans)
                projected[name] = self.joint_heads[name](fused_BW) * present_B1
                continue
            mean_PBD = scale_gradient(mean_PBD, factors[name][..., None])
            term_PBW = self.fusions[name](tokens_nD, mean_PBD, present_PB, spans, by_part=True)
            # One call: ZeRO-3 gathers a head's weights for each.
            both = self.joint_heads[name](torch.cat([term_PBW.sum(dim=0, keepdim=True), term_PBW.detach()]))
            projected[name], terms[name] = both[0] * present_B1, both[1:].detach()
        return projected, terms

    def _contents(self, x_nD: Tensor, batch: Batch) -> dict[str, Tensor]:
        """[N, C] by loss, of its hidden tokens in the order of the stream."""
        found = {}
        for task, objective in self.objectives.items():
            for loss, name in objective.contents.items():
                hidden = batch.contents[loss]
                if objective.decoder_layers:
                    found[loss] = self.content_decoders[task](x_nD.float(), name, hidden)
                else:
                    found[loss] = self.content_heads[name](x_nD.index_select(0, hidden.rows).float())
        return found

    def _token_nll(self, x_nD: Tensor, batch: Batch) -> dict[str, Tensor]:
        """[N] by task, for its targets in the order of the stream."""
        found = {}
        for task in self.objectives.predicting:
            targets = batch.targets[task]
            x_ND = x_nD.index_select(0, targets.rows)
            if not targets.of_vocabulary:
                found[task] = vocab_cross_entropy(self.token_logits(task, x_ND), targets.ids, self.groups)
                continue
            nll = []
            for name, which in targets.of_vocabulary.items():  # also those of no target: every rank calls each head
                logits_NV = self.token_logits(task, x_ND.index_select(0, which), name)
                nll.append(vocab_cross_entropy(logits_NV, targets.ids.index_select(0, which), self.groups))
            places = torch.cat(list(targets.of_vocabulary.values()))
            found[task] = torch.zeros_like(places, dtype=torch.float32).index_copy(0, places, torch.cat(nll))
        return found

    @property
    def token_heads(self) -> list[nn.Module]:
        """The language heads and those of codes, of the last stage."""
        if not self.stage.last:
            return []
        return [*filter(None, [self.language_head]), *self.language_heads.values(), *self.code_heads.values()]

    def token_head(self, task: str, vocabulary: str = OF_TOKENIZER) -> nn.Module:
        """By which the objective ``task`` predicts tokens of a vocabulary."""
        if vocabulary != OF_TOKENIZER:
            return self.code_heads[vocabulary]
        name = self.objectives[task].head
        head: nn.Module = self.language_head if name is None else self.language_heads[name]
        return head

    def token_logits(self, task: str, x_ND: Tensor, vocabulary: str = OF_TOKENIZER) -> Tensor:
        """This rank's share of the logits [N, V], fp32, of the tokens of a vocabulary, from the trunk's output."""
        return cast(Tensor, self.token_head(task, vocabulary)(x_ND)).float()


def _segment_means(x_nD: Tensor, batch: Batch) -> Tensor:
    """The mean over the tokens of each segment, and behind them a row of zeros: [S + 1, D]."""
    num_segments = batch.num_segments
    segment_n = batch.segment_ids[: x_nD.shape[0]]
    total_SD = x_nD.new_zeros(num_segments + 1, x_nD.shape[1]).index_add(0, segment_n, x_nD)
    length_S = torch.zeros(num_segments + 1, dtype=torch.int64, device=x_nD.device)
    length_S.scatter_add_(0, segment_n, torch.ones_like(segment_n))  # bincount would make a GPU's host wait
    return total_SD / length_S.clamp(min=1)[:, None]
