"""How the nodes' decisions are carried out."""

from types import SimpleNamespace
from typing import Any

import pytest

from services.trainer.nodes.runner import ActionRunner
from services.trainer.publication.losses import Losses
from services.trainer.publication.publishing import Evaluate

LOSSES = Losses(held_out=0.5, num_held_out=1)


class Guarded:
    """Node 0 has trained up to version 5 and serves `published`; its newest batch had a loss of 2."""

    def __init__(self, published: int) -> None:
        self.node, self.version, self.life = 0, 5, SimpleNamespace(fence=1)
        limits = SimpleNamespace(rise=lambda held_out: 1.0)
        publishing = SimpleNamespace(published=published, why_withheld=lambda version: "", limits=limits)
        self.work = SimpleNamespace(publishing=publishing)
        self.verdicts: list[Any] = []
        self.actions = ActionRunner(
            orders=SimpleNamespace(),  # type: ignore[arg-type]
            fates=SimpleNamespace(  # type: ignore[arg-type]
                progress=SimpleNamespace(training_losses={0: 2.0}),
                changed=SimpleNamespace(set=lambda: None),
            ),
            checkpointing=SimpleNamespace(),  # type: ignore[arg-type]
            rollbacks=SimpleNamespace(),  # type: ignore[arg-type]
            evaluator=SimpleNamespace(begin=lambda node, version, tell: tell(LOSSES)),  # type: ignore[arg-type]
            verdicts=SimpleNamespace(add=lambda node, verdict: self.verdicts.append(verdict)),  # type: ignore[arg-type]
            sharing=None,
            tasks=SimpleNamespace(),  # type: ignore[arg-type]
        )

    def in_life(self, fence: int, decide: Any) -> list[Any]:
        return []


@pytest.mark.parametrize(("version", "expected"), [(5, 2.0), (3, None)])
def test_only_the_newest_version_was_made_by_the_newest_batch(version: int, expected: float | None) -> None:
    guarded = Guarded(published=version)
    guarded.actions.run(guarded, [Evaluate(version)])  # type: ignore[arg-type]
    (verdict,) = guarded.verdicts
    assert (verdict.version, verdict.training_loss) == (version, expected)
