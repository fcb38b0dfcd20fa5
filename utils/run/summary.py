"""What a run says on stdout: the plan of a dry run, and the summary at its end."""

import re
from collections import Counter
from typing import Any

from utils.errors import UserError
from utils.model.weights import abstract_params, placement
from utils.plan.batching import padding_share
from utils.plan.plan import Prepared, train_pairs
from utils.run.dry_run import check_disk, plan_storage
from utils.run.loop import open_writer
from utils.run.peers import Peers
from utils.store.local import free_bytes


def print_plan(prepared: Prepared) -> None:
    """Samples, tokens, shapes, shards and bytes, and the free space of the disk."""
    request = prepared.request
    lengths = [sample.length for sample in prepared.samples]
    shapes = {(batch.shape.length, len(batch.rows)) for batch in prepared.batches}
    padding = padding_share(lengths, prepared.batches)
    at_most = "at most " if request.generates else ""
    model = prepared.uris.get(request.model_path, request.model_path)
    print(f"model         {model}: {prepared.config.model_type}, {prepared.dtype}")
    print(f"tasks         {len(prepared.tasks)}")
    print(f"samples       {len(prepared.samples)}{_views(prepared)}")
    print_shortfalls(prepared)
    print(f"prompt tokens {sum(length.prompt for length in lengths)}")
    layout = prepared.layout
    if request.distributed:
        print(f"mesh          {layout.data} x {layout.model} (data x model)")
    print(f"batches       {len(prepared.batches)}, {padding:.1%} padding")
    sizes = sorted((length, rows) for length, rows in shapes)
    print(f"shapes        {', '.join(f'{rows} x {length}' for length, rows in sizes)} tokens")
    tokens, shards = plan_storage(prepared)
    print(f"total tokens  {at_most}{tokens}")
    if request.activations_dir is not None:
        print(f"captures      {', '.join(prepared.capture.names)}")
        print(f"shards        {at_most}{len(shards)}")
        print(f"shard bytes   {at_most}{sum(size for _, size in shards)}")
    if prepared.bucket is not None:
        held = len(prepared.listing)
        print(f"bucket        {prepared.bucket}: can be written and read, holds {held} objects")
    print(f"disk free     {free_bytes(prepared.run_folder)} bytes at {prepared.run_folder}")
    try:
        check_disk(prepared, open_writer(prepared, Peers()).done)
    except UserError as error:
        print(f"would be refused: {error}")
    print("dry run: nothing was written")


def _views(prepared: Prepared) -> str:
    number = prepared.request.augmentations
    return f", each test input in {number} views" if number > 1 else ""


def print_placements(prepared: Prepared) -> None:
    """How each kind of tensor lies on the mesh, layers alike in one line."""
    layout = prepared.layout
    print(f"mesh          {layout.data} x {layout.model} (data x model), attention "
          f"{'by heads' if layout.by_heads else 'by tokens'}")  # fmt: skip
    seen = {}
    for path, shape in abstract_params(prepared.config).items():
        seen.setdefault(re.sub(r"layers_\d+", "layers_*", path), (path, shape))
    for kind, (path, shape) in seen.items():
        place = placement(path, shape, layout)
        split = [i for i, axis in enumerate(place.spec) if axis == "model"]
        words = f"split by axis {split[0]}" if split and layout.model > 1 else "whole on each"
        if place.padded:
            words += f", padded from {list(shape)}"
        print(f"  {kind:36} {list(place.shape)!s:24} {words}")


def print_shortfalls(prepared: Prepared) -> None:
    """What the run does not hold: samples skipped, train pairs left out, outputs without truth."""
    if prepared.skipped:
        reasons = Counter(entry["reason"].partition(":")[0] for entry in prepared.skipped)
        listed = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        print(f"skipped       {len(prepared.skipped)}: {listed}")
    pairs = train_pairs(prepared)
    if pairs["samples_shortened"]:
        print(
            f"train pairs   {pairs['samples_shortened']} of {len(prepared.samples)} samples lose "
            f"some to fit in {prepared.max_model_len} tokens: {pairs['kept']} of "
            f"{pairs['available']} kept"
        )
    known = [pair.output is not None for task in prepared.tasks for pair in task.test]
    print(f"ground truth  {sum(known)} of {len(known)} test outputs")


def print_summary(prepared: Prepared, manifest: dict[str, Any]) -> None:
    """Tasks, solved, tokens, tokens/s, bytes, and where things are."""
    request = prepared.request
    if not manifest:
        return
    samples = f"{manifest['total_samples']}{_views(prepared)}"
    print(f"tasks         {len(prepared.tasks)}, samples {samples}")
    print_shortfalls(prepared)
    if scores := manifest.get("scores"):
        names = {
            "outputs_solved": "test outputs solved within two attempts",
            "mean_task_share": "mean over tasks of the share of outputs solved",
            "tasks_solved": "tasks with all outputs solved",
        }
        for name, words in names.items():
            score = scores[name]
            if score["share"] is None:
                print("solved        unknown: no ground truth")
                break
            share = f"{score['share']:.1%} ({score['solved']:g} of {score['total']})"
            print(f"solved        {share} {words}")
    print(
        f"tokens        {manifest['total_tokens']}, {manifest['tokens_per_second']:.0f} tokens/s "
        f"over {manifest['seconds']:.1f} s (compiling: {manifest['compile_seconds']:.1f} s more)"
    )
    useful = manifest.get("useful_slots") or {}
    if useful.get("prefill"):
        decoding = "" if useful["decode"] is None else f", {useful['decode']:.1%} of decoding"
        print(f"useful        {useful['prefill']:.1%} of the slots of prefill{decoding}")
    kind = "submission   " if request.distributed else "predictions  "
    print(f"{kind} {request.output_path}")
    if request.activations_dir is not None:
        size = sum(entry["size_bytes"] for entry in manifest["files"])
        count = manifest["total_batches"]
        shards = f"{count} shard{'s' * (count != 1)}, {size} bytes"
        print(f"activations   {request.activations_dir}: {shards}")
        if manifest["float16_overflows"]:
            print(
                f"              {manifest['float16_overflows']} arrays were too large for float16"
            )
    if prepared.bucket is not None:
        print(f"uploaded      {prepared.bucket}: all of these")
