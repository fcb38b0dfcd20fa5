"""When a shard is full: one rule, for a run and for its dry run."""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from utils.shards.int8 import Errors, joined
from utils.shards.items import array_bytes, float16_overflows, sample_key, stored_item
from utils.shards.manifest import Shard
from utils.shards.pickles import shard_bytes
from utils.store.local import Sink


class OpenShard:
    """The shard being filled, and the one rule, the dry run's too, of when it is closed.

    That is after `save_every_n_samples` samples, and before an item that would push its arrays past
    `max_shard_mb` megabytes (10^6 bytes); an item larger than that has a shard of its own.
    """

    def __init__(
        self, save_every_n_samples: int | None, max_shard_mb: float, activation_dtype: str
    ):
        self._dtype = activation_dtype
        self._max_samples = save_every_n_samples or float("inf")
        self._max_bytes = max_shard_mb * 1e6
        self.clear()

    def clear(self) -> None:
        self.items: list[dict[str, Any]] = []
        self.answers: list[str] = []  # their lines in the journal
        self._errors: Errors = {}
        self._bytes = self._non_finite = 0

    def lacks_room_for(self, item: dict[str, Any]) -> bool:
        return bool(self.items) and self._bytes + array_bytes(item) > self._max_bytes

    def append(
        self, item: dict[str, Any], errors: Errors, answer: str = "", non_finite: int = 0
    ) -> None:
        """errors: what int8 changed, by activation; none of an item that is not stored as int8.
        non_finite: its `non_finite_rows`."""
        self.items.append(item)
        self.answers.append(answer)
        self._errors = joined(self._errors, errors)
        self._bytes += array_bytes(item)
        self._non_finite += non_finite

    @property
    def is_full(self) -> bool:
        return len(self.items) >= self._max_samples

    def as_written(self, filename: str, sink: Sink) -> Shard:
        """What the manifest lists, once `sink` has taken the items."""
        return Shard(
            filename=filename,
            num_samples=len(self.items),
            num_tokens=sum(len(item["input_ids"]) for item in self.items),
            size_bytes=sink.size,
            crc32c=sink.crc32c,
            samples=tuple(map(sample_key, self.items)),
            float16_overflows=sum(float16_overflows(item, self._dtype) for item in self.items),
            non_finite=self._non_finite,
            relative_error=self._errors,
        )


def planned_shards(
    items: Iterable[dict[str, Any] | None],
    activation_dtype: str,
    save_every_n_samples: int | None,
    max_shard_mb: float,
) -> Iterator[tuple[int, int]]:
    """(samples, file size in bytes) of each shard that `RunFolder` would make of `items`.

    Arrays of `np.zeros` in the stored dtype take no memory, and those of int8 have their scales.
    None stands for a `seal()`.
    """
    shard = OpenShard(save_every_n_samples, max_shard_mb, activation_dtype)
    for item in itertools.chain(items, [None]):
        stored = item and stored_item(item, activation_dtype)
        if shard.items and (stored is None or shard.is_full or shard.lacks_room_for(stored)):
            yield len(shard.items), shard_bytes(shard.items)
            shard.clear()
        if stored is not None:
            shard.append(stored, {})
