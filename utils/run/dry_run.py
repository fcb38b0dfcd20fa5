"""What a run will store, and whether there is room, before it begins."""

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from utils.arc.tasks import MAX_SIDE, SampleKey
from utils.errors import UserError
from utils.plan.plan import Prepared
from utils.run.compute import encode_row, kept_positions, to_item
from utils.shards.writer import planned_shards
from utils.store.local import free_bytes

log = logging.getLogger(__name__)

LOOK_SECONDS = 10


def planned_items(prepared: Prepared, process: int) -> Iterator[dict[str, Any] | None]:
    """Items as a process of the run will store them, in order, arrays zero; None closes a shard.

    Sizes are exact unless answers are generated: those are taken at their longest, and as the
    largest grid that they could hold.
    """
    request, config = prepared.request, prepared.config
    for number, batch in enumerate(prepared.batches):
        if number and request.save_every_n_batches and number % request.save_every_n_batches == 0:
            yield None
        spans = prepared.layout.owned(len(batch.rows), process).values()
        for i in (batch.rows[place] for span in spans for place in span):
            if i < 0:
                continue
            row = encode_row(prepared, prepared.samples[i])
            if request.generates:
                row.answers = [np.zeros(request.max_output_tokens, np.int32)]
            P, A = len(row.prompt_ids), sum(len(answer) for answer in row.answers)
            row.logprobs = [np.zeros(A, np.float32)] * len(row.answers)
            kept = len(kept_positions(prepared.capture.positions, P, P + A))
            zeros = np.zeros((kept, config.hidden_size), request.activation_dtype)
            row.captures = dict.fromkeys(prepared.capture.names, zeros)
            if not request.no_logits:
                row.logits = np.zeros((1, config.vocab_size), request.activation_dtype)
            item = to_item(row, prepared)[0]
            if request.generates:
                cells = min(A, MAX_SIDE**2)
                for key in {"cells", "cells_original"} & item.keys():
                    item[key] = np.concatenate([item[key], np.zeros((cells, 7), np.int32)])
                item["prediction"] = [[0] * MAX_SIDE] * -(-cells // MAX_SIDE)
            yield item


def plan_storage(prepared: Prepared) -> tuple[int, list[tuple[int, int]]]:
    """Total tokens, and (samples, bytes) of each shard of every process; see `planned_items`."""
    request, total = prepared.request, 0
    shards: list[tuple[int, int]] = []
    devices = prepared.layout.mesh.devices.flat
    with tqdm(total=len(prepared.samples), desc="planning", unit=" samples") as bar:

        def counted(process: int) -> Iterator[dict[str, Any] | None]:
            nonlocal total
            for item in planned_items(prepared, process):
                if item is not None:
                    total += len(item["input_ids"])
                    bar.update()
                yield item

        for process in sorted({device.process_index for device in devices}):
            shards += planned_shards(
                counted(process),
                request.activation_dtype,
                request.save_every_n_samples,
                request.max_shard_mb,
            )
    return total, shards


def check_disk(prepared: Prepared, done: set[SampleKey], share: float = 1) -> None:
    """Raises UserError when even answers of one token would not fit on the disk, which takes a
    `share` of the samples."""
    request, need = prepared.request, 0
    item_size = np.dtype(request.activation_dtype).itemsize
    for sample in prepared.samples:
        if sample.key not in done:
            length = sample.length.total
            kept = kept_positions(prepared.capture.positions, sample.length.prompt, length)
            values = len(kept) * prepared.config.hidden_size * len(prepared.capture.names)
            if prepared.capture.names and not request.no_logits:
                values += prepared.config.vocab_size
            need += values * item_size * share
    if request.delete_after_upload:
        need = min(need, (request.max_pending_gb * 1e9 + request.max_shard_mb * 1e6))
    if need > (free := free_bytes(prepared.run_folder)):
        raise UserError(
            f"{prepared.run_folder} needs at least {need / 1e9:.2f} GB and has {free / 1e9:.2f} GB "
            "free: free space, or take fewer layers, --token_positions or tasks"
        )


class DiskOutlook:
    """Warns, once, that the disk will be full before the run ends, if it goes on filling as it has
    so far."""

    def __init__(self, folder: Path):
        self._folder, self._free, self._told = folder, free_bytes(folder), False
        self._looked = time.monotonic()

    def look(self, stored: int, total: float) -> None:
        """stored: samples since the beginning, of the `total` that there will be."""
        if self._told or not stored or time.monotonic() - self._looked < LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        free = free_bytes(self._folder)
        a_sample = (self._free - free) / stored
        if a_sample * (total - stored) > free:
            self._told = True
            log.warning(
                "the disk of %s will be full after about %d more of the %d samples that are left: "
                "%.2f GB are free, %.2f GB are needed; free space, or stop and --resume with "
                "--delete_after_upload",
                *(self._folder, free / a_sample, total - stored, free / 1e9),
                a_sample * (total - stored) / 1e9,
            )
