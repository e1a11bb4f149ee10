"""Devices whose ops take longer or shorter than their profile says, drawn from a seed."""

import random
from dataclasses import dataclass

from lemix.simulation.device_bias import BiasedTimes
from shared.profiles.times import StageTimes, Work


@dataclass(frozen=True, slots=True)
class NoisyTimes:
    """Implements `StageTimes`: `times`, each multiplied by a number of its own.

    The numbers are lognormal, with mean 1.
    """

    times: StageTimes
    sigma: float
    """Standard deviation of the numbers' logarithm: for small ones, the share by which times spread."""
    rng: random.Random

    def iteration_s(self, work: Work) -> float:
        return self._drawn() * self.times.iteration_s(work)

    def forward_s(self, work: Work) -> float:
        return self._drawn() * self.times.forward_s(work)

    def backward_s(self, work: Work) -> float:
        return self._drawn() * self.times.backward_s(work)

    def step_s(self) -> float:
        return self._drawn() * self.times.step_s()

    def _drawn(self) -> float:
        return self.rng.lognormvariate(-(self.sigma**2) / 2, self.sigma)


@dataclass(frozen=True, slots=True)
class DeviceNoise:
    """How far the devices of a run are off their profile."""

    noise: float
    """See `NoisyTimes.sigma`; each device has noise of its own. 0: none."""
    bias: float
    """See `BiasedTimes.sigma`; the same stage has the same table on each node. 0: none."""
    seed: int

    def on(self, times: StageTimes, node: int, stage: int) -> StageTimes:
        """The times of one device."""
        if self.bias:
            times = BiasedTimes(times, self.bias, f"bias {self.seed} {stage}")
        rng = random.Random(f"device {self.seed} {node} {stage}")
        return NoisyTimes(times, self.noise, rng) if self.noise else times
