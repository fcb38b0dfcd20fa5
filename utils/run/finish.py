"""How a run ends: the answers of all processes make one output, their manifests one manifest, and
what goes to a bucket has arrived there."""

import json
import logging
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from utils.arc import scores as scoring
from utils.errors import UserError
from utils.plan.plan import Prepared
from utils.run.compute import Usage
from utils.run.ending import Ending
from utils.run.peers import Peers
from utils.shards.items import sample_key, sample_name
from utils.shards.manifest import (
    Manifest,
    merge_manifests,
    read_answers,
    read_manifests,
    stem,
    totals,
)
from utils.shards.uploads import Uploads
from utils.shards.writer import ShardWriter
from utils.store.local import write_json_atomic

log = logging.getLogger(__name__)


def finish(
    prepared: Prepared, writer: ShardWriter, usage: Usage, peers: Peers, leads: bool
) -> dict[str, Any]:
    """Closes the last shard; the first process writes the output and the manifest of all."""
    request, folder = prepared.request, prepared.run_folder
    writer.close_shard()
    usages = peers.exchange("usage", asdict(usage))
    stored: dict[str, Any] = {"manifests": {}, "answers": []}
    if leads:  # for all that write to this folder
        stored["manifests"] = read_manifests(folder)
        stored["answers"] = list(read_answers(folder, all_here=peers.count == 1).values())
    parts = [json.loads(part) for part in peers.gather(json.dumps(stored).encode())]
    extra: dict[str, Any] = {"useful_slots": _useful(usages)}
    if peers.index == 0:
        answers = {sample_key(a): a for part in parts for a in part["answers"]}
        if missing := [s.key for s in prepared.samples if s.key not in answers]:
            raise UserError(
                f"the answers to {len(missing)} samples are in none of the folders, the first "
                f"to {sample_name(missing[0])}: bring the folder of the process that made "
                "them, or --overwrite"
            )
        if request.augmentations > 1:
            answers = scoring.vote(answers)
        targets = {t.task_id: [pair.output for pair in t.test] for t in prepared.tasks}
        predictions = scoring.predictions(targets, answers, generated=request.generates)
        if request.generates:
            extra["scores"] = scoring.accuracy(predictions)
        submission = scoring.submission(targets, answers)
        output = submission if request.distributed else predictions
        write_json_atomic(request.output_path, output)
    manifest = writer.finish(extra)
    if peers.count > 1 and peers.index == 0:
        manifest = _merge(parts, stored["manifests"], manifest)
        write_json_atomic(folder / "metadata.json", manifest)
    peers.exchange("finished", None)
    if request.activations_dir is None and leads:
        _keep_manifest_alone(folder, manifest if peers.index == 0 else None)
    return manifest


def _keep_manifest_alone(folder: Path, manifest: Manifest | None) -> None:
    """Of a run without activations: --resume compares with it; what it lists served its purpose."""
    if manifest is not None:
        write_json_atomic(folder / "metadata.json", {**manifest, "files": []})
    for name in os.listdir(folder):
        if stem(name) and name != "metadata.json":
            (folder / name).unlink()


def _merge(parts: list[dict[str, Any]], here: dict[str, Manifest], manifest: Manifest) -> Manifest:
    """The manifest of all processes, whether their folders are this one or not."""
    manifests: dict[str, Manifest] = {}
    for part in reversed(parts):  # of `metadata.json`, of an earlier run, the first folder's counts
        manifests |= part["manifests"]
    at_hand = {entry["filename"] for m in here.values() for entry in m["files"]}
    merged = merge_manifests(manifests)
    for entry in merged["files"]:
        if entry["filename"] not in at_hand:
            entry["elsewhere"] = True  # in the folder of another process
    of_all = ("files", "skipped", "seconds", "compile_seconds", "tokens_per_second", *totals([]))
    return {**merged, **{key: manifest[key] for key in manifest if key not in of_all}}


def _useful(usages: list[dict[str, int]]) -> dict[str, float | None]:
    """Share of the computed slots, of prefill and of decoding, that held a sample's token."""
    total = {key: sum(usage[key] for usage in usages) for key in usages[0]}

    def share(kind: str) -> float | None:
        return total[f"{kind}_useful"] / total[kind] if total[kind] else None

    return {"prefill": share("prefill"), "decode": share("decode")}


def last_files(
    prepared: Prepared, writer: ShardWriter, peers: Peers
) -> tuple[list[Path], list[Path]]:
    """What goes to the bucket once the shards are there: of this process, and then of all; the
    manifest by which a reader knows that the run is complete comes last."""
    extracts, several = prepared.request.activations_dir is not None, peers.count > 1
    own = [*writer.other_journals(), writer.journal_path] if extracts else []
    own += [writer.manifest_path] * (extracts and several)
    output = Path(prepared.request.output_path)
    return own, [] if peers.index else [output, writer.folder / "metadata.json"]


def send_the_rest(
    prepared: Prepared,
    writer: ShardWriter,
    uploads: Uploads,
    manifest: Manifest,
    ending: Ending,
) -> Manifest:
    """Returns the manifest once the bucket, where there is one, holds all. Raises UserError."""
    peers = ending.peers
    with peers.together("uploading"):
        uploads.drain(ending.check)
    said = map(json.loads, peers.gather(json.dumps(uploads.receipts).encode()))
    if receipts := {name: receipt for part in said for name, receipt in part.items()}:
        files = [
            {**entry, "uploaded": receipts.get(entry["filename"], entry["uploaded"])}
            for entry in manifest["files"]
        ]
        manifest = {**manifest, "files": files}
        if peers.count > 1 and peers.index == 0:
            write_json_atomic(writer.folder / "metadata.json", manifest)
    own, joint = last_files(prepared, writer, peers)
    with peers.together("uploading manifests"):
        uploads.finish(ending.check, *own)
    with peers.together("uploading the last"):
        uploads.finish(ending.check, *joint)
    if uploads.waited > 1:
        log.info("computing waited %.0f s for the network", uploads.waited)
    return manifest
