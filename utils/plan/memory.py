"""What a forward pass takes on one device, estimated: decides the mesh and how many rows fit.

An estimate from shapes alone, nothing compiled; `--plan` asks the compiler.
"""

# B batch   T prompt slots   A answer slots   D model width   F mlp width   V vocabulary
# N query heads   K key/value heads   H head width

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

import jax

from utils.errors import UserError
from utils.model.attention import SCORE_BYTES
from utils.model.capture import CaptureSpec
from utils.model.config import ModelConfig
from utils.model.layout import Layout
from utils.model.weights import abstract_params, placement
from utils.plan.batching import aligned

USABLE = 0.9  # share of a device's memory that the estimate may fill
# The TPU compiler holds more at once than the widest moment needs, to overlap: 1.8 times as much
# for Qwen2.5-7B's shape on v5e-8.
OVERLAP = 2
# Bytes of a chip's memory as JAX reports it: Google's system architecture pages.
HBM_BYTES = {
    "TPU v4": 32 * 2**30,
    "TPU v5 lite": 16 * 2**30,
    "TPU v5": 95 * 2**30,
    "TPU v5p": 95 * 2**30,
    "TPU v6 lite": 32 * 2**30,
}


def device_bytes(device: jax.Device) -> int | None:
    """Memory of a device that a program can have; None for a CPU, whose memory is everybody's."""
    if device.platform == "cpu":
        return None
    if (known := HBM_BYTES.get(device.device_kind)) is not None:
        return known
    stats = device.memory_stats()
    return stats["bytes_limit"] if stats else None


@dataclass(frozen=True)
class Workload:
    """What is computed of each batch.

    answer: slots that a generated answer can take behind the prompt's, 0 for none. itemsize: bytes
    of a value of the model. forced: tokens of the longest answer that is forced, 0 for none; they
    are among the prompt's slots.
    """

    config: ModelConfig
    capture: CaptureSpec
    answer: int
    itemsize: int
    forced: int = 0

    def parameter_bytes(self, layout: Layout) -> int:
        """Of one device."""
        total = 0
        for path, shape in abstract_params(self.config).items():
            sizes, spec = placement(path, shape, layout)
            total += prod(sizes) // (layout.model if "model" in spec else 1)
        return total * self.itemsize

    def cache_bytes(self, layout: Layout, rows: int, length: int) -> int:
        """Keys and values of `rows` rows of `length` prompt slots, on one device."""
        if not self.answer:
            return 0
        c = self.config
        slots = layout.cache_size(length, self.answer)
        values = 2 * c.num_layers * c.num_kv_heads * c.head_dim * slots
        return rows // layout.data * values // layout.model * self.itemsize

    def capture_bytes(self, layout: Layout, rows: int, length: int) -> int:
        """What is captured of `rows` rows, on one device."""
        devices = layout.mesh.size if rows % layout.mesh.size == 0 else layout.data
        kept = len(self.capture.rows(length, self.answer + self.forced))
        slots = min(kept, length + self.answer)
        width = self.config.hidden_size * len(self.capture.names) * self.itemsize
        return rows * slots * width // devices

    def temporary_bytes(self, layout: Layout, rows: int, length: int) -> int:
        """The widest moment of a forward pass, on one device."""
        c, model = self.config, layout.model
        tokens = rows // layout.data * length
        stream = 6 * tokens // model * c.hidden_size * self.itemsize
        mlp = (3 * tokens // model * c.intermediate_size) * self.itemsize
        gathered = 0 if model == 1 else 6 * c.hidden_size * c.intermediate_size * self.itemsize
        if layout.by_heads and model > 1:
            gathered += 2 * tokens * c.hidden_size * self.itemsize
        scores = rows // layout.data * c.num_heads * length * length // model * 4
        logits = 3 * (rows // layout.data) * layout.padded(c.vocab_size) // model * 4
        return OVERLAP * (stream + mlp + gathered + 2 * min(scores, SCORE_BYTES) + logits)

    def batch_bytes(self, layout: Layout, rows: int, length: int) -> int:
        """On one device; captures twice, since the last batch's are fetched while the next one
        computes."""
        return (
            self.cache_bytes(layout, rows, length)
            + 2 * self.capture_bytes(layout, rows, length)
            + self.temporary_bytes(layout, rows, length)
        )


def rows_that_fit(
    work: Workload, layout: Layout, limit: int | None, most: int, lengths: Iterable[int]
) -> dict[int, int]:
    """Prompt slots a row, of each of `lengths` -> rows of a batch, a multiple of the data axis, at
    most `most`, that fit in `limit` bytes a device; 0 where none do."""
    if limit is None:
        return dict.fromkeys(lengths, most)
    room = USABLE * limit - work.parameter_bytes(layout)
    counts = range(most // layout.data * layout.data, 0, -layout.data)
    return {
        length: next((n for n in counts if work.batch_bytes(layout, n, length) <= room), 0)
        for length in lengths
    }


def first_that_fits(
    work: Workload, layouts: Iterable[Layout], longest: int, limit: int | None
) -> Layout:
    """The first layout with which a row of the longest prompt fits on every device.

    limit: bytes of a device. Raises UserError when there is none.
    """
    needs = []
    for layout in layouts:
        devices = layout.mesh.size
        length = aligned(longest, layout.alignment)
        needs.append(work.parameter_bytes(layout) + work.batch_bytes(layout, devices, length))
        if limit is None or needs[-1] <= USABLE * limit:
            return layout
    raise UserError(
        f"a prompt of {longest} tokens does not fit on {devices} devices of {limit / 1e9:.1f} GB: "
        f"about {min(needs) / 1e9:.1f} GB each are needed; lower --max_model_len, "
        "--max_output_tokens or the layers, or take more devices"
    )
