"""The section ``evaluate``: held-out shards and how they are scored, during training and by ``mmmoe evaluate``."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from mmmoe_pretrain.config.base import SourceText, StrictModel

HELD_OUT = "held_out/"  # names of held-out losses and scores begin so


def _paths(values: Any) -> Any:
    """A path alone is a list of it."""
    return [values] if isinstance(values, str) else values


Paths = Annotated[tuple[SourceText, ...], BeforeValidator(_paths)]


class EvaluateConfig(StrictModel):
    """Held-out shards, how a class name becomes a text, and which rows make which score, by fields of their JSON.

    ``validation``: shards that training is scored on every ``every`` steps, of which ``samples`` are taken, spread
    evenly; ``test``: those of ``mmmoe evaluate``.

    ``rows``: by pair ``a-b`` of representations, the values that a row of its scores has in each field. ``by``: by
    representation, a field that splits its rows: each value is scored by itself and under its own name. ``within``: a
    field that splits the candidates: scores are averaged over its values with ``min_items`` distinct items.
    """

    test: Paths = ()
    validation: Paths = ()
    every: int = Field(0, ge=0)  # steps between scores of the validation shards in training; 0: never
    samples: int = Field(1024, ge=1)  # of the validation shards, or all where they hold fewer
    prompt: str = "{}"  # {} is the name of the class
    rows: dict[str, dict[str, tuple[str, ...]]] = Field({})
    by: dict[str, str] = Field({})
    within: str = ""
    min_items: int = Field(50, ge=1)
    cca: bool = False  # retrieval also after linear CCA of training samples
    subsets: bool = False  # retrieval also by fused representations without some of their parts
    keep_seen_texts: bool = False  # score rows whose text is trained on, too: where a text is a class

    @model_validator(mode="after")
    def _prompt(self) -> EvaluateConfig:
        if self.every and not self.validation:
            raise ValueError(
                f"evaluate.every {self.every} scores held-out samples in training, and evaluate.validation names "
                f"none; name shards that are not trained on (mmmoe-data shard --ratio makes them), or set every: 0"
            )
        for key, places in {"test": self.test, "validation": self.validation}.items():
            if commands := [path for path in places if path.startswith("pipe:") or "::pipe:" in path]:
                raise ValueError(
                    f"evaluate.{key} names the output of a command ({commands[0].split()[0]} ...), and held-out "
                    f"samples are read by number; name shards by a path or URL"
                )
        around = self.prompt.replace("{}", "", 1)
        if "{}" not in self.prompt or "{" in around or "}" in around:
            raise ValueError(f"evaluate.prompt {self.prompt!r} must hold {{}} once; e.g. 'an image of {{}}'")
        return self
