"""Devices whose ops take longer or shorter than their profile says, drawn from a seed."""

import random
from dataclasses import dataclass

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
    """The noise of all devices of a run."""

    sigma: float
    seed: int

    def on(self, times: StageTimes, node: int, stage: int) -> StageTimes:
        """The times of one device with noise of its own; without any where sigma is 0."""
        rng = random.Random(f"device {self.seed} {node} {stage}")
        return NoisyTimes(times, self.sigma, rng) if self.sigma else times
