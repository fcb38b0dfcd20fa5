"""When a shard is full: one rule, for a run and for its dry run."""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from utils.shards.items import array_bytes, shard_bytes, stored_item


class OpenShard:
    """The shard being filled, and the one rule, the dry run's too, of when it is closed.

    That is after `save_every_n_samples` samples, and before an item that would push its arrays past
    `max_shard_mb` megabytes (10^6 bytes); an item larger than that has a shard of its own.
    """

    def __init__(self, save_every_n_samples: int | None, max_shard_mb: float):
        self._max_samples = save_every_n_samples or float("inf")
        self._max_bytes = max_shard_mb * 1e6
        self.clear()

    def clear(self) -> None:
        self.items: list[dict[str, Any]] = []
        self._bytes = 0

    def lacks_room_for(self, item: dict[str, Any]) -> bool:
        return bool(self.items) and self._bytes + array_bytes(item) > self._max_bytes

    def append(self, item: dict[str, Any]) -> None:
        self.items.append(item)
        self._bytes += array_bytes(item)

    @property
    def is_full(self) -> bool:
        return len(self.items) >= self._max_samples


def planned_shards(
    items: Iterable[dict[str, Any] | None],
    activation_dtype: str,
    save_every_n_samples: int | None,
    max_shard_mb: float,
) -> Iterator[tuple[int, int]]:
    """(samples, file size in bytes) of each shard that `RunFolder` would make of `items`.

    Arrays of `np.zeros` in the stored dtype take no memory. None stands for a `seal()`.
    """
    shard = OpenShard(save_every_n_samples, max_shard_mb)
    for item in itertools.chain(items, [None]):
        stored = item and stored_item(item, activation_dtype)
        if shard.items and (stored is None or shard.is_full or shard.lacks_room_for(stored)):
            yield len(shard.items), shard_bytes(shard.items)
            shard.clear()
        if stored is not None:
            shard.append(stored)
