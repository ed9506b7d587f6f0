"""The section ``model``: the sizes of the trunk. Its MoE layers are in ``moe.py``."""

from __future__ import annotations

from pydantic import Field, model_validator

from mmmoe_pretrain.config.base import StrictModel


class ModelConfig(StrictModel):
    hidden_size: int = Field(128, ge=8)
    num_layers: int = Field(4, ge=1, le=10_000)  # checks go through them all
    num_heads: int = Field(4, ge=1)
    num_kv_heads: int | None = Field(None, ge=1)  # of keys and values, each for a group of queries; None: num_heads
    ffn_hidden_size: int = Field(256, ge=1)  # of the dense blocks
    embedding_size: int = Field(128, ge=2)  # of the joint space of the contrastive objective
    rotary_base: float = Field(10_000.0, gt=1)
    vocab_size: int = Field(0, ge=0, le=1 << 24)  # of data.tokenizer; filled in when the run starts

    @model_validator(mode="after")
    def _heads(self) -> ModelConfig:
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"model.hidden_size {self.hidden_size} does not split into {self.num_heads} "
                f"heads of even width (rotary positions need pairs); use a multiple of "
                f"{2 * self.num_heads}"
            )
        if self.num_heads % self.kv_heads:
            divisors = [n for n in range(1, self.num_heads + 1) if self.num_heads % n == 0]
            raise ValueError(
                f"model.num_kv_heads {self.kv_heads} does not divide model.num_heads {self.num_heads}, so that heads "
                f"of queries could not share those of keys and values evenly; use one of {divisors}"
            )
        return self

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads
