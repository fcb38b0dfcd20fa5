"""What a run says on stdout at its end, and of what it leaves out."""

from typing import Any

from utils.plan.plan import Plan
from utils.plan.samples import skip_reasons


def views_of(plan: Plan) -> str:
    """Words that follow a number of samples."""
    number = plan.request.augmentations
    return f", each test input in {number} views" if number > 1 else ""


def shortfalls(plan: Plan) -> list[str]:
    """Lines that name the samples skipped and the train pairs left out; none where none are."""
    lines, pairs = [], plan.train_pairs
    if plan.skipped:
        listed = ", ".join(f"{count} {reason}" for reason, count in skip_reasons(plan.skipped))
        lines.append(f"skipped       {len(plan.skipped)}: {listed}")
    if pairs["samples_shortened"]:
        lines.append(
            f"train pairs   {pairs['samples_shortened']} of {len(plan.samples)} samples lose "
            f"some to fit in {plan.max_model_len} tokens: {pairs['kept']} of "
            f"{pairs['available']} kept"
        )
    return lines


def print_shortfalls(plan: Plan) -> None:
    """What the run does not hold: samples skipped, train pairs left out, outputs without truth."""
    for line in shortfalls(plan):
        print(line)
    known = [pair.output is not None for task in plan.tasks for pair in task.test]
    print(f"ground truth  {sum(known)} of {len(known)} test outputs")


def print_summary(plan: Plan, manifest: dict[str, Any]) -> None:
    """Tasks, solved, tokens, tokens/s, bytes, and where things are."""
    request = plan.request
    if not manifest:
        return
    samples = f"{manifest['total_samples']}{views_of(plan)}"
    print(f"tasks         {len(plan.tasks)}, samples {samples}")
    print_shortfalls(plan)
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
    counted = " of all predictions" if request.predictions_per_task > 1 else ""
    print(
        f"tokens        {manifest['total_tokens']}, "
        f"{manifest['tokens_per_second']:.0f} tokens/s{counted} "
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
                f"              {manifest['float16_overflows']} arrays are float32, since "
                f"{request.activation_dtype} could not hold them"
            )
    if plan.bucket is not None:
        print(f"uploaded      {plan.bucket}: all of these")
