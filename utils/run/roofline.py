"""What a chip can reach at most: how long the passes of a batch take, from their compiled programs.

The compiler counts a program as if its attention met an average chunk, and a loop's body once. So
what attention takes is exchanged for what it takes of the chunk that a pass really computes.
"""

# C tokens of a chunk   N query heads   K key/value heads   H head width   S slots of a cache

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from utils.model.flash import LANES, block_sizes, cost
from utils.plan.batching import Batch, prefill_passes
from utils.plan.plan import Plan

MXU_SHARE = 0.8  # of its peak that the attention kernel reaches, by the compiler's schedule
_COLLECTIVES = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
_ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4}


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


def figures_of(program: Any) -> dict[str, Any]:
    """What the compiler says of a program, per device; of a loop, one pass."""
    said, memory = program.cost_analysis(), program.memory_analysis()
    collectives, moved = collectives_of(program.as_text())
    arguments, results = memory.argument_size_in_bytes, memory.output_size_in_bytes
    temporary, code = memory.temp_size_in_bytes, memory.generated_code_size_in_bytes
    return {
        "flops_per_device": said.get("flops", 0.0),
        "bytes_accessed_per_device": said.get("bytes accessed", 0.0),
        "argument_bytes": arguments,
        "output_bytes": results,
        "temporary_bytes": temporary,
        "code_bytes": code,
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


def prefill_seconds(
    plan: Plan, batches: Sequence[Batch], figures: dict[str, Any], chip: Chip
) -> dict[str, float]:
    """Of the prefill of batches of one shape, at least, by each limit alone: `flops`; `width`, with
    attention at the width of the matrix unit; `bytes` of memory; `collectives`; and `seconds`, each
    pass by its longest."""
    lengths = [sample.length for sample in plan.samples]
    starts = Counter(
        max(number for _, number in chunks) * batch.shape.chunk
        for batch in batches
        for chunks in prefill_passes(batch, lengths, plan.layout.data)
    )
    total = dict.fromkeys(("flops", "width", "bytes", "collectives", "seconds"), 0.0)
    for start, passes in starts.items():
        found = _pass_seconds(plan, batches[0].shape, start, figures, chip)
        for limit, seconds in {**found, "seconds": max(found.values())}.items():
            total[limit] += passes * seconds
    return total


def _pass_seconds(
    plan: Plan, shape: Any, start: int, figures: dict[str, Any], chip: Chip
) -> dict[str, float]:
    c, layout, item = plan.config, plan.layout, plan.workload.itemsize
    N, K, C, H, M = c.num_heads, c.num_kv_heads, shape.chunk, c.head_dim, layout.model
    own = (N // M, K // M, C) if layout.by_heads else (N, K, C // M)
    flops, moved, scores = figures["flops_per_device"], figures["bytes_accessed_per_device"], 0
    for layer, window in enumerate(c.sliding_windows):
        stated = cost(1, *own, shape.slots, H, item, c.scores(layer))
        flops, moved = flops - stated.flops, moved - stated.bytes_accessed
        seen = np.arange(start + 1, start + C + 1)
        scores += int((seen if window is None else np.minimum(seen, window)).sum()) * N // M
    queries, _ = block_sizes(N // K, own[2], shape.slots, item)
    # A block of queries fetches a key and its value once for all the heads of a group.
    moved += 2 * H * item * (2 * C * N // M * c.num_layers + scores * K // N // queries)
    width = -(-H // LANES) * LANES
    return {
        "flops": (flops + 4 * H * scores) / chip.flops,
        "width": (flops + 4 * width * scores / MXU_SHARE) / chip.flops,
        "bytes": moved / chip.memory,
        "collectives": figures["collective_bytes"] / chip.interconnect,
    }


def decode_step_seconds(
    plan: Plan, batches: Sequence[Batch], figures: dict[str, Any], chip: Chip
) -> float:
    """Of a step of these batches, at least: parameters, and half-full answers behind the prompts,
    are read once."""
    work, layout, rows = plan.workload, plan.layout, batches[0].shape.rows
    prompts = [plan.samples[i].length.prompt for batch in batches for i in batch.rows if i >= 0]
    context = round(float(np.mean(prompts))) + work.room // 2
    read = work.parameter_bytes(layout, rows // layout.data) + work.cache_bytes(
        layout, rows, context
    ) // (1 if layout.by_heads else layout.model)
    return max(
        read / chip.memory,
        figures["flops_per_device"] / chip.flops,
        figures["collective_bytes"] / chip.interconnect,
    )
