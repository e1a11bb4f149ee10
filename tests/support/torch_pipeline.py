"""torch's own pipelines: `python -m tests.support.torch_pipeline NUM_RANKS FOLDER`.

FOLDER has `model` and `batches.json`; each rank's weights after training go there, a file for each schedule.
The ranks are forked from a process that has imported all they need.
"""

import json
import multiprocessing
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, distributed, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from shared.model.attention import PackedSegments
from shared.model.loader import load_stage, model_partition, read_config
from shared.model.stage import Stage
from tests.support.training import Batch, adamw, num_labels

SCHEDULES = (ScheduleGPipe, Schedule1F1B)


class AsModule(nn.Module):
    """One of our stages as torch's pipelines want it: examples of one length, side by side."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.model = stage.model
        self._stage = stage

    def forward(self, inputs: Tensor) -> Tensor:
        """Tokens [B, L] or activations [B, L, H] to activations [B, L, H] or logits [B, L, V]."""
        num_examples, length = inputs.shape[:2]
        positions = torch.arange(length).repeat(num_examples)
        context = PackedSegments((length,) * num_examples)
        outputs = self._stage.forward(inputs.flatten(0, 1), positions, context)
        return outputs.view(num_examples, length, -1)


def summed_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")


def train(schedule_class: type, rank: int, num_ranks: int, folder: Path, batches: list[Batch]) -> None:
    layers = model_partition(read_config(folder / "model"), num_ranks)[rank]
    stage = load_stage(folder / "model", layers)
    pipelined = PipelineStage(AsModule(stage), rank, num_ranks, torch.device("cpu"))
    labels = num_labels(batches[0])
    schedule = schedule_class(
        pipelined,
        n_microbatches=len(batches[0]),
        loss_fn=lambda logits, tokens: summed_loss(logits, tokens) / labels,
        scale_grads=False,
    )
    optimizer = adamw(stage.parameters())
    for batch in batches:
        tokens = torch.tensor(batch).flatten(0, 1)
        if rank == 0:
            schedule.step(tokens)
        else:
            schedule.step(target=tokens)
        optimizer.step()
        optimizer.zero_grad()
    weights = {name: tensor.detach() for name, tensor in stage.named_tensors().items()}
    save_file(weights, folder / f"{schedule_class.__name__}-{rank}.safetensors")


def run_rank(rank: int, num_ranks: int, folder: Path) -> None:
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=num_ranks
    )
    batches = json.loads((folder / "batches.json").read_text())
    for schedule_class in SCHEDULES:
        train(schedule_class, rank, num_ranks, folder, batches)
    distributed.destroy_process_group()


def main() -> None:
    num_ranks, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=run_rank, args=(rank, num_ranks, folder)) for rank in range(num_ranks)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(max(abs(process.exitcode or 0) for process in ranks))


if __name__ == "__main__":
    main()
