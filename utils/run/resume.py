"""What there is of a run before it begins: in a bucket, and in the folders of its processes.

A folder may have been lost with its machine. What the manifests list, on the disks and in the
bucket together, is the run; only the rest is computed.
"""

import logging
from pathlib import Path
from typing import Any

from utils.arc.tasks import SampleKey
from utils.errors import UserError, some
from utils.plan.plan import Plan
from utils.run.peers import Peers
from utils.shards import manifest as stored
from utils.shards.held import Writer
from utils.shards.items import sample_name
from utils.shards.manifest import SHARD, Manifest
from utils.shards.writer import RunFolder
from utils.store.bucket import NameTaken, Receipt
from utils.store.local import json_lines

log = logging.getLogger(__name__)


def manifests_in(plan: Plan, settings: dict[str, Any]) -> dict[str, Manifest]:
    """File name -> manifest of the run that the bucket holds; none where it is empty, or no bucket.

    Raises UserError for a bucket that holds a run without --resume, or another run.
    """
    bucket, output = plan.bucket, Path(plan.request.output_path).name
    held = [name for name in plan.listing if stored.stem(name)]
    if not plan.request.resume:
        if not held and output not in plan.listing:
            return {}
        there = "holds a run" if held else f"holds {output} already"
        if "metadata.json" in held:
            run = stored.union_of(stored.read_manifests(bucket.uri))
            there = f"holds a run ({run['status']}, {run['total_samples']} samples)"
        raise UserError(
            f"{bucket} {there}: --resume continues a run; objects are never replaced, not with "
            "--overwrite either, so choose another prefix"
        )
    if not held and output in plan.listing:
        raise UserError(
            f"{bucket} holds {output} already, and no run to resume: choose another prefix"
        )
    manifests = stored.read_manifests(bucket.uri) if held else {}
    for manifest in manifests.values():
        if changes := stored.changed_settings(manifest, settings):
            raise UserError(
                f"{bucket} holds another run: {some(changes)}; choose another prefix, or go back "
                "to its settings"
            )
    return manifests


def restored_from(
    plan: Plan, manifests: dict[str, Manifest], writer: Writer, peers: Peers
) -> dict[str, bytes]:
    """File name -> content of the manifests and journals that this process takes from the bucket,
    which holds these manifests, because the folders of the run have lost them. Of several processes
    all call it.

    Raises UserError where the bucket and the folders do not speak of one run.
    """
    bucket, folder = plan.bucket, plan.run_folder
    local = stored.read_manifests(folder) if folder.exists() else {}
    known_here = {name: shard.crc32c for name, shard in stored.shards_of(local.values()).items()}
    said = peers.exchange("known", [sorted(local), known_here])
    known_manifests = {name for names, _ in said for name in names}
    known = {name: crc32c for _, files in said for name, crc32c in files.items()}
    listed = stored.shards_of(manifests.values())
    unknown = [name for name in plan.listing if SHARD.fullmatch(name) and name not in known]
    if unknown and not manifests:
        raise UserError(f"{bucket} holds a run's files but no metadata.json: choose another prefix")
    for name, shard in listed.items():
        lacking = name not in known and stored.manifest_name(shard.owner) in known_manifests
        if lacking or known.get(name, shard.crc32c) != shard.crc32c:
            raise UserError(
                f"{bucket} holds {name}, which {folder} does not know, or knows "
                "otherwise: it is another run's, so choose another prefix, or the folder is an "
                "older copy: move it away and --resume"
            )
    orphans = [name for name in unknown if name not in listed]
    if orphans and peers.index == 0:
        log.info(
            "%d shards in %s are in no manifest, %s for one: a machine was lost as it sent them; "
            "their samples are computed again; readers ignore them, and they can be deleted",
            *(len(orphans), bucket, orphans[0]),
        )
    restored: dict[str, bytes] = {}
    owners = {shard.owner for shard in listed.values()} | set(map(stored.owner_of, manifests))
    for owner in sorted(owners):
        name, journal = stored.manifest_name(owner), folder / stored.journal_name(owner)
        elsewhere = name in known_manifests and name not in local
        if elsewhere or not writer.looks_after(owner):
            continue
        if name in manifests and name not in local:
            restored[name] = bucket.read(name)
        elif name not in local and owner == writer.owner:  # another process sent and lists them
            files = [shard for shard in listed.values() if shard.owner == owner]
            own = stored.with_shards(next(iter(manifests.values())), files)
            restored[name] = json_lines({**own, "status": "running"})
        here = stored.whole_size(journal) if journal.exists() else 0
        if (there := plan.listing.get(journal.name)) and there.size > here:
            restored[journal.name] = bucket.read(journal.name)
    return restored


def settle(plan: Plan, folder: RunFolder, peers: Peers) -> set[SampleKey]:
    """The samples that are stored, in whichever process's folder; of several processes all call it.

    A shard that was sent to the bucket and is gone from there is lost. Tells `folder` which shards
    are lost, and for which it speaks. Raises UserError where folders hold the same sample, or one
    holds what another process is about to write: brought together, one would hide the other.
    """
    gone = _gone_from_bucket(plan, folder) if plan.bucket else set()
    said = peers.exchange("samples", _holdings(folder, gone))
    owners = {owner: index for index, owner in enumerate(folder.writer.owners)}
    unsound = {name for holdings in said for name in holdings["unsound"]}
    for holdings in said:  # who shares a folder does not look at what others wrote
        for kind in ("there", "files"):
            holdings[kind] = [name for name in holdings[kind] if name not in unsound]
    _check_that_folders_fit(said, owners)
    there = {name for holdings in said for name in holdings["there"]}
    listed = {name: samples for h in said for name, (_, samples) in h["listed"].items()}
    lost = {name for holdings in said for name in holdings["missing"]}
    lost = (lost | {name for name in listed if stored.owner_of(name) in owners}) - there
    if lost and peers.index == 0:
        log.warning(
            "%d shards are missing or damaged, or lack answers, and their samples are computed "
            "again: %s",
            *(len(lost), some(sorted(lost))),
        )
    if (elsewhere := listed.keys() - lost - there) and peers.index == 0:
        log.warning(
            "%d shards that the run lists are in none of these folders: %s; if the disk that had "
            "them is lost, --resume with as many processes as wrote the run computes their samples "
            "again",
            *(len(elsewhere), some(sorted(elsewhere))),
        )
    speaker: dict[str, int] = {}  # who wrote it; else the first who has the file, or lists it
    for kind in ("files", "listed"):
        for index, holdings in enumerate(said):
            for name in holdings[kind]:
                host = owners.get(stored.owner_of(name), index)
                speaker.setdefault(name, host if name in said[host]["listed"] else index)
    mine = {name for name, index in speaker.items() if index == peers.index}
    folder.settle(lost, mine)
    return {tuple(key) for name in listed.keys() - lost for key in listed[name]}


def _gone_from_bucket(plan: Plan, folder: RunFolder) -> set[str]:
    """The shards that were sent to the bucket, are not there any more, and have no file here."""
    return {
        name
        for name, shard in folder.held.shards.items()
        if isinstance(shard.uploaded, dict)
        and shard.uploaded["uri"] == plan.bucket.uri_of(name)
        and name not in plan.listing
        and not folder.held.has_file(shard)
    }


def _holdings(folder: RunFolder, gone: set[str]) -> dict[str, Any]:
    """What a process tells the others of its folder, in JSON. gone: shards that are not where they
    were sent."""
    held = folder.held
    return {
        "folder": str(folder.path),
        "listed": {name: [s.crc32c, s.samples] for name, s in held.shards.items()},
        "there": sorted(held.there - gone),
        "files": sorted(name for name in held.there if (folder.path / name).is_file()),
        "missing": sorted(held.missing | gone),
        "unsound": sorted(held.unsound),
    }


def _check_that_folders_fit(said: list[dict[str, Any]], owners: dict[str, int]) -> None:
    holders: dict[SampleKey, tuple[str, int]] = {}
    for index, holdings in enumerate(said):
        twice = []
        for name in holdings["there"]:
            crc32c, samples = holdings["listed"][name]
            for key in map(tuple, samples):
                shard, other = holders.setdefault(key, (f"{name} {crc32c}", index))
                if shard != f"{name} {crc32c}":
                    twice.append((key, other))
        if twice:
            key, other = twice[0]
            raise UserError(
                f"{holdings['folder']} of process {index} and {said[other]['folder']} of process "
                f"{other} both hold {len(twice)} samples, {sample_name(key)} for one: move one of "
                "the folders away"
            )
    for index, holdings in enumerate(said):
        for name in holdings["files"]:
            host = owners.get(stored.owner_of(name), index)
            if name not in said[host]["files"]:
                raise UserError(
                    f"{holdings['folder']} of process {index} holds shards of process {host}, "
                    f"which writes to {said[host]['folder']}: give each process the folder that "
                    "it had"
                )


def uploaded_before(plan: Plan, folder: RunFolder) -> dict[str, Receipt]:
    """Of the shards that this process speaks for, those that the bucket holds. Raises UserError for
    one that it holds with other content, and for one that is nowhere any more."""
    receipts = {}
    for name, shard in folder.shards.items():
        if name not in folder.speaks_for:
            continue
        there = plan.listing.get(name)
        if there is None:
            if not (folder.path / name).is_file():
                was = shard.uploaded["uri"] if isinstance(shard.uploaded, dict) else ""
                way_on = "put it back, or start again with another --activations_dir and prefix"
                if was and was != plan.bucket.uri_of(name):
                    way_on = f"it was sent to {was}, so resume with that --cloud_bucket"
                raise UserError(
                    f"{name} is neither in {folder.path} nor in {plan.bucket}: {way_on}"
                )
        elif there.holds(shard.size_bytes, shard.crc32c):
            receipts[name] = there
        else:
            raise NameTaken(
                f"{there.uri} (crc32c {there.crc32c}) holds other content than "
                f"{folder.path / name} (crc32c {shard.crc32c}): another run writes under this "
                "prefix; choose another"
            )
    return receipts
