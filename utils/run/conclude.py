"""How a run ends: the answers of all processes make one output, their manifests one manifest, and
what goes to a bucket has arrived there."""

import logging
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from utils.arc import scores
from utils.errors import UserError
from utils.plan.plan import Plan
from utils.run.compute import Usage
from utils.run.peers import Peers
from utils.shards.items import sample_key, sample_name
from utils.shards.manifest import Manifest, answers_to, stem, totals, union_of
from utils.shards.uploads import Uploads
from utils.shards.writer import RunFolder
from utils.store.local import json_lines, write_result

WAY_ON = "then --resume"  # where the disk fails

log = logging.getLogger(__name__)


def conclude(plan: Plan, folder: RunFolder, usage: Usage, peers: Peers) -> Manifest:
    """Closes the last shard; the first process writes the output and the manifest of all."""
    folder.seal()
    if non_finite := sum(shard.non_finite for shard in folder.shards.values()):
        log.warning(
            "%d rows hold a NaN or an infinity that the model itself made; the manifest counts "
            "them as non_finite", non_finite,
        )  # fmt: skip
    usages = peers.exchange("usage", asdict(usage))
    spoken = [folder.shards[name] for name in sorted(folder.speaks_for)]
    answered = [s for s in spoken if folder.journal_of(s.owner).exists()]
    gathered = peers.gather(list(answers_to(folder.path, answered).values()))
    extra: dict[str, Any] = {"useful_slots": _useful(usages)}
    if peers.index == 0:
        answers = {sample_key(answer): answer for part in gathered for answer in part}
        extra |= write_output(plan, answers)
    manifest = folder.finish(extra)
    absent = [shard.to_json() for shard in spoken if shard.owner != folder.writer.owner]
    parts = peers.gather([manifest, absent])
    if folder.writer.owner and peers.index == 0:
        manifest = _joint(manifest, parts)
        write_result(folder.path / "metadata.json", json_lines(manifest), WAY_ON)
    return manifest


def tidy(plan: Plan, folder: RunFolder, manifest: Manifest, peers: Peers) -> None:
    """Of a complete run without extraction the output counts: beside it only the manifest stays."""
    if plan.request.activations_dir is None and peers.index == 0:
        # --resume compares with the manifest; what it lists has served its purpose.
        write_result(folder.path / "metadata.json", json_lines({**manifest, "files": []}), WAY_ON)
        for name in os.listdir(folder.path):
            if stem(name) and name != "metadata.json":
                (folder.path / name).unlink()


def write_output(plan: Plan, answers: scores.Answers) -> dict[str, Any]:
    """Writes the predictions or the submission; returns what the manifest says of the scores.

    Raises UserError where a sample has no answer.
    """
    request = plan.request
    if missing := [sample.key for sample in plan.samples if sample.key not in answers]:
        raise UserError(
            f"the answers to {len(missing)} samples are in none of the folders, the first "
            f"to {sample_name(missing[0])}: bring the folder of the process that made them, "
            "--resume with as many processes as wrote the run, or --overwrite"
        )
    if request.augmentations > 1:
        answers = scores.vote(answers)
    targets = {task.task_id: [pair.output for pair in task.test] for task in plan.tasks}
    predictions = scores.predictions(targets, answers, generated=request.generates)
    submission = scores.submission(targets, answers)
    output = submission if request.distributed else predictions
    write_result(Path(request.output_path), json_lines(output), WAY_ON)
    return {"scores": scores.accuracy(predictions)} if request.generates else {}


def _joint(own: Manifest, parts: list[tuple[Manifest, list[dict[str, Any]]]]) -> Manifest:
    """The manifest of all processes, whether their folders are one or not.

    own: of the first process. parts: of each, its manifest, and the shards of processes that take
    no part any more for which it speaks.
    """
    manifests = {
        str(index): {**manifest, "files": manifest["files"] + absent}
        for index, (manifest, absent) in enumerate(parts)
    }
    summed = ("files", "skipped", "seconds", "compile_seconds", "tokens_per_second")
    of_all = {*summed, *totals([], {})}
    return {**union_of(manifests), **{key: own[key] for key in own if key not in of_all}}


def _useful(usages: list[dict[str, int]]) -> dict[str, float | None]:
    """Share of the computed slots, of prefill and of decoding, that held a sample's token."""
    total = {key: sum(usage[key] for usage in usages) for key in usages[0]}
    kinds = ("prefill", "decode")
    return {kind: total[f"{kind}_useful"] / total[kind] if total[kind] else None for kind in kinds}


def last_files(plan: Plan, folder: RunFolder) -> tuple[list[Path], list[Path]]:
    """What goes to the bucket once the shards are there: of this process, and then of all; the
    manifest by which a reader knows that the run is complete comes last."""
    own = []
    if plan.request.activations_dir is not None:
        owner = folder.writer.owner
        files = [folder.journal_path] + ([folder.manifest_path] if owner else [])
        if not any(shard.owner == owner for shard in folder.held.shards.values()):
            # It has computed nothing so far: an empty journal is its lock, and a manifest comes.
            files = [path for path in files if path.exists() and path.stat().st_size]
        own = [*folder.absent_journals, *files]
    joint = [Path(plan.request.output_path), folder.path / "metadata.json"]
    return own, [] if folder.writer.index else joint


def send_the_rest(
    plan: Plan, folder: RunFolder, uploads: Uploads, manifest: Manifest, peers: Peers
) -> Manifest:
    """Returns the manifest once the bucket, where there is one, holds all. Raises UserError."""
    with peers.together("uploading"):
        uploads.drain(peers.check)
    said = peers.gather(uploads.receipts)
    if receipts := {name: receipt for part in said for name, receipt in part.items()}:
        files = [
            {**entry, "uploaded": receipts.get(entry["filename"], entry["uploaded"])}
            for entry in manifest["files"]
        ]
        manifest = {**manifest, "files": files}
        if folder.writer.owner and peers.index == 0:
            write_result(folder.path / "metadata.json", json_lines(manifest), WAY_ON)
    own, joint = last_files(plan, folder)
    with peers.together("uploading manifests"):
        uploads.send(peers.check, *own)
    with peers.together("uploading the last"):
        uploads.send(peers.check, *joint)
    if uploads.waited > 1:
        log.info("computing waited %.0f s for the network", uploads.waited)
    return manifest
