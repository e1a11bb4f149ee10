"""The profile that `lemix profile` would measure on a stage that obeys its roofline exactly."""

from collections.abc import Iterator

from shared.profiles.fit import MAX_TABLE
from shared.profiles.records import ProfilePoint, StageMemory, StageProfile
from shared.profiles.roofline import TRAINED_BYTES, USABLE_MEMORY, WEIGHT_BYTES, Roofline
from shared.profiles.times import Work, work_of_rows

STEPS_PER_DOUBLING = 8
"""Points per doubling of the tokens: a kink of the roofline between two is off by 2 % at most."""
DECODING_SEQUENCES = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256)
DECODING_CONTEXTS = (1, 128, 512)
"""Positions that each sequence of a decoding iteration attends to; the whole context too."""
WHOLE_SEQUENCES = (2, 8, 32)
"""Sequences of one prefill or one microbatch, beside 1."""


def computed_stage(times: Roofline) -> StageProfile:
    """Points over tokens, context and sequences, as whole sequences and as decoding."""
    weights_bytes = WEIGHT_BYTES * times.num_params
    return StageProfile(
        points=tuple(_computed_points(times)),
        step_s=times.step_s(),
        num_layers=times.layers.num_layers,
        memory=StageMemory(
            weights_bytes=weights_bytes,
            training_bytes=TRAINED_BYTES * times.num_params - weights_bytes,
            kv_bytes_per_token=times.kv_bytes_per_token,
            activation_bytes_per_token=times.activation_bytes_per_token,
            capacity_bytes=int(USABLE_MEMORY * times.device.memory_bytes),
            host_bytes_per_s=times.device.host_bytes_per_s,
        ),
    )


def _computed_points(times: Roofline) -> Iterator[ProfilePoint]:
    for work in _decoding(times.model.context_length):
        yield ProfilePoint.of("iteration", work, times.iteration_s(work))
    for work in _whole_sequences(times.model.context_length):
        yield ProfilePoint.of("iteration", work, times.iteration_s(work))
        if times.layers.is_last:
            yield ProfilePoint.of("forward", work, times.forward_s(work) + times.backward_s(work))
        else:
            yield ProfilePoint.of("forward", work, times.forward_s(work))
            yield ProfilePoint.of("backward", work, times.backward_s(work))


def _decoding(context_length: int) -> Iterator[Work]:
    for num_sequences in DECODING_SEQUENCES:
        for context in (*DECODING_CONTEXTS, context_length):
            yield work_of_rows(context - 1, 1) * num_sequences


def _whole_sequences(context_length: int) -> Iterator[Work]:
    """One of each length, and several of which each has a number of tokens that is in the table too."""
    lengths = _token_counts(context_length)
    for length in lengths:
        yield work_of_rows(0, length)
    for num_sequences in WHOLE_SEQUENCES:
        for length in lengths[::STEPS_PER_DOUBLING]:
            if num_sequences * length > MAX_TABLE:
                break
            yield work_of_rows(0, length) * num_sequences


def _token_counts(limit: int) -> list[int]:
    num_steps = limit.bit_length() * STEPS_PER_DOUBLING
    counts = {round(2 ** (step / STEPS_PER_DOUBLING)) for step in range(num_steps)}
    return sorted(count for count in counts if count <= limit)
