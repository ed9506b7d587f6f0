"""The section ``evaluate``: held-out shards and how they are scored, during training and by ``mmmoe evaluate``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from mmmoe_pretrain.config.base import Names, PathText, SourceText, StrictModel, listed

HELD_OUT = "held_out/"  # names of held-out losses and scores begin so


Paths = Annotated[tuple[SourceText, ...], BeforeValidator(listed)]


class ImputeConfig(StrictModel):
    """``observed``: the representations that a sample still has (a modality is one). ``neighbours``: how many
    training samples that are near in them give the missing one; 0: none do."""

    observed: Names = Field(min_length=1)
    neighbours: int = Field(10, ge=0, le=1000)


class GenerateConfig(StrictModel):
    """How values are generated token by token. ``greedy``: the most probable token; ``sample``: drawn from the
    ``top_k`` most probable (0: all) and of these from the fewest that have ``top_p`` of the probability, after
    division of logits by ``temperature``; ``beam``: the best of ``beams`` by log probability / tokens **
    ``length_penalty``. Draws are a function of ``seed``, the key of the sample and the number of the token.

    ``modality``: what is generated; empty: the last that the task predicts. ``max_tokens``: at most so many, beside
    the marks (0: as many as the modality has). ``prompt_tokens``: that many of a held-out value are given.
    ``samples``: of the held-out ones, spread evenly (0: all). ``judge``: of what is no text, the folder of a run that
    scores it, since it compares such values with what they are generated from.
    """

    method: Literal["greedy", "sample", "beam"] = "greedy"
    temperature: float = Field(1.0, gt=0, le=100)
    top_k: int = Field(0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int = Field(0, ge=0, lt=1 << 63)
    beams: int = Field(4, ge=1, le=64)
    length_penalty: float = Field(1.0, ge=0, le=10)
    modality: str = ""
    max_tokens: int = Field(0, ge=0)
    prompt_tokens: int = Field(0, ge=0)
    samples: int = Field(0, ge=0)
    judge: PathText = ""

    @model_validator(mode="after")
    def _of_its_method(self) -> GenerateConfig:
        own = {"temperature": "sample", "top_k": "sample", "top_p": "sample", "seed": "sample", "beams": "beam",
               "length_penalty": "beam"}  # fmt: skip
        for name, method in own.items():
            default = type(self).model_fields[name].default  # all are in a config that was saved
            if method != self.method and getattr(self, name) != default:
                raise ValueError(f"{name} is of method {method}, and this is {self.method}; give method: {method}")
        return self


class LatentsConfig(StrictModel):
    """``draws``: of each bound of a likelihood. ``rows``: held-out rows that are scored, spread evenly."""

    draws: int = Field(16, ge=1, le=10_000)
    rows: int = Field(1024, ge=1)


class EvaluateConfig(StrictModel):
    """Held-out shards, how a class name becomes a text, and which rows make which score, by fields of their JSON.

    ``validation``: shards that training is scored on every ``every`` steps, of which ``samples`` are taken, spread
    evenly; ``test``: those of ``mmmoe evaluate``.

    ``pairs``: pairs ``a-b`` of representations that are compared although no objective does, as both are in the space
    of one that does.

    ``rows``: by pair ``a-b`` of representations, the values that a row of its scores has in each field. ``by``: by
    representation, a field that splits its rows: each value is scored by itself and under its own name. ``within``: a
    field that splits the candidates: scores are averaged over its values with ``min_items`` distinct items.

    ``impute``: by representation, how `mmmoe evaluate` scores it where a modality is missing. Objectives of kind
    ``completion`` are scored without it, too.

    ``generate``: by task, how `mmmoe evaluate` generates the texts of held-out samples and compares them with their
    own.
    ``latents``: how `mmmoe evaluate` scores objectives that generate modalities from latent numbers.
    """

    test: Paths = ()
    validation: Paths = ()
    every: int = Field(0, ge=0)  # steps between scores of the validation shards in training; 0: never
    samples: int = Field(1024, ge=1)  # of the validation shards, or all where they hold fewer
    prompt: str = "{}"  # {} is the name of the class
    pairs: tuple[str, ...] = ()
    rows: dict[str, dict[str, tuple[str, ...]]] = Field({})
    by: dict[str, str] = Field({})
    within: str = ""
    min_items: int = Field(50, ge=1)
    cca: bool = False  # retrieval also after linear CCA of training samples
    impute: dict[str, ImputeConfig] = Field({})
    generate: dict[str, GenerateConfig] = Field({})
    latents: LatentsConfig = LatentsConfig()
    subsets: bool = False  # retrieval also by fused representations without some of their parts
    keep_seen_texts: bool = False  # score rows whose texts are trained on, too: where a text is a class

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
