"""Groups of experts by modality (MoMa, arXiv 2407.21770), and how many experts a group has whose size is ``auto``: in
proportion to the tokens of its modalities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PlainSerializer

from mmmoe_pretrain.config.base import StrictModel

AUTO = 0  # a size that follows the tokens


def _size(value: Any) -> Any:
    if isinstance(value, int) and value < 1:
        raise ValueError(
            f"num_experts {value}: a group has at least 1 expert; write auto for a size that follows the tokens"
        )
    return AUTO if value == "auto" else value


def _written(size: int) -> int | str:
    return "auto" if size == AUTO else size


Size = Annotated[int, BeforeValidator(_size), PlainSerializer(_written)]


class ExpertGroupConfig(StrictModel):
    """A group of experts for the tokens of ``modalities`` only; None: of all.

    ``num_experts`` auto: as a new run starts it counts the tokens of its data, and its saved config has the number.
    ``expert_hidden_size`` None takes that of the MoE layer.
    """

    modalities: tuple[str, ...] | None = None
    num_experts: Size
    expert_hidden_size: int | None = Field(None, ge=1)

    @property
    def auto(self) -> bool:
        """Its size follows the tokens, and is not known yet."""
        return self.num_experts == AUTO

    def serves(self, modality: str) -> bool:
        return self.modalities is None or modality in self.modalities


def sized(
    groups: Sequence[ExpertGroupConfig],
    num_experts: int,
    multiple: int,
    least: int,
    tokens: Mapping[str, float] | None = None,
) -> tuple[ExpertGroupConfig, ...]:
    """``groups`` with numbers in place of ``auto``: of the experts that the others leave, multiples of ``multiple``
    in proportion to the ``tokens`` of each group's modalities, and ``least`` at least. Tokens of a modality that
    several such groups serve are divided by their number. None: equally many. Raises ValueError where there are too
    few."""
    open_groups = [group for group in groups if group.auto]
    if not open_groups:
        return tuple(groups)
    left = num_experts - sum(group.num_experts for group in groups)
    units, smallest = left // multiple, -(-least // multiple)
    if left % multiple or units < smallest * len(open_groups):
        raise ValueError(
            f"moe.expert_groups leave {left} of moe.num_experts {num_experts} experts to {len(open_groups)} groups "
            f"whose num_experts is auto, each of which gets a multiple of moe.group_multiple {multiple}, "
            f"{smallest * multiple} at least; change num_experts"
        )
    wanted = [_tokens_of(group, open_groups, tokens) for group in open_groups]
    sizes = iter(_apportioned(wanted, units, smallest))
    return tuple(
        group.model_copy(update={"num_experts": next(sizes) * multiple}) if group.auto else group for group in groups
    )


def _tokens_of(
    group: ExpertGroupConfig, open_groups: Sequence[ExpertGroupConfig], tokens: Mapping[str, float] | None
) -> float:
    if tokens is None:
        return 1.0
    served = {name: sum(other.serves(name) for other in open_groups) for name in tokens if group.serves(name)}
    return sum(tokens[name] / groups for name, groups in served.items())


def _apportioned(wanted: Sequence[float], units: int, smallest: int) -> list[int]:
    """By Webster's method from ``smallest`` on: each further unit goes where it is most wanted."""
    found = [smallest] * len(wanted)
    for _ in range(units - sum(found)):
        found[max(range(len(wanted)), key=lambda i: wanted[i] / (found[i] + 0.5))] += 1
    return found
