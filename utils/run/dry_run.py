"""A dry run: what a run will compute and store, and whether there is room, before it begins."""

import logging
import re
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from utils.arc.tasks import MAX_SIDE, SampleKey
from utils.errors import UserError
from utils.model.capture import width_of
from utils.model.weights import parameters
from utils.plan.batching import padding_share
from utils.plan.plan import Plan
from utils.plan.samples import Sample
from utils.prompt.formats import Answer
from utils.run.result import Result, to_item
from utils.run.summary import print_shortfalls, views_of
from utils.shards.filling import planned_shards
from utils.shards.items import logits_dtype
from utils.shards.manifest import stem
from utils.store.local import free_bytes, in_words

log = logging.getLogger(__name__)

LOOK_SECONDS = 10


def planned_item(plan: Plan, sample: Sample) -> dict[str, Any]:
    """The item of a sample as the run will store it, its arrays zero.

    Its size is exact unless an answer is generated: that one is taken at its longest, and as the
    largest grid that so many tokens can hold, each of them in a cell.
    """
    request, config = plan.request, plan.config
    encoded = plan.encode(sample)
    P = encoded.prompt_length
    answers, said = [], []
    A = len(encoded.ids) - P
    if request.generates:
        A = request.room
        cells = np.zeros((min(A, MAX_SIDE**2), 7), np.int32)
        cells[:, :2] = -1, 1  # of the test output
        cells[:, 5] = P + np.arange(len(cells))
        cells[:, 6] = P + A
        grid = [[0] * MAX_SIDE] * -(-len(cells) // MAX_SIDE)
        answers.append(np.zeros(A, np.int32))
        said.append(Answer(grid, None, cells))
    logits = np.zeros((1, config.vocab_size), logits_dtype(request.activation_dtype))
    result = Result(
        sample,
        encoded,
        answers,
        [np.zeros(A, np.float32)] if A else [],
        {},
        None if request.no_logits else logits,
    )
    item = to_item(result, plan, said)[0]
    rows = len(item.get("positions", item["input_ids"]))
    item["activations"] = {  # which takes no memory
        name: np.zeros((rows, width_of(config, name)), request.activation_dtype)
        for name in plan.capture.names
    }
    if request.activation_dtype == "int8":
        item["scales"] = dict.fromkeys(plan.capture.names, np.zeros(rows, np.float32))
    return item


def planned_items(plan: Plan, process: int) -> Iterator[dict[str, Any] | None]:
    """The items of a process of the run, in the order of storing; None closes a shard."""
    every = plan.request.save_every_n_batches
    for number, batch in enumerate(plan.batches):
        if number and every and number % every == 0:
            yield None
        for span in plan.layout.owned(len(batch.rows), process).values():
            for i in (batch.rows[place] for place in span):
                if i >= 0:
                    yield planned_item(plan, plan.samples[i])


def plan_storage(plan: Plan) -> tuple[int, list[tuple[int, int]]]:
    """Total tokens, and (samples, bytes) of each shard of every process; see `planned_item`."""
    request, shards = plan.request, []
    tokens = sum(sample.length.total + request.room for sample in plan.samples)
    processes = sorted({device.process_index for device in plan.layout.mesh.devices.flat})
    with tqdm(total=len(plan.samples), desc="planning", unit=" samples") as bar:
        for process in processes:
            for samples, size in planned_shards(
                planned_items(plan, process),
                request.activation_dtype,
                request.save_every_n_samples,
                request.max_shard_mb,
            ):
                shards.append((samples, size))
                bar.update(samples)
    return tokens, shards


def bytes_per_layer(plan: Plan) -> int:
    """Of the states of one captured layer over the whole run, at all its hook points, with every
    answer at its longest; 0 where nothing is captured."""
    names = plan.capture.names
    if not names:
        return 0
    item = planned_item(plan, plan.samples[0])
    a_row = sum(array.itemsize * array.shape[1] for array in item["activations"].values())
    a_row += sum(scales.itemsize for scales in item.get("scales", {}).values())
    rows = sum(kept_rows(plan, sample, plan.request.room) for sample in plan.samples)
    return rows * a_row // len({name.rpartition(".")[2] for name in names})


def kept_rows(plan: Plan, sample: Sample, room: int = 0) -> int:
    """Of a sample's tokens, with so many of a generated answer, each of which may hold a cell."""
    length = sample.length
    return plan.capture.num_kept(length.prompt, length.answer + room, sample.cell_tokens + room)


def weight(plan: Plan, sample: Sample) -> int:
    """What a sample takes on the disk beside others: its rows, and one for all that is no row."""
    return 1 + kept_rows(plan, sample)


def check_disk(plan: Plan, done: Collection[SampleKey], share: float = 1) -> None:
    """Raises UserError when even answers of one token would not fit on the disk.

    done: samples that are stored already, by whatever process. share: of the others, those that go
    to this disk, where processes write to several.
    """
    request = plan.request
    todo = [sample for sample in plan.samples if sample.key not in done]
    kept = sum(kept_rows(plan, sample) for sample in todo)
    dtype, logits = (
        np.dtype(name).itemsize
        for name in (request.activation_dtype, logits_dtype(request.activation_dtype))
    )
    widths = sum(width_of(plan.config, name) for name in plan.capture.names)
    need = kept * widths * dtype * share
    if plan.capture.names and not request.no_logits:
        need += len(todo) * plan.config.vocab_size * logits * share
    if request.delete_after_upload:
        need = min(need, request.max_pending_gb * 1e9 + request.max_shard_mb * 1e6)
    free = free_bytes(plan.run_folder)
    if request.overwrite and plan.run_folder.is_dir():  # of which the run removes what it replaces
        replaced = [path for path in plan.run_folder.iterdir() if stem(path.name)]
        free += sum(path.lstat().st_size for path in replaced)
    if need > free:
        less = "take fewer layers, --token_positions, --max_rows_per_sample or tasks"
        if request.delete_after_upload:
            less = "lower --max_pending_gb and --max_shard_mb, which may wait on it"
        raise UserError(
            f"{plan.run_folder} needs at least {in_words(need)} and has {in_words(free)} free: "
            f"free space, or {less}"
        )


def print_plan(plan: Plan, done: Collection[SampleKey], share: float = 1) -> None:
    """Samples, tokens, shapes, shards and bytes, and the free space of the disk; done and share as
    of `check_disk`."""
    request, layout = plan.request, plan.layout
    lengths = [sample.length for sample in plan.samples]
    at_most = "at most " if request.generates else ""
    print(f"model         {request.model_path}: {plan.config.model_type}, {plan.dtype}")
    if (adapter := plan.checkpoint.adapter) is not None:
        print(f"adapter       {adapter.folder}")
    print(f"tasks         {len(plan.tasks)}")
    print(f"samples       {len(plan.samples)}{views_of(plan)}")
    if done:
        print(f"stored        {len(done)} of these already; what follows is of all")
    print_shortfalls(plan)
    print(f"prompt tokens {sum(length.prompt for length in lengths)}")
    if request.distributed:
        print(f"mesh          {layout.data} x {layout.model} (data x model)")
    padding = padding_share(lengths, plan.batches, layout.data)
    print(f"batches       {len(plan.batches)}, {padding:.1%} padding")
    shapes = sorted({batch.shape for batch in plan.batches}, key=lambda shape: shape.slots)
    caches = ", ".join(f"{shape.rows} x {shape.slots}" for shape in shapes)
    print(f"caches        {caches} tokens, filled in chunks of {plan.workload.chunk}")
    tokens, shards = plan_storage(plan)
    print(f"total tokens  {at_most}{tokens}")
    if request.activations_dir is not None:
        print(f"captures      {', '.join(plan.capture.names)}")
        print(f"shards        {at_most}{len(shards)}")
        print(f"shard bytes   {at_most}{sum(size for _, size in shards)}")
    if plan.bucket is not None:
        held = len(plan.listing)
        print(f"bucket        {plan.bucket}: can be written and read, holds {held} objects")
    print(f"disk free     {free_bytes(plan.run_folder)} bytes at {plan.run_folder}")
    try:
        check_disk(plan, done, share)
    except UserError as error:
        print(f"would be refused: {error}")
    print("dry run: nothing was written")


def print_placements(plan: Plan) -> None:
    """How each kind of tensor lies on the mesh, layers alike in one line."""
    layout = plan.layout
    print(f"mesh          {layout.data} x {layout.model} (data x model), attention "
          f"{'by heads' if layout.by_heads else 'by tokens'}")  # fmt: skip
    seen = {}
    for path, parameter in parameters(plan.config).items():
        seen.setdefault(re.sub(r"layers_\d+", "layers_*", path), parameter)
    for kind, parameter in seen.items():
        sizes, spec = parameter.placement(layout)
        split = [i for i, axis in enumerate(spec) if axis == "model"]
        words = f"split by axis {split[0]}" if split and layout.model > 1 else "whole on each"
        if sizes != parameter.shape:
            words += f", padded from {list(parameter.shape)}"
        print(f"  {kind:36} {list(sizes)!s:24} {words}")


class DiskOutlook:
    """Warns, once, that the disk will be full before the run ends, if it goes on filling as it has
    so far."""

    def __init__(self, folder: Path):
        self._folder, self._free, self._told = folder, free_bytes(folder), False
        self._looked = time.monotonic()

    def look(self, stored: float, total: float) -> None:
        """stored: of the `total` that there will be, since the beginning; see `weight`."""
        if self._told or not stored or time.monotonic() - self._looked < LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        free = free_bytes(self._folder)
        needed = (self._free - free) / stored * (total - stored)
        if needed > free:
            self._told = True
            log.warning(
                "the disk of %s will be full after about %.0f%% of what is left: %s are free, %s "
                "are needed; free space, or stop and --resume with --delete_after_upload",
                *(self._folder, 100 * free / needed, in_words(free), in_words(needed)),
            )
