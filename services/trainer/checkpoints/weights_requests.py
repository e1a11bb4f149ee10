"""Answers people's requests about weights: which durable versions there are, what they have learnt, and to go
back to one.
"""

import asyncio
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from services.trainer.checkpoints.rollbacks import Rollbacks, RunAll
from services.trainer.nodes.stage_listener import Nodes
from shared import checkpoints, lineage
from shared.bus.base import Incoming
from shared.checkpoints import Checkpoint
from shared.disk import on_disk
from shared.errors import ConfigurationError, RefusedError
from shared.messages.lineage import LineageEntry, LineageEntryRequest, LineageRequest, VersionLineage
from shared.messages.weights import DurableVersions, DurableVersionsRequest, RollBackWeights, RolledBack


class WeightsRequests:
    """Answers requests side by side. A node that goes back is busy from the search for its checkpoint on."""

    def __init__(
        self,
        *,
        root: Path,
        model: str,
        stream: str,
        nodes: Nodes,
        rollbacks: Rollbacks,
        run_all: RunAll,
        shares_weights: bool,
    ) -> None:
        """`root`: the folder of all checkpoints; `stream`: identity of the training stream;
        `run_all`: carries out what nodes decide; `shares_weights`: the nodes do.
        """
        self._model = model
        self._stream = stream
        self._shares_weights = shares_weights
        self._root = root
        self._nodes = nodes
        self._rollbacks = rollbacks
        self._run_all = run_all
        self._rolling_back: set[int] = set()

    async def list_versions(self, incoming: Incoming[DurableVersionsRequest]) -> DurableVersions:
        of_all = {number: node.served_version for number, node in self._nodes.by_number.items()}
        served = {number: version for number, version in of_all.items() if version is not None}
        versions = await on_disk(partial(checkpoints.durable_versions, self._root, served))
        return DurableVersions(versions=tuple(versions))

    async def show_lineage(self, incoming: Incoming[LineageRequest]) -> VersionLineage:
        """Raises RefusedError (404) when there is no such version, or several nodes each have one."""
        return await on_disk(partial(self._lineage, incoming.message))

    def _lineage(self, asked: LineageRequest) -> VersionLineage:
        try:
            manifest = checkpoints.find(self._root, asked.version, asked.node).manifest
            return VersionLineage(node=manifest.node, newest=lineage.newest_entry(self._root, manifest))
        except ConfigurationError as error:
            raise RefusedError(str(error), code=404) from error

    async def show_lineage_entry(self, incoming: Incoming[LineageEntryRequest]) -> LineageEntry:
        """Raises RefusedError (404) when there is none at that place."""
        try:
            return await on_disk(partial(lineage.read_entry, self._root, incoming.message.place))
        except ConfigurationError as error:
            raise RefusedError(str(error), code=404) from error

    async def roll_back(self, incoming: Incoming[RollBackWeights]) -> RolledBack:
        """Roll back.

        Raises RefusedError when a node is not there, has no such version, is going back already, or would go
        back without those that share its weights.
        """
        asked, known = incoming.message, self._nodes.by_number
        if self._shares_weights and asked.node is not None:
            raise RefusedError(
                f"node {asked.node} shares its weights with the others (LEMIX_MERGE, LEMIX_SCHEDULE=dp): "
                "they go back together, so name no node",
                code=409,
            )
        numbers = sorted(known) if asked.node is None else [asked.node]
        if not numbers or any(number not in known for number in numbers):
            what = "no node is" if asked.node is None else f"node {asked.node} is not"
            raise RefusedError(f"{what} running; those that are: {sorted(known)}", code=404)
        if busy := sorted(self._rolling_back.intersection(numbers)):
            raise RefusedError(f"nodes {busy} are going back already", code=409)
        self._rolling_back.update(numbers)
        try:
            return await self._order_rollback(numbers, asked.version)
        finally:
            self._rolling_back.difference_update(numbers)

    async def _order_rollback(self, numbers: Sequence[int], version: int) -> RolledBack:
        known = self._nodes.by_number
        if self._shares_weights:
            target = await on_disk(lambda: self._find(numbers, version))
            numbers = sorted(known)  # with those that have come meanwhile
            nodes = [known[number] for number in numbers]
            num_discarded = await self._rollbacks.order(nodes, target, self._run_all)
            return RolledBack(nodes=tuple(numbers), num_discarded=num_discarded)
        targets = await on_disk(lambda: [self._find([number], version) for number in numbers])
        outcomes = await asyncio.gather(
            *(
                self._rollbacks.order([known[number]], target, self._run_all)
                for number, target in zip(numbers, targets, strict=True)
            ),
            return_exceptions=True,  # until all have answered, none of them may be asked again
        )
        if failures := [each for each in outcomes if isinstance(each, BaseException)]:
            raise failures[0]
        num_discarded = sum(each for each in outcomes if not isinstance(each, BaseException))
        return RolledBack(nodes=tuple(numbers), num_discarded=num_discarded)

    def _find(self, nodes: Sequence[int], version: int) -> Checkpoint:
        """The checkpoint of `version`, from any node where they share their weights.

        Raises RefusedError, naming the versions there are."""
        holders = checkpoints.nodes(self._root) if self._shares_weights else nodes
        found = [each for node in holders for each in checkpoints.checkpoints(self._root, node)]
        found.append(checkpoints.as_given(self._root, nodes[0], model=self._model, stream=self._stream))
        for checkpoint in found:
            if checkpoint.manifest.version == version:
                return checkpoint
        there = ", ".join(map(str, sorted((each.manifest.version for each in found), reverse=True)))
        who = ", ".join(f"node {number}" for number in nodes)
        raise RefusedError(f"{who}: no durable version {version}; there are: {there or 'none'}", code=404)
