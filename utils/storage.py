"""What a run will store, and whether there is room, before it begins."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from tqdm import tqdm

from utils.arc import MAX_SIDE
from utils.compute import encode_row, kept_positions, to_item
from utils.disk import free_bytes
from utils.errors import UserError
from utils.manifest import SampleKey
from utils.prepare import Prepared
from utils.shards import planned_shards


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
                item["cells"] = np.concatenate([item["cells"], np.zeros((cells, 7), np.int32)])
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
    if need > (free := free_bytes(prepared.run_folder)):
        raise UserError(
            f"{prepared.run_folder} needs at least {need / 1e9:.2f} GB and has {free / 1e9:.2f} GB "
            "free: free space, or take fewer layers, --token_positions or tasks"
        )
