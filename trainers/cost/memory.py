"""Memory of a device under DeepSpeed: states by ZeRO stage, and the peak of a step.

Derived from the code of DeepSpeed 0.19.8; the tests compare it with measurements.
"""

from __future__ import annotations

from dataclasses import dataclass

from mimray.trainers.cost.step import Step

# Elements; DeepSpeed's defaults.
REDUCE_BUCKET = 500_000_000
PREFETCH_BUCKET = 50_000_000
MOST_GATHERED = 1_000_000_000
KEPT_WHOLE = 100_000  # stage 3 leaves smaller parameters on every device

FP32_BYTES = 4
MOMENTS_BYTES = 8  # AdamW's two, in fp32


@dataclass(frozen=True)
class Weights:
    """Sizes of a method's parameters and buffers.

    Attributes:
        trained: elements that the optimiser updates.
        frozen: elements that it does not update.
        small: elements of parameters that ZeRO 3 does not split.
        fixed_bytes: bytes of buffers, and of networks that the method calls but does not own.
    """

    trained: int
    frozen: int
    small: int
    fixed_bytes: int


@dataclass(frozen=True)
class Setting:
    """ZeRO stage, precision and number of devices that the states are spread over.

    Attributes:
        zero_stage: ZeRO stage, 0 to 3.
        num_workers: number of devices.
        element_bytes: bytes of a weight and of its gradient.
        accumulation: micro batches per update.
        reduce_bucket: elements of DeepSpeed's bucket for gradients.
        on_gpu: True if a bucket takes all its memory at once, as on a GPU; on a CPU it takes it as
            it fills.
        offload: none, optimizer or all, what is held in the host's memory; only at a stage that
            can. On a CPU it lies beside the rest.
    """

    zero_stage: int
    num_workers: int
    element_bytes: int
    accumulation: int = 1
    reduce_bucket: int = REDUCE_BUCKET
    on_gpu: bool = True
    offload: str = "none"


@dataclass(frozen=True)
class Memory:
    """Bytes on one device. Not all of it is held at once; `peak` is the largest sum that is.

    Attributes:
        parameters: parameters, buffers and networks beside the method.
        optimizer: fp32 masters and both moments.
        gradients: gradients held between two micro batches.
        communication: buckets, and with ZeRO 3 the parameters gathered from other devices.
        activations: activations of the micro batch, temporaries of operations included, and
            weights cast by autocast.
        backward: peak until the last gradient is there.
        reduction: peak while gradients are summed over devices.
        update: peak while the optimiser works.
        host: bytes offloaded to the host, per worker; in no other figure.
    """

    parameters: int
    optimizer: int
    gradients: int
    communication: int
    activations: int
    backward: int
    reduction: int
    update: int
    host: int = 0

    @property
    def peak(self) -> int:
        """The largest number of bytes held at once."""
        return max(self.backward, self.reduction, self.update)


def memory_of(weights: Weights, step: Step, setting: Setting) -> Memory:
    """Memory of one device at a step.

    Args:
        weights: sizes of the method's parameters and buffers.
        step: activations and gradients of a micro batch.
        setting: ZeRO stage, workers and precision.
    """
    stages = (_whole, _optimizer_split, _gradients_split, _all_split)
    return stages[setting.zero_stage](weights, step, setting)


def _whole(weights: Weights, step: Step, setting: Setting) -> Memory:
    """Stage 0: every device holds all states; fp32 parameters are their own masters."""
    size = setting.element_bytes
    masters = 0 if size == FP32_BYTES else weights.trained * FP32_BYTES
    parameters = (weights.trained + weights.frozen) * size + weights.fixed_bytes
    optimizer = masters + weights.trained * MOMENTS_BYTES
    gradients = weights.trained * size
    flattened = min(weights.trained, REDUCE_BUCKET) * size
    states = parameters + optimizer
    return Memory(
        parameters=parameters,
        optimizer=optimizer,
        gradients=gradients,
        communication=flattened,
        activations=step.activations,
        backward=states + _with_gradients(step, setting, gradients),
        reduction=states + gradients + flattened,
        update=states + gradients + masters,  # gradients in fp32 take as much as the masters
    )


def _optimizer_split(weights: Weights, step: Step, setting: Setting) -> Memory:
    """Stage 1: whole gradients, copied into a bucket after the last of them is computed."""
    s = _Split(weights, setting)
    parameters = (weights.trained + weights.frozen) * setting.element_bytes + weights.fixed_bytes
    states = parameters + s.optimizer
    taken = s.bucket if setting.on_gpu else 0
    return Memory(
        parameters=parameters,
        optimizer=s.optimizer,
        gradients=s.gradients,
        communication=s.bucket,
        activations=step.activations,
        backward=states + taken + _with_gradients(step, setting, s.gradients),
        reduction=states + s.bucket - s.filled + s.gradients + max(s.filled, s.share),
        update=states + s.update,
        host=s.host,
    )


def _gradients_split(weights: Weights, step: Step, setting: Setting) -> Memory:
    """Stage 2: gradients go into a bucket as they are computed, from a full one to their owners."""
    s = _Split(weights, setting)
    parameters = (weights.trained + weights.frozen) * setting.element_bytes + weights.fixed_bytes
    states = parameters + s.optimizer
    kept = s.share if setting.accumulation > 1 else 0  # of earlier micro batches
    owned = s.share if s.filled < s.gradients else 0  # of buckets that fill before the end
    backward = step.activations + s.bucket + owned
    if not setting.on_gpu:
        backward = min(backward, step.with_gradients)
    return Memory(
        parameters=parameters,
        optimizer=s.optimizer,
        gradients=s.share,
        communication=s.bucket,
        activations=step.activations,
        backward=states + kept + backward,
        reduction=states + kept + s.bucket + s.filled + (s.gradients - s.filled) // s.n,
        update=states + s.update,
        host=s.host,
    )


def _all_split(weights: Weights, step: Step, setting: Setting) -> Memory:
    """Stage 3: parameters are split too; gathered, they stay until the step's last use of them."""
    s, size = _Split(weights, setting), setting.element_bytes
    every = weights.trained + weights.frozen
    weights_away = setting.offload == "all" and setting.on_gpu
    alone = s.n == 1 and not weights_away
    small = 0 if alone else weights.small * size
    gathered = 0 if alone else min(every - weights.small, MOST_GATHERED) * size
    in_flight = min(gathered, PREFETCH_BUCKET * size)
    flattened = s.filled if setting.on_gpu else 2 * s.filled  # gloo scatters out of a copy
    # At the very end of a step no parameter is gathered any more; a bucket may be full earlier,
    # and every micro batch but the last ends earlier.
    at_the_end = s.filled == s.gradients and setting.accumulation == 1
    shards = every * size // s.n
    parameters = (0 if weights_away else shards) + small + weights.fixed_bytes
    # The bucket and the owned gradients are never freed.
    states = parameters + s.optimizer + s.bucket + s.share
    return Memory(
        parameters=parameters,
        optimizer=s.optimizer,
        gradients=s.share,
        communication=s.bucket + gathered,
        activations=step.activations,
        backward=states + gathered + max(step.activations, in_flight),
        reduction=states + (0 if at_the_end else gathered) + flattened,
        update=states + s.update - s.share,
        host=s.host + (shards if weights_away else 0),
    )


class _Split:
    """Bytes common to stages 1 to 3, which keep fp32 masters even of fp32 parameters.

    Attributes:
        n: number of devices.
        optimizer: masters and moments of this device's share.
        gradients: all gradients.
        share: gradients that this device owns.
        bucket: the bucket for gradients.
        filled: the part of the bucket that gradients are written to.
        update: owned gradients, their flat copy and, in lower precisions, their fp32 copy.
        host: states in the host's memory; none on a CPU, whose memory it is anyway.
    """

    def __init__(self, weights: Weights, setting: Setting) -> None:
        size, trained, self.n = setting.element_bytes, weights.trained, setting.num_workers
        self.optimizer = trained * (FP32_BYTES + MOMENTS_BYTES) // self.n
        self.gradients = trained * size
        self.share = self.gradients // self.n
        self.filled = min(setting.reduce_bucket, trained) * size
        self.bucket = setting.reduce_bucket * size if setting.on_gpu else self.filled
        in_fp32 = 0 if size == FP32_BYTES else trained * FP32_BYTES // self.n
        self.update = 2 * self.share + in_fp32
        self.host = 0
        if setting.offload != "none":
            # With the gradients in fp32, and the updated weights on their way back.
            self.optimizer += trained * (FP32_BYTES + size) // self.n
            if setting.on_gpu:
                self.host, self.optimizer = self.optimizer, 0
                self.share = self.update = 0


def _with_gradients(step: Step, setting: Setting, gradients: int) -> int:
    """Peak of activations and gradients in the backward pass.

    Activations are freed as gradients are allocated, unless an earlier micro batch's gradients
    are held already.
    """
    accumulating = setting.accumulation > 1
    return step.activations + gradients if accumulating else step.with_gradients
