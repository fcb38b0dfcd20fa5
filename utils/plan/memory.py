"""What a forward pass takes on one device, estimated: decides the mesh and how many rows fit.

An estimate from shapes alone, nothing compiled; `--plan` asks the compiler.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

import jax

from utils.model.capture import CaptureSpec, width_of
from utils.model.config import ModelConfig
from utils.model.layout import Layout
from utils.model.weights import parameters

USABLE = 0.9  # share of a device's memory that the estimate may fill
# The TPU compiler holds more at once than the widest moment needs, to overlap: 1.8 times as much
# for Qwen2.5-7B's shape on v5e-8.
OVERLAP = 2
LANES = 128  # of a TPU's registers: what the attention kernel sees is padded to them
# Bytes of a chip's memory as JAX reports it: Google's system architecture pages.
HBM_BYTES = {
    "TPU v4": 32 * 2**30,
    "TPU v5 lite": 16 * 2**30,
    "TPU v5": 95 * 2**30,
    "TPU v5p": 95 * 2**30,
    "TPU v6 lite": 32 * 2**30,
}


def device_bytes(device: jax.Device) -> int | None:
    """Memory of a device that a program can have, of a CPU its share of the machine's; None where
    it is not known."""
    if device.platform == "cpu":
        pages, size = (os.sysconf(name) for name in ("SC_PHYS_PAGES", "SC_PAGE_SIZE"))
        return pages * size // jax.local_device_count("cpu")
    if (known := HBM_BYTES.get(device.device_kind)) is not None:
        return known
    stats = device.memory_stats()
    return stats["bytes_limit"] if stats else None


@dataclass(frozen=True)
class Workload:
    """What is computed of each batch.

    chunk: tokens of a row that prefill takes at once. room: slots that a generated answer can take
    behind the prompt's, 0 for none. itemsize: bytes of a value of the model.
    """

    config: ModelConfig
    capture: CaptureSpec
    chunk: int
    room: int
    itemsize: int

    def parameter_bytes(self, layout: Layout, tokens: int | None = None) -> int:
        """Of one device; with `tokens`, what these read, who may all be given to other experts."""
        total, c = 0, self.config
        for path, parameter in parameters(c).items():
            sizes, spec = parameter.placement(layout)
            if tokens is not None and "expert_" in path:
                sizes = min(c.num_experts, tokens * c.experts_per_token), *sizes[1:]
            total += prod(sizes) // (layout.model if "model" in spec else 1)
        return total * self.itemsize

    def cache_bytes(self, layout: Layout, rows: int, slots: int) -> int:
        """Keys and values of `rows` rows, on one device."""
        c = self.config
        values = 2 * c.num_layers * c.num_kv_heads * c.head_dim * slots
        sharing = layout.model if layout.by_heads else 1
        return rows // layout.data * values // sharing * self.itemsize

    def capture_bytes(self, layout: Layout, rows: int) -> int:
        """What a pass captures on one device: a chunk of a row, or the answers of its group's."""
        width = sum(width_of(self.config, name) for name in self.capture.names) * self.itemsize
        chunk = self.chunk if self.capture.in_prefill or not self.room else 0
        answers = rows // layout.data * self.room if self.capture.in_decode else 0
        return max(chunk, answers) * width

    def temporary_bytes(self, layout: Layout, rows: int) -> int:
        """The widest moment of a pass, on one device."""
        c, model, tokens = self.config, layout.model, self.chunk
        stream = 6 * tokens // model * c.hidden_size * self.itemsize
        mlp = (3 * tokens // model * c.intermediate_size) * self.itemsize
        gathered = 0 if model == 1 else 6 * c.hidden_size * c.intermediate_size * self.itemsize
        if c.num_experts:  # a row for each of a token's experts, and no kernel that moves
            width = 3 * c.hidden_size + 3 * c.intermediate_size // model
            mlp, gathered = tokens * c.experts_per_token * width * self.itemsize, 0
        if layout.by_heads and model > 1:
            gathered += 2 * tokens * c.hidden_size * self.itemsize
        heads = 4 * tokens * c.num_heads // model * max(c.head_dim, LANES) * self.itemsize
        logits = 3 * (rows // layout.data) * layout.padded(c.vocab_size) // model * 4
        return OVERLAP * (stream + mlp + gathered + heads + logits)

    def batch_bytes(self, layout: Layout, rows: int, slots: int) -> int:
        """On one device; captures twice, since those of a pass are fetched while the next one is
        computed."""
        return (
            self.cache_bytes(layout, rows, slots)
            + 2 * self.capture_bytes(layout, rows)
            + self.temporary_bytes(layout, rows)
        )


def rows_that_fit(
    work: Workload, layout: Layout, limit: int | None, most: int, sizes: Iterable[int]
) -> dict[int, int]:
    """Slots of a cache, each of `sizes` -> rows of a batch, a multiple of the data axis, at most
    `most`, that fit in `limit` bytes a device; 0 where none do."""
    if limit is None:
        return dict.fromkeys(sizes, most)
    room = USABLE * limit - work.parameter_bytes(layout)
    counts = range(most // layout.data * layout.data, 0, -layout.data)
    return {
        slots: next((n for n in counts if work.batch_bytes(layout, n, slots) <= room), 0)
        for slots in sizes
    }
