"""Masked modelling: some tokens of a segment lose their content, and the model predicts it from the others.

Text: the pieces, by the language head (BERT, arXiv 1810.04805). Images, audio and series: the numbers of a token, by
a linear head and the squared error (SimMIM, arXiv 2111.09886), normalised in each token as in MAE (arXiv
2111.06377). Hidden tokens stay in the stream, each as its position and a learned vector of its modality. With
``decoder_layers`` they are left out of it, and a decoder of that many blocks predicts them from the trunk's output
(MAE; its blocks are of cross-attention alone, CrossMAE, arXiv 2401.14391). Several ``parts`` make one segment, in
which the modalities help each other (M3AE, arXiv 2205.14204); a part of which nothing is hidden is seen whole.

A loss is the mean over the hidden tokens of one modality in the step: of text nats, else the mean squared error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from mmmoe_pretrain import kinds
from mmmoe_pretrain.batch import IGNORE, Batch, Contents, LeftOut, Part, Sample, Segment
from mmmoe_pretrain.config.base import Head, ModalitySettings, ObjectiveSettings
from mmmoe_pretrain.objectives.base import Expected, Objective, ObjectiveModule, Outputs
from mmmoe_pretrain.parallel.groups import Groups

SMALLEST_STD = 1e-3  # of a token's content, in units of the embedder's input; of one colour, say


class MaskedSettings(ObjectiveSettings):
    """``hidden``: by modality, the share of its tokens that are hidden. ``parts``: the modalities of a segment in
    order (empty: those of ``hidden``). A sample that lacks one has no segment, or with ``missing: allow`` one without
    it. ``span``: by modality, consecutive tokens that are hidden together (default 1). ``weights``: of the losses, by
    modality (default 1). ``normalize``: contents have mean 0 and standard deviation 1 in each token. ``fraction``: of
    the samples that get such a segment, drawn at random. ``decoder_layers``: 0, or the blocks of a decoder of tokens
    that are not in the stream. ``head``: of the language head of hidden pieces, as of ``next_token``."""

    kind: Literal["masked"] = "masked"
    hidden: dict[str, Annotated[float, Field(gt=0, le=1)]] = Field(min_length=1)
    parts: tuple[str, ...] = ()
    missing: Literal["skip", "allow"] = "skip"
    span: dict[str, Annotated[int, Field(ge=1)]] = Field({})
    weights: dict[str, Annotated[float, Field(ge=0)]] = Field({})
    normalize: bool = True
    fraction: float = Field(1.0, gt=0, le=1)
    decoder_layers: int = Field(0, ge=0, le=32)
    head: Head = None

    @property
    def on(self) -> bool:
        """See ``ObjectiveSettings.on``; some modality must have a weight, too."""
        return super().on and any(self.weights.get(name, 1.0) for name in self.hidden)

    def of_every_sample(self) -> ObjectiveSettings:
        """See ``ObjectiveSettings.of_every_sample``."""
        return self.model_copy(update={"fraction": 1.0})

    @property
    def modalities(self) -> tuple[str, ...]:
        """Of a segment, in order."""
        return self.parts or tuple(self.hidden)

    def check_names(
        self, name: str, modalities: Mapping[str, ModalitySettings], representations: Mapping[str, tuple[str, ...]]
    ) -> None:
        """See ``ObjectiveSettings.check_names``; and hidden modalities are parts, of a kind that can be hidden."""
        where = f"objectives.{name}"
        if unknown := [part for part in self.modalities if part not in modalities]:
            raise ValueError(
                f"{where} names {', '.join(unknown)}, and the modalities are {', '.join(modalities)}; correct its "
                f"parts or hidden"
            )
        if len(set(self.parts)) < len(self.parts):
            raise ValueError(f"{where}.parts {list(self.parts)} names a modality twice; name each once")
        if absent := [part for part in self.hidden if part not in self.modalities]:
            raise ValueError(
                f"{where}.hidden names {', '.join(absent)}, and its parts are {', '.join(self.parts)}; add it there"
            )
        for key in ("span", "weights"):
            if more := [part for part in getattr(self, key) if part not in self.hidden]:
                raise ValueError(f"{where}.{key} names {', '.join(more)}, of which hidden has no share; give one")
        for part in self.hidden:
            if not kinds.MODALITIES.load(modalities[part].kind).hideable:
                raise ValueError(
                    f"{where}.hidden {part}: tokens of kind {modalities[part].kind} cannot be hidden; leave it out"
                )
            if self.decoder_layers and kinds.MODALITIES.load(modalities[part].kind).predictable:
                raise ValueError(
                    f"{where}.decoder_layers {self.decoder_layers} with hidden {part}: a decoder predicts numbers, "
                    f"and tokens of kind {modalities[part].kind} are pieces, which the language head predicts in the "
                    f"stream; hide {part} in another objective of kind masked, without a decoder"
                )


class Masked(Objective):
    """Its segments attend in both directions."""

    Settings = MaskedSettings

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        settings = self.settings
        self.decoder_layers = settings.decoder_layers
        self.hidden = () if self.decoder_layers else tuple(settings.hidden)
        pieces = [name for name in settings.hidden if self.modalities[name].predictable]
        self.predicts = bool(pieces)
        self.contents = {f"{self.name}/{name}": name for name in settings.hidden if name not in pieces}
        for name in settings.hidden:
            if self.decoder_layers and not self.modalities[name].fixed_places:
                raise ValueError(
                    f"objectives.{self.name}.decoder_layers {self.decoder_layers} with hidden {name}: a decoder "
                    f"knows the place of a token by its number, and values of {name} have places of their own; set "
                    f"modalities.{name}.aspect: square, or decoder_layers: 0"
                )
        ids = {name: number for number, name in enumerate(self.modalities)}
        self.pieces = {f"{self.name}/{name}": ids[name] for name in pieces}  # losses, with the modality's id

    def segments(self, sample: Sample, rng: np.random.Generator) -> Iterator[Segment]:
        """See ``Objective.segments``."""
        if rng.random() >= self.settings.fraction:
            return
        items = [i for i in map(sample.index, self.settings.modalities) if i is not None]
        if len(items) < len(self.settings.modalities) and self.settings.missing == "skip":
            return
        parts: list[Part] = []
        left_out: list[LeftOut] = []
        for number in items:
            hidden = self._hidden(sample, number, rng)
            if self.decoder_layers and hidden.any():
                left_out.append(self._left_out(sample, number, hidden))
                parts += self._visible(sample, number, hidden)
            else:
                parts.append(self._part(sample, number, hidden))
        if parts and (left_out or any(part.hidden is not None for part in parts)):
            yield Segment(self.name, tuple(parts), left_out=tuple(left_out))

    def _hidden(self, sample: Sample, number: int, rng: np.random.Generator) -> np.ndarray:
        """Which tokens of the item are hidden, bool."""
        item = sample.items[number]
        hidden = np.zeros(self.modalities[item.modality].num_tokens(item.value), dtype=bool)
        if item.modality in self.settings.hidden and item.loss:
            hidden[self._chosen(item.modality, item.value, rng)] = True
        return hidden

    def _left_out(self, sample: Sample, number: int, hidden: np.ndarray) -> LeftOut:
        item = sample.items[number]
        contents = self.modalities[item.modality].contents(item.value)
        return LeftOut(number, np.flatnonzero(hidden), contents[hidden])

    def _visible(self, sample: Sample, number: int, hidden: np.ndarray) -> list[Part]:
        """Runs of the tokens that are not hidden, in a view in which the others say nothing: a stem may look at its
        neighbours."""
        item = sample.items[number]
        view = self.modalities[item.modality].hide(item.value, hidden)
        ends = np.flatnonzero(np.diff(np.concatenate([[True], hidden, [True]]))).reshape(-1, 2).tolist()
        return [Part(number, start, stop, first_position=start, view=view) for start, stop in ends]

    def _part(self, sample: Sample, number: int, hidden: np.ndarray) -> Part:
        item = sample.items[number]
        modality, value, count = self.modalities[item.modality], item.value, len(hidden)
        if not hidden.any():
            return Part(number, 0, count)
        view = modality.hide(value, hidden)
        if modality.predictable:
            targets = np.where(hidden, modality.keys(value), IGNORE)
            return Part(number, 0, count, targets=targets, view=view, hidden=hidden)
        return Part(number, 0, count, view=view, hidden=hidden, contents=modality.contents(value)[hidden])

    def _chosen(self, name: str, value: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Numbers of the tokens to hide: the share of the setting in the mean over draws, one at least, in runs of
        ``span``. Of an item that is the segment's only part, a decoder sees one token at least."""
        candidates, span = self.modalities[name].may_hide(value), self.settings.span.get(name, 1)
        wanted = int(self.settings.hidden[name] * len(candidates) + rng.random())
        shift = int(rng.random() * span)
        runs = np.split(candidates, range(span - shift, len(candidates), span))
        order = np.concatenate([candidates[:0], *(runs[i] for i in rng.permutation(len(runs)))])
        alone = self.decoder_layers and len(self.settings.modalities) == 1
        most = self.modalities[name].num_tokens(value) - 1 if alone else len(order)
        return order[: min(max(1, wanted), most)]

    @property
    def predicted(self) -> tuple[str, ...]:
        return tuple(loss.removeprefix(f"{self.name}/") for loss in self.pieces)

    @property
    def losses(self) -> dict[str, float]:
        return {f"{self.name}/{name}": self.settings.weights.get(name, 1.0) for name in self.settings.hidden}

    def counts(self, batch: Batch) -> dict[str, int]:
        found = {loss: len(batch.contents[loss]) for loss in self.contents}
        if self.pieces:
            modality_ids = batch.modality_ids[batch.targets[self.name].rows]
            found |= {loss: int((modality_ids == number).sum()) for loss, number in self.pieces.items()}
        return found

    def module(self, embedding_size: int) -> ObjectiveModule:
        return _Errors(self)

    def needs(self) -> dict[str, set[str]]:
        every = set(self.settings.modalities)
        allow = self.settings.missing == "allow"
        return {f"{self.name} of {name}": {name} if allow else every for name in self.settings.hidden}

    def expected(self) -> list[Expected]:
        settings = self.settings
        sizes = {name: self.modalities[name].max_tokens for name in settings.modalities}
        tokens = {name: share * sizes[name] for name, share in settings.hidden.items()}
        targets = tuple((name, number) for name, number in tokens.items() if self.modalities[name].predictable)
        contents = sum(number * self.modalities[name].content_size for name, number in tokens.items())
        if self.decoder_layers:
            sizes = {name: max(1, round(size - tokens.get(name, 0))) for name, size in sizes.items()}
        left_out = tuple(tokens.values()) if self.decoder_layers else ()
        number = sum(number for _, number in targets)
        parts = tuple(sizes.items())
        return [Expected(settings.fraction, parts, number, 0, contents, left_out, targets)]

    def share(self, loss: str) -> float:
        return float(self.settings.fraction)

    def why_idle(self, loss: str, count: int, so_far: str) -> str:
        name = loss.removeprefix(f"{self.name}/")
        ways = " and ".join(sorted(self.needs()[f"{self.name} of {name}"]))
        return (
            f"objectives.{self.name} hid no token of {name} {so_far}: no sample drawn for it has {ways}. Give the "
            f"data such samples, or take {name} out of its hidden"
        )


class _Errors(ObjectiveModule):
    """Sums over the hidden tokens of each modality."""

    def __init__(self, objective: Masked) -> None:
        super().__init__()
        self.name, self.contents, self.pieces = objective.name, objective.contents, objective.pieces
        self.order, self.normalize = tuple(objective.losses), objective.settings.normalize

    def forward(self, outputs: Outputs, batch: Batch, groups: Groups) -> dict[str, Tensor]:
        sums = {
            loss: squared_errors(outputs.contents[loss], batch.contents[loss], self.normalize).sum()
            for loss in self.contents
        }
        if self.pieces:
            nll_N = outputs.token_nll[self.name]
            modality_ids_N = batch.modality_ids.index_select(0, batch.targets[self.name].rows)
            sums |= {loss: (nll_N * (modality_ids_N == number)).sum() for loss, number in self.pieces.items()}
        return {loss: sums[loss] for loss in self.order}


def squared_errors(predicted_NC: Tensor, contents: Contents, normalize: bool) -> Tensor:
    """[N]: the mean squared error over the measured numbers of each token."""
    measured_NC = ~contents.values.isnan()
    count_N1 = measured_NC.sum(1, keepdim=True).clamp(min=1)
    values_NC = contents.values.nan_to_num(0.0)
    if normalize:
        mean_N1 = values_NC.sum(1, keepdim=True) / count_N1
        deviation_NC = (values_NC - mean_N1) * measured_NC
        std_N1 = (deviation_NC.square().sum(1, keepdim=True) / count_N1).sqrt()
        values_NC = deviation_NC / std_N1.clamp(min=SMALLEST_STD)
    errors_NC = torch.where(measured_NC, predicted_NC - values_NC, 0.0)
    return errors_NC.square().sum(1) / count_N1.squeeze(1)
