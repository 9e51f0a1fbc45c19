"""Configuration of DeepSpeed, precision and compilation."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from mimray.trainers.config.base import Config


class EngineConfig(Config):
    """DeepSpeed: ZeRO stage, precision, offload, micro batches and raw configuration."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    precision: Literal["auto", "fp32", "bf16", "bf16_weights", "fp16"] = Field(
        default="auto",
        description="auto: bf16 where the device computes in it, else fp32; bf16: fp32 weights "
        "under autocast; bf16_weights, fp16: 16-bit weights beside fp32 masters",
    )
    offload: Literal["none", "optimizer", "all"] = Field(
        default="none",
        description="held in the host's memory: optimizer, masters and moments (ZeRO 1 to 3); "
        "all, the weights too (ZeRO 3)",
    )
    micro_batch_size: PositiveInt | None = Field(
        default=None,
        description="pictures a worker holds at once; the rest of the global batch is accumulated",
    )
    activation_checkpointing: bool = False
    compile: bool = Field(
        default=False,
        description="have torch compile the blocks of encoder and decoder, at ZeRO 0 to 2",
    )
    deepspeed: dict[str, Any] = Field(
        default_factory=dict, description="raw DeepSpeed configuration that no other key covers"
    )

    @model_validator(mode="after")
    def _check_compile(self) -> Self:
        if self.compile and self.zero_stage == 3:
            raise ValueError(
                "engine.compile goes with engine.zero_stage 0 to 2: stage 3 gathers the weights of "
                "each layer as it is called, which no compiled block can hold"
            )
        return self
