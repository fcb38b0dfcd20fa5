"""What a bucket holds of a run before the run begins: nothing, another run, or a part of this one.

A folder may have been lost with its machine; what the bucket's manifests list is then the run, and
only the rest is computed.
"""

import logging
from pathlib import Path
from typing import Any

from utils.errors import UserError, some
from utils.run.peers import Peers
from utils.shards.manifest import (
    SHARD,
    Manifest,
    differences,
    merge_manifests,
    owner_of,
    read_manifests,
    stem,
)
from utils.shards.writer import Elsewhere
from utils.store.bucket import BucketFolder, NameTaken, Receipt

log = logging.getLogger(__name__)

Listing = dict[str, Receipt]


def look_for_run(
    bucket: BucketFolder,
    listing: Listing,
    folder: Path,
    output: str,
    settings: dict[str, Any],
    resume: bool,
    peers: Peers,
) -> Elsewhere:
    """What this process is to take over from the bucket. Of several processes all call it.

    listing: of the bucket's objects. folder: of the run. output: name of the predictions or of the
    submission. settings: of `ShardWriter`. Raises UserError for a bucket that holds a run without
    `resume`, or another run than `folder`.
    """
    held = [name for name in listing if stem(name)]
    if not resume:
        if not held and output not in listing:
            return Elsewhere(names=listing)
        there = "holds a run" if held else f"holds {output} already"
        if "metadata.json" in held:
            run = merge_manifests(read_manifests(bucket.uri))
            there = f"holds a run ({run['status']}, {run['total_samples']} samples)"
        raise UserError(
            f"{bucket} {there}: --resume continues a run; objects are never replaced, not with "
            "--overwrite either, so choose another prefix"
        )
    local = read_manifests(folder) if folder.exists() else {}
    here = {
        entry["filename"]: entry["crc32c"]
        for manifest in local.values()
        for entry in manifest["files"]
        if not entry.get("elsewhere")
    }
    said = peers.exchange("known", [sorted(local), here])
    known_manifests = {name for names, _ in said for name in names}
    known = {name: crc32c for _, files in said for name, crc32c in files.items()}
    if not held and output in listing:
        raise UserError(
            f"{bucket} holds {output} already, and no run to resume: choose another prefix"
        )
    manifests = read_manifests(bucket.uri) if held else {}
    if not manifests:
        if all(name in known for name in filter(SHARD.fullmatch, held)):
            return Elsewhere(names=listing)
        raise UserError(f"{bucket} holds a run's files but no metadata.json: choose another prefix")
    for manifest in manifests.values():
        if changes := differences({key: manifest.get(key) for key in settings}, settings):
            raise UserError(
                f"{bucket} holds another run: {some(changes)}; choose another prefix, or go back "
                "to its settings"
            )
    listed = merge_manifests(manifests)["files"]
    names = known.keys() | {entry["filename"] for entry in listed}
    orphans = [name for name in held if SHARD.fullmatch(name) and name not in names]
    if orphans and peers.index == 0:
        log.info(
            "%d shards in %s are in no manifest, %s for one: a machine was lost as it sent them; "
            "their samples are computed again; readers ignore them, and they can be deleted",
            *(len(orphans), bucket, orphans[0]),
        )
    owners = {f"_host{i:03d}" for i in range(peers.count)} if peers.count > 1 else {""}
    own = f"_host{peers.index:03d}" if peers.count > 1 else ""
    taken: dict[str, Manifest] = {}
    if own == "" and "metadata.json" in manifests and "metadata.json" not in known_manifests:
        taken["metadata.json"] = {**manifests["metadata.json"], "files": []}
    for entry in listed:
        owner, name = owner_of(entry["filename"]), f"metadata{owner_of(entry['filename'])}.json"
        if owner != own and (peers.index or owner in owners):
            continue  # another process looks after it
        if (crc32c := known.get(entry["filename"])) == entry["crc32c"]:
            continue
        if crc32c or name in known_manifests:
            raise UserError(
                f"{bucket} holds {entry['filename']}, which {folder} does not know, or knows "
                "otherwise: it is another run's, so choose another prefix, or the folder is an "
                "older copy: move it away and --resume"
            )
        base = manifests.get(name) or next(iter(manifests.values()))
        adopted = taken.setdefault(name, {**base, "files": []})
        entry = {key: value for key, value in entry.items() if key != "elsewhere"}
        adopted["files"] = [*adopted["files"], entry]
    journals = [f"answers{owner_of(name)}.jsonl" for name, part in taken.items() if part["files"]]
    return Elsewhere(
        taken,
        listing,
        {name: bucket.read(name) for name in journals if name in listing},
        [{key: entry[key] for key in entry if key != "elsewhere"} for entry in listed],
    )


def uploaded_before(
    bucket: BucketFolder, listing: Listing, folder: Path, entries: list[dict[str, Any]]
) -> dict[str, Receipt]:
    """Of the shards, those that the bucket holds. Raises UserError for one that it holds with other
    content, and for one that is nowhere any more."""
    receipts = {}
    for entry in entries:
        name = entry["filename"]
        there = listing.get(name)
        if there is None:
            if not (folder / name).is_file():
                was = entry["uploaded"]["uri"] if entry["uploaded"] else ""
                way_on = "put it back, or start again with another --activations_dir and prefix"
                if was and was != bucket.uri_of(name):
                    way_on = f"it was sent to {was}, so resume with that --cloud_bucket"
                raise UserError(f"{name} is neither in {folder} nor in {bucket}: {way_on}")
        elif there.holds(entry["size_bytes"], entry["crc32c"]):
            receipts[name] = there
        else:
            raise NameTaken(
                f"{there.uri} (crc32c {there.crc32c}) holds other content than {folder / name} "
                f"(crc32c {entry['crc32c']}): another run writes under this prefix; choose another"
            )
    return receipts
