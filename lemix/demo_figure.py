"""The picture of a demo: the loss falls above, the requests are answered below, on one time axis."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lemix.demo_record import DemoRecord
from lemix.load import Outcome

# From the palette of Okabe and Ito, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
SIZE_INCHES = (9.0, 5.4)
DOTS_PER_INCH = 150


def draw_demo(record: DemoRecord, path: Path) -> None:
    """Write the picture of one demo (PNG, SVG or PDF, by the name of `path`)."""
    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    learning, answering = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    failed = [outcome for outcome in record.outcomes if outcome.completion is None]
    figure.suptitle(
        f"One model learns from {len(record.applied_at_s)} training batches "
        f"while it answers {len(record.outcomes)} requests ({len(failed)} failed)"
    )
    _draw_loss(learning, record)
    _draw_requests(answering, record.outcomes)
    figure.savefig(path, dpi=DOTS_PER_INCH)


def _draw_loss(axes: Axes, record: DemoRecord) -> None:
    """The loss over time, and a tick on the time axis for each training batch."""
    times, losses = [point.at_s for point in record.losses], [point.loss for point in record.losses]
    axes.plot(times, losses, color=BLUE, marker="o", label="loss on text that it was not trained on")
    axes.plot(
        record.applied_at_s,
        [0.02] * len(record.applied_at_s),
        transform=axes.get_xaxis_transform(),  # the height counts in shares of the axes
        linestyle="none",
        marker="|",
        markersize=9,
        color=ORANGE,
        label="a training batch has changed the weights",
    )
    axes.set_ylim(bottom=0)
    axes.set_ylabel("loss of the served model\n(nats per token)")
    axes.legend(loc="upper right")
    axes.grid(alpha=0.3)


def _draw_requests(axes: Axes, outcomes: list[Outcome]) -> None:
    """Each request at its arrival and its time to first token; a failed one at the bottom."""
    for is_chat, name, colour, marker in ((False, "completion", GREEN, "o"), (True, "chat", VERMILION, "^")):
        points = [
            (outcome.request.at_s, outcome.completion.ttft_s * 1e3)
            for outcome in outcomes
            if outcome.completion is not None and outcome.request.is_chat == is_chat
        ]
        if points:
            axes.plot(*zip(*points, strict=True), marker, color=colour, markersize=5, label=name)
    failed_at_s = [outcome.request.at_s for outcome in outcomes if outcome.completion is None]
    if failed_at_s:
        axes.plot(failed_at_s, [0.0] * len(failed_at_s), "x", color="black", label="failed")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("time to first token\n(milliseconds)")
    axes.set_xlabel("seconds since requests began")
    if outcomes:
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False)  # no point behind it
    axes.grid(alpha=0.3)
