"""The settings of the multimodal variational autoencoder (multimodal_vae.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from mmmoe_pretrain import kinds
from mmmoe_pretrain.config.base import ModalitySettings, Names
from mmmoe_pretrain.config.schedule import Weight, check_schedule, schedule_of
from mmmoe_pretrain.objectives.pooled import PooledSettings

PRODUCT, PRODUCTS = "product", "mixture_of_products"
MOST_OF_PRODUCTS = 5  # modalities: 31 subsets
Positive = Annotated[float, Field(gt=0)]
FieldValues = Annotated[dict[str, Annotated[tuple[str, ...], Field(min_length=1)]], Field(min_length=1, max_length=1)]


class MultimodalVAESettings(PooledSettings):
    """``modalities``: that are generated, and that give posteriors. ``subsets``: random ones of them in training, of
    joint: product (none: 1). ``latent_size``: shared latent numbers; ``private``: by modality, those of its own.
    ``hidden_size`` of encoder heads and decoders; ``decoder_layers``: blocks of a decoder. ``beta``: a number or a
    schedule. ``weights``: of the log-likelihoods, by modality (default 1). ``deviations``: by modality of numbers,
    the standard deviation of its likelihood (default: learned). ``condition``: a representation, or a field of the
    samples with its values, ``{language: [en, de]}``."""

    kind: Literal["multimodal_vae"] = "multimodal_vae"
    modalities: Names = Field(min_length=1)
    joint: Literal["product", "mixture", "mixture_of_products"] = "product"
    subsets: int | None = Field(None, ge=0, le=16)
    latent_size: int = Field(32, ge=1, le=4096)
    private: dict[str, Annotated[int, Field(ge=1, le=4096)]] = Field({})
    hidden_size: int = Field(128, ge=1)
    decoder_layers: int = Field(2, ge=0, le=32)
    beta: Weight = 1.0
    total_correlation: float = Field(0.0, ge=0)
    weights: dict[str, Annotated[float, Field(ge=0)]] = Field({})
    deviations: dict[str, Positive] = Field({})
    condition: str | FieldValues | None = None

    @model_validator(mode="after")
    def _suits_joint(self) -> Self:
        check_schedule(schedule_of(self.beta), "beta")
        if self.joint != PRODUCT and self.subsets is not None:
            raise ValueError(
                f"subsets {self.subsets} with joint {self.joint}: random subsets are of joint: {PRODUCT}, and a "
                f"mixture has all of its components in each step; leave subsets out"
            )
        if self.joint == PRODUCTS and len(self.modalities) > MOST_OF_PRODUCTS:
            raise ValueError(
                f"joint {PRODUCTS} of {len(self.modalities)} modalities has {2 ** len(self.modalities) - 1} products "
                f"that each step decodes; name at most {MOST_OF_PRODUCTS}, or choose joint: mixture or {PRODUCT}"
            )
        return self

    @property
    def below_zero(self) -> bool:
        """See ``ObjectiveSettings.below_zero``."""
        return True

    @property
    def random_subsets(self) -> int:
        """Of each sample, in training."""
        return (1 if self.subsets is None else self.subsets) if self.joint == PRODUCT else 0

    @property
    def representation(self) -> str | None:
        """Of the condition."""
        return self.condition if isinstance(self.condition, str) else None

    @property
    def field(self) -> tuple[str, tuple[str, ...]] | None:
        """Of the condition, with its values."""
        return next(iter(self.condition.items())) if isinstance(self.condition, dict) else None

    @property
    def named(self) -> tuple[str, ...]:
        """See ``PooledSettings.named``."""
        return (*self.modalities, *([self.representation] if self.representation else []))

    def check_names(
        self, name: str, modalities: Mapping[str, ModalitySettings], representations: Mapping[str, tuple[str, ...]]
    ) -> None:
        """See ``ObjectiveSettings.check_names``; and modalities have contents, and are not their own condition."""
        where = f"objectives.{name}"
        if unknown := [one for one in self.modalities if one not in modalities]:
            known = kinds.nearest(unknown[0], modalities, "there are")
            raise ValueError(f"{where}.modalities {unknown[0]}: there is no such modality; {known}")
        if len(set(self.modalities)) < len(self.modalities):
            raise ValueError(f"{where}.modalities {list(self.modalities)} names one twice; name each once")
        discrete = set()
        for one in self.modalities:
            kind = kinds.MODALITIES.load(modalities[one].kind)
            if not kind.hideable:
                raise ValueError(f"{where}.modalities {one}: kind {modalities[one].kind} has no contents to generate")
            discrete |= {one} if kind.predictable else set()
        for key in ("private", "weights", "deviations"):
            if more := [one for one in getattr(self, key) if one not in self.modalities]:
                raise ValueError(
                    f"{where}.{key} names {', '.join(more)}, which is not generated; its modalities are "
                    f"{', '.join(self.modalities)}"
                )
        if more := [one for one in self.deviations if one in discrete]:
            raise ValueError(
                f"{where}.deviations {', '.join(more)}: its tokens are discrete, and their likelihood is a "
                f"distribution over the vocabulary; leave it out"
            )
        self._check_condition(where, representations)

    def _check_condition(self, where: str, representations: Mapping[str, tuple[str, ...]]) -> None:
        if self.field and len(set(self.field[1])) < len(self.field[1]):
            raise ValueError(f"{where}.condition {self.field[0]} names a value twice; name each once")
        if self.representation is None:
            return
        if self.representation not in representations:
            known = kinds.nearest(self.representation, representations, "there are")
            raise ValueError(f"{where}.condition {self.representation}: there is no such representation; {known}")
        if both := sorted({*representations[self.representation]} & {*self.modalities}):
            raise ValueError(
                f"{where}.condition {self.representation} holds {', '.join(both)}, which is generated (modalities): "
                f"the answer would be in the question; take it out of one of them"
            )
