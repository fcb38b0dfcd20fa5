"""What a run says on stdout: the plan of a dry run, and the summary at its end."""

from collections import Counter
from typing import Any

from utils.batching import padding_share
from utils.disk import free_bytes
from utils.extract import plan_storage
from utils.prepare import Prepared


def print_plan(prepared: Prepared) -> None:
    """Samples, tokens, shapes, shards and bytes, and the free space of the disk."""
    request = prepared.request
    lengths = [sample.length for sample in prepared.samples]
    shapes = {batch.bucket for batch in prepared.batches}
    padding = padding_share(lengths, prepared.batches)
    at_most = "at most " if request.generates else ""
    print(f"model         {request.model_path}: {prepared.config.model_type}, {prepared.dtype}")
    print(f"tasks         {len(prepared.tasks)}")
    print(f"samples       {len(prepared.samples)}")
    print_skipped(prepared.skipped)
    print(f"prompt tokens {sum(length.prompt for length in lengths)}")
    print(f"batches       {len(prepared.batches)} of {request.batch_size}, {padding:.1%} padding")
    print(
        f"shapes        {', '.join(str(bucket.length) for bucket in sorted_shapes(shapes))} tokens"
    )
    tokens, shards = plan_storage(prepared)
    print(f"total tokens  {at_most}{tokens}")
    if request.activations_dir is not None:
        print(f"captures      {', '.join(prepared.capture.names)}")
        print(f"shards        {at_most}{len(shards)}")
        print(f"shard bytes   {at_most}{sum(size for _, size in shards)}")
    print(f"disk free     {free_bytes(prepared.run_folder)} bytes at {prepared.run_folder}")
    print("dry run: nothing was written")


def sorted_shapes(shapes: Any) -> list[Any]:
    return sorted(shapes, key=lambda bucket: bucket.length)


def print_skipped(skipped: list[dict[str, Any]]) -> None:
    if skipped:
        (reason, count), *_ = Counter(entry["reason"] for entry in skipped).most_common()
        print(f"skipped       {len(skipped)} ({count} x {reason})")


def print_summary(prepared: Prepared, manifest: dict[str, Any]) -> None:
    """Tasks, solved, tokens, tokens/s, bytes, and where things are."""
    request = prepared.request
    if not manifest:
        return
    print(f"tasks         {len(prepared.tasks)}, samples {manifest['total_samples']}")
    print_skipped(prepared.skipped)
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
    print(f"predictions   {request.output_path}")
    if request.activations_dir is not None:
        size = sum(entry["size_bytes"] for entry in manifest["files"])
        count = manifest["total_batches"]
        shards = f"{count} shard{'s' * (count != 1)}, {size} bytes"
        print(f"activations   {request.activations_dir}: {shards}")
        if manifest["float16_overflows"]:
            print(
                f"              {manifest['float16_overflows']} arrays were too large for float16"
            )
