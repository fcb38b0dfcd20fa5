"""`--plan`: the run, compiled ahead of time for a TPU slice that is not here.

The programs are those that the run would launch, for the batches that it would launch, compiled by
libtpu; memory, FLOPs and collectives are the compiler's. Time is a roofline, an upper bound of what
the slice can reach: for each pass the longest of FLOPs over the peak rate, attention counted at the
width of the matrix unit, of bytes accessed over memory bandwidth, and of what collectives move over
the bandwidth of the interconnect; for a generated answer, that of one step times the longest answer
allowed.
"""

import logging
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict
from tqdm import tqdm

from utils.cli import COMPILER_ALONE
from utils.errors import UserError
from utils.model.generate import Shape
from utils.model.weights import parameters
from utils.plan.batching import Batch, padding_share, prefill_passes
from utils.plan.memory import device_bytes
from utils.plan.plan import Plan, plan_meshes
from utils.plan.request import Request
from utils.run.compute import Computation
from utils.run.dry_run import bytes_per_layer, plan_storage
from utils.run.prices import costs
from utils.run.roofline import CHIPS, Chip, decode_step_seconds, figures_of, prefill_seconds
from utils.run.summary import print_shortfalls
from utils.store.local import check_file, json_lines, write_result

log = logging.getLogger(__name__)


SLICES = {
    f"{name}-{chip.cores * prod(map(int, shape.split('x')))}": f"{name}:{shape}"
    for name, chip in CHIPS.items()
    for shape in chip.slices
}


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
        write_result(Path(plan_json), json_lines(chosen))
    return 0


def estimate(plan: Plan, name: str) -> dict[str, Any]:
    """The plan of a run on a slice; keys as the README of distributed inference explains them."""
    layout, request = plan.layout, plan.request
    chip = CHIPS[name.partition("-")[0]]
    mesh = layout.mesh
    computation = Computation(plan, params=_abstract(plan))
    by_shape: dict[Shape, list[Batch]] = {}
    for batch in plan.batches:
        by_shape.setdefault(batch.shape, []).append(batch)
    start = time.perf_counter()
    compiling = computation.engine.compiling(by_shape)
    bar = tqdm(compiling.items(), f"compiling for {name}", unit=" shapes", disable=None)
    figures = {shape: _figures(programs) for shape, programs in bar}
    compile_seconds = time.perf_counter() - start
    buckets = [_bucket(plan, by_shape[shape], found, chip) for shape, found in figures.items()]
    tokens, shards = plan_storage(plan)
    limit = device_bytes(mesh.devices.flat[0])
    worst = max(buckets, key=lambda b: b["hbm_bytes"] if b["hbm_bytes"] else float("inf"))
    need = worst["hbm_bytes"]
    fits = need is not None and need <= limit
    seconds = sum(bucket["seconds"] for bucket in buckets)
    prefill = fits and sum(bucket["prefill_seconds"] for bucket in buckets)
    lengths = [sample.length for sample in plan.samples]
    given = sum(length.total for length in lengths)  # prompts, and forced answers
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
        "programs": sum(map(len, compiling.values())),
        "compile_seconds": compile_seconds,
        "prefill": worst["prefill"],
        "decode": worst["decode"],
        "buckets": buckets,
        "padding": padding_share(lengths, plan.batches, layout.data),
        "estimated_tokens_per_second": tokens_computed(plan) / seconds if fits else None,
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


def tokens_computed(plan: Plan) -> int:
    """Those that go through the model, of every answer at its longest; of several predictions only
    the first is stored, and in `num_tokens_total`."""
    answers = len(plan.request.temperatures) * plan.request.room
    return sum(sample.length.total + answers for sample in plan.samples)


def prompt_tokens(plan: Plan) -> dict[str, int]:
    """Quantiles of the samples' prompt lengths, and how many samples are skipped."""
    lengths = [sample.length.prompt for sample in plan.samples]
    names = ("min", "p10", "median", "p90", "max")
    found = np.quantile(lengths, [0, 0.1, 0.5, 0.9, 1])
    quantiles = {name: round(float(value)) for name, value in zip(names, found, strict=True)}
    return {**quantiles, "skipped": len(plan.skipped)}


def _abstract(plan: Plan) -> Any:
    """The parameters as the run would hold them, without their values."""
    layout, dtype = plan.layout, np.dtype(plan.dtype)
    leaves = {}
    for path, parameter in parameters(plan.config).items():
        sizes, spec = parameter.placement(layout)
        leaves[path] = jax.ShapeDtypeStruct(sizes, dtype, sharding=layout.sharding(*spec))
    return unflatten_dict(leaves, sep="/")


def _figures(programs: Sequence[Future[Any]]) -> list[dict[str, Any]] | str:
    """Of a shape's programs, or why they do not fit."""
    try:
        return [figures_of(program.result()) for program in programs]
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "Ran out of memory" not in str(error):
            raise
        return str(error).splitlines()[0][:300]


def _bucket(
    plan: Plan, batches: Sequence[Batch], figures: list[dict[str, Any]] | str, chip: Chip
) -> dict[str, Any]:
    """The batches of one shape: its programs' figures, and the seconds that they take at least."""
    shape, data = batches[0].shape, plan.layout.data
    lengths = [sample.length for sample in plan.samples]
    found: dict[str, Any] = {
        **asdict(shape),
        "length": max(lengths[i].total for batch in batches for i in batch.rows if i >= 0),
        "batches": len(batches),
        "passes": sum(len(prefill_passes(batch, lengths, data)) for batch in batches),
    }
    if isinstance(figures, str):
        nothing = {"hbm_bytes": None, "prefill": None, "decode": None, "seconds": 0.0}
        return {**found, **nothing, "error": figures}
    prefill, *decodes = figures
    # While a pass computes, what the last one captured is still on its way to the host.
    waiting = plan.workload.capture_bytes(plan.layout, shape.rows)
    limits = prefill_seconds(plan, batches, prefill, chip)
    seconds = limits.pop("seconds")
    step = decode_step_seconds(plan, batches, decodes[0], chip) if decodes else None
    steps = len(batches) * len(plan.request.temperatures) * plan.request.room
    return {
        **found,
        # The parameters are there once, whichever program runs, and so is the cache.
        "hbm_bytes": max(each["hbm_bytes"] for each in figures) + waiting,
        "prefill": prefill,
        "decode": decodes[0] if decodes else None,
        "prefill_seconds": seconds,
        "prefill_seconds_by": limits,
        "decode_step_seconds": step,
        "seconds": seconds + steps * (step or 0),
    }


def _advice(plan: Plan, worst: dict[str, Any], limit: int) -> list[str]:
    layout, request = plan.layout, plan.request
    share = plan.workload.parameter_bytes(layout) / limit
    devices = layout.mesh.size
    advice = []
    if layout.model < devices:
        larger = next(m for m in range(layout.model + 1, devices + 1) if devices % m == 0)
        advice.append(f"--mesh_shape {devices // larger} {larger}: less of the model a device")
    half = worst["rows"] // 2 * worst["length"]
    longest = max(sample.length.total for sample in plan.samples)
    if share < 0.8 and half >= layout.data * longest:  # else not every group of devices has a row
        words = "half as many rows of the longest prompts"
        advice.append(f"--max_batch_tokens {-(-half // devices)}: {words}")
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
