"""Items in files, each sample once: `load_shard`, `iter_items`, `python -m utils.shards merge`."""

from utils.shards.reader import iter_items, load_shard

__all__ = ["iter_items", "load_shard"]
