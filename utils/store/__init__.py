"""Bytes under a name, on a disk or in a bucket: whole, or not there. Knows no shards."""
