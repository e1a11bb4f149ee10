"""The node's future with all known work, if nothing more comes: list scheduling, op by op. Pure.

Rules, as stage workers follow them: a device does one op at a time, of whichever of its stages; inference
goes first, then backwards, then training forwards, which take turns with backwards (discipline `slo_first`;
its patience with training, half a second, is left out). Training ops stand aside for an iteration between
two of their slices (shared/slices.py); all else goes on to its end. Stage 0 orders all stages to step
when it has done a batch's last backward; steps go before backwards. At most one iteration per stage is in
flight, and as many microbatches as the schedule lets in.

Iterations of decodes alone enter wherever no prompt waits for the slot; but only the next few, because there
would be hundreds. After these decoding sequences are no ops here, and come in between: after each training
op, and each turn of one, a device gives `decode_gap_s` to them.
"""

from services.scheduler.node.coming_batches import ComingBatches
from services.scheduler.node.coming_iterations import ComingIterations
from services.scheduler.node.devices import Devices
from services.scheduler.node.known_work import Iteration, KnownWork
from services.scheduler.node.prediction import Prediction


def predict(known: KnownWork, now_s: float) -> Prediction:
    """Predict the ops of everything known, from `now_s` on."""
    devices = Devices(known, now_s)
    iterations = ComingIterations(known, now_s, devices)
    batches = ComingBatches(known, devices)
    for op, stage, at_s in devices.ends():
        flow = op.flow
        if isinstance(flow, Iteration):
            iterations.end(flow, stage, at_s)
        elif flow is not None:
            batches.end(flow, op, stage, at_s)
    return Prediction(
        at_s=now_s,
        ops=devices.ops,
        starts_s=devices.starts_s,
        ends_s=devices.ends_s,
        inference_ends_s=iterations.ends_s,
        stage_ends_s=[ends[-1] if ends else now_s for ends in devices.ends_s],
        slot_s=iterations.slot_s,
        feed_s=batches.feed_s,
        first_tokens_s=iterations.first_tokens_s,
        last_entry_s=iterations.last_entry_s,
        last_starts_s=iterations.last_starts_s,
        decode_entries=iterations.decode_entries,
        known=known,
    )
