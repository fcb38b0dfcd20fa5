"""`--plan`: the run, compiled ahead of time for a TPU slice that is not here.

The programs are those that the run would launch, for the batches that it would launch, compiled by
libtpu; memory, FLOPs and collectives are the compiler's. Time is a roofline, an upper bound of what
the slice can reach: for each program the longest of FLOPs over the peak rate, of arguments and
results, read or written once, over memory bandwidth, and of what collectives move over the
bandwidth of the interconnect; for a generated answer, that of one step times the longest answer
allowed.
"""

import contextlib
import logging
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from utils.cli import COMPILER_ALONE
from utils.errors import UserError
from utils.model.engine import for_every_shape
from utils.model.generate import Shape
from utils.model.weights import abstract_params, placement
from utils.plan.batching import padding_share
from utils.plan.memory import device_bytes
from utils.plan.plan import Plan, check_file, plan_meshes
from utils.plan.request import Request
from utils.run.compute import Computation
from utils.run.dry_run import bytes_per_layer, plan_storage
from utils.run.prices import costs
from utils.run.summary import print_shortfalls
from utils.store.local import write_json_atomic

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Chip:
    """Peak rates of one chip, from Google's system architecture pages: bfloat16 FLOP/s, bytes/s of
    memory, bytes/s of the interconnect over all links.

    cores: of a chip, as the names of its slices count them. slices: their shapes, in chips.
    """

    flops: float
    memory: float
    interconnect: float
    cores: int
    slices: tuple[str, ...]


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
CHIPS = {
    "v4": Chip(275e12, 1228e9, 300e9, 2, _CUBES),
    "v5e": Chip(197e12, 819e9, 200e9, 1, _FLAT),
    "v5p": Chip(459e12, 2765e9, 600e9, 2, _CUBES),
    "v6e": Chip(918e12, 1638e9, 448e9, 1, _FLAT),
}
SLICES = {
    f"{name}-{chip.cores * prod(map(int, shape.split('x')))}": f"{name}:{shape}"
    for name, chip in CHIPS.items()
    for shape in chip.slices
}
_COLLECTIVES = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
_ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4}


def slice_devices(name: str) -> Sequence[jax.Device]:
    """The devices of a slice, known to the compiler alone. Raises UserError for an unknown name and
    where libtpu is not installed."""
    if name not in SLICES:
        raise UserError(f"--plan {name} is not a slice: there are {', '.join(SLICES)}")
    os.environ.update({**COMPILER_ALONE, **os.environ})
    # Without a TPU a program that is kept can be written, but not read.
    jax.config.update("jax_enable_compilation_cache", False)
    from jax.experimental import topologies

    options = {"chip_config_name": "megacore"} if name.startswith("v4") else {}
    try:
        topology = topologies.get_topology_desc(SLICES[name], "tpu", **options)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        if "not installed" in str(error):
            raise UserError(
                '--plan needs the TPU compiler: pip install "jax[tpu]" (no TPU is needed)'
            ) from error
        raise UserError(f"the TPU compiler refuses {SLICES[name]}: {error}") from error
    return topology.devices


def main(
    request: Request,
    name: str,
    shapes: Sequence[tuple[int, int] | None],
    plan_json: str | None,
    usd_per_chip_hour: float | None = None,
    usd_per_gb_month: float | None = None,
) -> int:
    """Prints the plan of each mesh shape, writes the best to `plan_json`; the exit code.

    The prices are those of `costs`.
    """
    jax.config.update("jax_platforms", "cpu")
    if plan_json is not None:
        check_file(Path(plan_json), "--plan_json")
    devices = slice_devices(name)
    plans = []
    for shape, plan in zip(shapes, plan_meshes(request, shapes, devices, False), strict=True):
        if not plans:
            print_prompts(plan)
        if len(shapes) > 1:
            log.info("mesh %s", "x".join(map(str, shape)))
        plans.append(costs(estimate(plan, name), usd_per_chip_hour, usd_per_gb_month))
    if len(plans) > 1:
        print_table(plans)
    best = max(plans, key=lambda p: (p["fits"], p["estimated_tokens_per_second"] or 0))
    print_one(best)
    if plan_json is not None:
        chosen = best if len(plans) == 1 else {**best, "compared": plans}
        write_json_atomic(plan_json, chosen)
    return 0


def estimate(plan: Plan, name: str) -> dict[str, Any]:
    """The plan of a run on a slice; keys as the README of distributed inference explains them."""
    layout, request = plan.layout, plan.request
    chip = CHIPS[name.partition("-")[0]]
    mesh = layout.mesh
    computation = Computation(plan, params=_abstract(plan))
    batches = Counter((batch.shape, len(batch.rows)) for batch in plan.batches)
    compiled = partial(_bucket, plan, computation, chip)
    start = time.perf_counter()
    with programs_compiled() as programs:
        by_shape = for_every_shape(batches, compiled, f"compiling for {name}")
    compile_seconds = time.perf_counter() - start
    buckets = [{**bucket, "batches": batches[key]} for key, bucket in by_shape.items()]
    tokens, shards = plan_storage(plan)
    limit = device_bytes(mesh.devices.flat[0])
    worst = max(buckets, key=lambda b: b["hbm_bytes"] if b["hbm_bytes"] else float("inf"))
    need = worst["hbm_bytes"]
    fits = need is not None and need <= limit
    seconds = sum(bucket["batches"] * bucket["seconds"] for bucket in buckets)
    prefill = fits and sum(bucket["batches"] * bucket["prefill_seconds"] for bucket in buckets)
    given = sum(sample.length.total for sample in plan.samples)  # prompts, and forced answers
    stored = request.activations_dir is not None
    stored_bytes = sum(size for _, size in shards) if stored else 0
    return {
        "slice": name,
        "devices": mesh.size,
        "mesh_shape": [layout.data, layout.model],
        "processes": len({device.process_index for device in mesh.devices.flat}),
        "attention": "by heads" if layout.by_heads else "by tokens",
        "hbm_bytes_per_device": need,
        "hbm_limit_bytes": limit,
        "fits": fits,
        "programs": len(programs),
        "compile_seconds": compile_seconds,
        "prefill": worst["prefill"],
        "decode": worst["decode"],
        "buckets": buckets,
        "padding": padding_share([s.length for s in plan.samples], plan.batches),
        "estimated_tokens_per_second": tokens / seconds if fits else None,
        "estimated_prefill_tokens_per_second": given / prefill if fits else None,
        "estimated_hours": seconds / 3600 if fits else None,
        "prefill_seconds": prefill if fits else None,
        "decode_seconds": seconds - prefill if fits else None,
        "prompt_tokens": prompt_tokens(plan),
        "num_samples": len(plan.samples),
        "num_tokens_total": tokens,
        "activation_bytes_total": stored_bytes,
        "shards": len(shards) if stored else 0,
        "storage": {"bytes_per_layer": bytes_per_layer(plan), "bytes_total": stored_bytes},
        "advice": [] if fits else _advice(plan, worst, limit),
    }


def prompt_tokens(plan: Plan) -> dict[str, int]:
    """Quantiles of the samples' prompt lengths, and how many samples are skipped."""
    lengths = [sample.length.prompt for sample in plan.samples]
    names = ("min", "p10", "median", "p90", "max")
    found = np.quantile(lengths, [0, 0.1, 0.5, 0.9, 1])
    quantiles = {name: round(float(value)) for name, value in zip(names, found, strict=True)}
    return {**quantiles, "skipped": len(plan.skipped)}


@contextlib.contextmanager
def programs_compiled() -> Iterator[list[str]]:
    """The names of the programs that are compiled within the block, in any thread."""
    names: list[str] = []

    def note(event: str, seconds: float, **facts: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(str(facts.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(note)


def _abstract(plan: Plan) -> Any:
    """The parameters as the run would hold them, without their values."""
    layout, dtype = plan.layout, np.dtype(plan.dtype)
    leaves = {}
    for path, shape in abstract_params(plan.config).items():
        sizes, spec = placement(path, shape, layout)
        leaves[path] = jax.ShapeDtypeStruct(sizes, dtype, sharding=layout.sharding(*spec))
    return unflatten_dict(leaves, sep="/")


def _bucket(
    plan: Plan, computation: Computation, chip: Chip, shape: Shape, rows: int
) -> dict[str, Any]:
    """One compiled shape: its programs' figures, and the seconds that a batch takes at least."""
    found: dict[str, Any] = {"rows": rows, "length": shape.length, "answer": shape.answer}
    try:
        programs = computation.programs(shape, rows)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "Ran out of memory" not in str(error):
            raise
        nothing = {"hbm_bytes": None, "prefill": None, "decode": None, "seconds": 0.0}
        return {**found, **nothing, "error": str(error).splitlines()[0][:300]}
    prefill, *decodes = [_figures(program) for program in programs]
    # While a batch computes, what the last one captured is still on its way to the host.
    waiting = plan.workload.capture_bytes(plan.layout, rows, shape.length)
    # The parameters are there once, whichever program runs; a prefill's cache outlives it.
    memory = max(figures["hbm_bytes"] for figures in (prefill, *decodes)) + waiting
    first, step = _seconds(prefill, chip), [_seconds(figures, chip) for figures in decodes]
    return {
        **found,
        "hbm_bytes": memory,
        "prefill": prefill,
        "decode": decodes[0] if decodes else None,
        "prefill_seconds": first,
        "decode_step_seconds": step[0] if step else None,
        "seconds": first + sum(step) * plan.request.max_output_tokens,
    }


def _figures(program: Any) -> dict[str, Any]:
    """What the compiler says of a program, per device; of a loop, one pass."""
    cost, memory = program.cost_analysis(), program.memory_analysis()
    collectives, moved = collectives_of(program.as_text())
    arguments, results = memory.argument_size_in_bytes, memory.output_size_in_bytes
    temporary, code = memory.temp_size_in_bytes, memory.generated_code_size_in_bytes
    return {
        "flops_per_device": cost.get("flops", 0.0),
        "bytes_accessed_per_device": cost.get("bytes accessed", 0.0),
        "argument_bytes": arguments,
        "output_bytes": results,
        "temporary_bytes": temporary,
        "hbm_bytes": arguments + results - memory.alias_size_in_bytes + temporary + code,
        "collectives": collectives,
        "collective_bytes": moved,
    }


def collectives_of(hlo: str) -> tuple[dict[str, int], int]:
    """Operation -> count of a program's collectives, and the bytes of their results.

    The TPU compiler repeats an overlapped one in several computations; its channel tells.
    """
    seen: dict[str, tuple[str, int]] = {}
    for number, line in enumerate(hlo.splitlines()):
        found = re.search(rf"= (.*?) ({_COLLECTIVES})(?:-start)?\(", line)
        if found is None:
            continue
        channel = re.search(r"channel_id=(\d+)", line)
        sizes = [
            _ITEM_BYTES.get(kind, 4) * int(np.prod([int(n) for n in shape.split(",") if n]))
            for kind, shape in re.findall(r"(\w+)\[([\d,]*)\]", found[1])
        ]
        seen[channel[1] if channel else f"line {number}"] = (found[2], sum(sizes))
    counts = Counter(operation for operation, _ in seen.values())
    return dict(sorted(counts.items())), sum(size for _, size in seen.values())


def _seconds(figures: dict[str, Any], chip: Chip) -> float:
    """The roofline of one program."""
    return max(
        figures["flops_per_device"] / chip.flops,
        (figures["argument_bytes"] + figures["output_bytes"]) / chip.memory,
        figures["collective_bytes"] / chip.interconnect,
    )


def _advice(plan: Plan, worst: dict[str, Any], limit: int) -> list[str]:
    layout, request = plan.layout, plan.request
    share = plan.workload.parameter_bytes(layout) / limit
    devices = layout.mesh.size
    advice = []
    if layout.model < devices:
        larger = next(m for m in range(layout.model + 1, devices + 1) if devices % m == 0)
        advice.append(f"--mesh_shape {devices // larger} {larger}: less of the model a device")
    if share < 0.8:
        tokens = worst["rows"] * worst["length"] // devices // 2
        advice.append(f"--max_batch_tokens {tokens}: half as many rows of the longest prompts")
    if request.generates:
        advice.append(f"--max_output_tokens below {request.max_output_tokens}: a smaller cache")
    advice.append("--max_model_len: shorter prompts, with fewer train pairs")
    return advice


def print_prompts(plan: Plan) -> None:
    """What is known before anything is compiled, which takes minutes."""
    found = prompt_tokens(plan)
    skipped = found.pop("skipped")
    words = ", ".join(f"{name} {value}" for name, value in found.items())
    print(f"prompt tokens {words}, of {len(plan.samples)} samples; {skipped} skipped")
    print_shortfalls(plan)
    sys.stdout.flush()


def print_table(plans: Sequence[dict[str, Any]]) -> None:
    print(f"{'mesh':>8} {'GB':>7} {'fits':>5} {'prefill TFLOP':>14} {'tokens/s':>12} {'hours':>8}")
    for p in plans:
        mesh = "x".join(map(str, p["mesh_shape"]))
        if p["fits"]:
            flops = p["prefill"]["flops_per_device"] / 1e12
            rate, hours = p["estimated_tokens_per_second"], p["estimated_hours"]
            memory = p["hbm_bytes_per_device"] / 1e9
            print(f"{mesh:>8} {memory:7.2f} {'yes':>5} {flops:14.3f} {rate:12.0f} {hours:8.3f}")
        else:
            print(f"{mesh:>8} {'':>7} {'no':>5}")


def print_one(p: dict[str, Any]) -> None:
    data, model = p["mesh_shape"]
    limit = p["hbm_limit_bytes"] / 1e9
    print(f"slice         {p['slice']}: {p['devices']} devices, {p['processes']} hosts")
    print(f"mesh          {data} x {model} (data x model), attention {p['attention']}")
    need = "more" if p["hbm_bytes_per_device"] is None else f"{p['hbm_bytes_per_device'] / 1e9:.2f}"
    print(f"memory        {need} of {limit:.2f} GB a device: {'fits' if p['fits'] else 'too much'}")
    print(f"batches       {sum(b['batches'] for b in p['buckets'])}, {p['padding']:.1%} padding")
    print("  rows  tokens  batches  prefill TFLOP  ms at least  decode ms/step  GB a device")
    for b in p["buckets"]:
        if b["hbm_bytes"] is None:
            print(f"{b['rows']:6} {b['length']:7} {b['batches']:8}  {b['error'][:80]}")
            continue
        step = b["decode_step_seconds"]
        flops, ms = b["prefill"]["flops_per_device"] / 1e12, b["prefill_seconds"] * 1e3
        print(
            f"{b['rows']:6} {b['length']:7} {b['batches']:8} {flops:14.3f} {ms:12.2f} "
            f"{'' if step is None else format(step * 1e3, '.3f'):>15} {b['hbm_bytes'] / 1e9:12.2f}"
        )
    print(f"tokens        {p['num_tokens_total']} at most, of {p['num_samples']} samples")
    print(f"activations   {p['activation_bytes_total']} bytes at most, in {p['shards']} shards")
    storage, chip_hour = p["storage"], p["prices"]["usd_per_chip_hour"]
    if storage["bytes_total"]:
        print(
            f"storage       {storage['bytes_per_layer']} bytes a layer at most: "
            f"${storage['usd_per_month']:.2f} a month for all"
        )
    print(f"compiled      {p['programs']} programs in {p['compile_seconds']:.0f} s")
    if p["fits"]:
        print(
            f"cost          at least ${p['usd']:.2f} a pass, of {p['devices']} chips at "
            f"${chip_hour:.2f} an hour"
        )
        if (passes := p["passes_per_month_at_which_storing_pays"]) is not None:
            print(f"              storing pays from {passes:.1f} passes a month on")
        print(
            f"time          at least {p['estimated_hours'] * 60:.1f} min: at most "
            f"{p['estimated_tokens_per_second']:.0f} tokens/s, prefill alone "
            f"{p['estimated_prefill_tokens_per_second']:.0f} (a roofline: peak FLOPs, memory and "
            "interconnect, answers of full length)"
        )
    for line in p["advice"]:
        print(f"try           {line}")
