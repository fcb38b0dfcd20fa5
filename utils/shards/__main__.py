"""`python -m utils.shards merge`: the runs of hosts that did not talk to each other, as one.

Each ran its part of the tasks (`--shard_id I --num_shards N`) into a folder of its own, and its
files have its number in their names; where two parts have the same number, one gets another. The
merged folder is like that of one run of N processes: its shards are hard links, or copies where the
disks differ, and nothing that was there is changed.
"""

import argparse
import itertools
import json
import logging
import os
import shutil
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from tqdm import tqdm

from utils.arc import scores as scoring
from utils.cli import Parser, Signals, run
from utils.errors import UserError, some
from utils.shards import manifest as stored
from utils.shards.held import Held
from utils.shards.items import sample_key
from utils.shards.manifest import Manifest
from utils.shards.reader import read_entry
from utils.store import local
from utils.store.bucket import is_uri

log = logging.getLogger(__name__)

_SETTINGS = ("model", "prompt", "activations", "capture", "generation")


def build_parser() -> Parser:
    parser = Parser(description=__doc__)
    parser.prog = "python -m utils.shards"
    parser.add_argument("command", choices=["merge"])
    parser.add_argument(
        "parts",
        nargs="+",
        type=Path,
        metavar="DIR",
        help="the --activations_dir of each run; or the submission.json of each, where they kept "
        "no activations",
    )
    add = parser.add_argument
    add("--into", type=Path, metavar="DIR", help="folder to make, of the folders' shards")
    joint = "write the joint Kaggle submission there"
    add("--output_filepath", type=Path, metavar="FILE", help=joint)
    add("--verify", action="store_true", help="read every shard and compare its crc32c first")
    return parser


def main(args: argparse.Namespace, signals: Signals) -> int:
    parts, output, into = args.parts, args.output_filepath, args.into
    if output is not None:
        if output.exists():
            raise UserError(f"{output} exists: choose another --output_filepath")
        local.check_writable(output.parent)
    for part in parts:
        if is_uri(part):
            raise UserError("parts are merged on a disk: fetch them with `gcloud storage cp -r`")
        if not part.exists():
            raise UserError(f"{part} does not exist: check the path")
    are_files = set(map(Path.is_file, parts))
    if len(are_files) == 2:
        raise UserError("folders and submissions cannot be merged together: give one kind alone")
    if are_files == {True}:
        if output is None or into is not None:
            raise UserError("submissions are joined into --output_filepath FILE, without --into")
        joint = join_submissions(parts)
        check_beside(parts)
        local.write_result(output, local.json_lines(joint))
        print(f"submission    {output}, {len(joint)} tasks")
        return 0
    if into is None:
        raise UserError("--into DIR is missing: the folder to make of these")
    if into.exists():
        raise UserError(f"{into} is there already: choose another --into")
    if output is not None and into.absolute() in (output.absolute(), *output.absolute().parents):
        raise UserError(f"{output} is in --into {into}, or is it: choose another place")
    local.check_writable(into.parent)
    manifests = [stored.read_manifest(part) for part in parts]
    for part, manifest in zip(parts, manifests, strict=True):
        if not manifest["files"] and manifest["total_samples"]:
            raise UserError(
                f"{part} kept no activations: name the submission.json of each part instead of "
                "the folders, and leave out --into"
            )
    check(parts, manifests)
    if args.verify:
        for folder, manifest in zip(parts, manifests, strict=True):
            for entry in tqdm(manifest["files"], desc=f"verifying {folder}"):
                read_entry(folder, entry)
    merged = join(parts, manifests, into, signals)
    print(f"merged        {len(parts)} folders into {into}")
    print(f"samples       {merged['total_samples']}, shards {merged['total_batches']}")
    if output is not None:
        local.write_result(output, local.json_lines(submission(into, merged)))
        print(f"submission    {output}")
    return 0


def join_submissions(paths: list[Path]) -> dict[str, Any]:
    """The union of submissions of different tasks. Raises UserError naming a task that two hold."""
    joint: dict[str, Any] = {}
    for path in paths:
        try:
            tasks = json.loads(path.read_bytes())
            valid = all("attempt_1" in output for outputs in tasks.values() for output in outputs)
        except (OSError, ValueError, AttributeError, TypeError):
            valid = False
        if not valid:
            raise UserError(f"{path} is not a submission")
        if twice := sorted(joint.keys() & tasks.keys()):
            raise UserError(f"{path} holds tasks that another holds too: {some(twice)}")
        joint |= tasks
    return dict(sorted(joint.items()))


def check_beside(submissions: list[Path]) -> None:
    """`check` of runs without activations, whose manifests lie beside their submissions."""
    folders = [path.with_name(f"{path.name}.run") for path in submissions]
    if not all((folder / "metadata.json").exists() for folder in folders):
        log.warning("not checked whether parts are missing: their manifests are not beside them")
        return
    check(folders, [stored.read_manifest(folder) for folder in folders])


def check(folders: list[Path], manifests: list[Manifest]) -> None:
    """Raises UserError unless the runs are whole, alike, and each a part of the same tasks."""
    _, expected = _part(manifests[0])
    shards: dict[int, Path] = {}
    for folder, manifest in zip(folders, manifests, strict=True):
        if manifest["status"] != "complete":
            raise UserError(f"{folder} is not complete: finish its run with --resume first")
        held = Held(folder, {"metadata.json": manifest})
        if missing := [name for name, shard in held.shards.items() if not held.has_file(shard)]:
            raise UserError(
                f"{folder} lacks shards, or holds parts of them: {some(missing)}; fetch them again"
            )
        if changes := stored.differences(_settings(manifests[0]), _settings(manifest)):
            raise UserError(f"{folder} is of another run than {folders[0]}: {some(changes)}")
        number, count = _part(manifest)
        if count != expected:
            raise UserError(f"{folder} is one of {count} parts, {folders[0]} one of {expected}")
        if number in shards:
            raise UserError(f"{shards[number]} and {folder} are both part {number}")
        shards[number] = folder
    if absent := sorted(set(range(expected)) - shards.keys()):
        raise UserError(f"of {expected} parts these are missing: {some(list(map(str, absent)))}")


def _part(manifest: Manifest) -> tuple[int, int]:
    """--shard_id and --num_shards."""
    arguments = manifest["arguments"]
    return arguments.get("shard_id", 0), arguments.get("num_shards", 1)


def _settings(manifest: Manifest) -> Manifest:
    """What the parts of one dataset must have in common."""
    found = {key: manifest.get(key) for key in _SETTINGS}
    return {**found, "dataset": {"whole_hash": manifest["dataset"].get("whole_hash")}}


def join(folders: list[Path], manifests: list[Manifest], into: Path, signals: Signals) -> Manifest:
    """Makes the folder `into`, which appears when it is whole; a signal leaves nothing of it."""
    signals.hold()
    with local.writing(into, "and merge again", exit_code=2), local.new_folder(into) as made:
        taken: set[str] = set()
        parts = zip(folders, manifests, strict=True)
        merged = _joint(folders, [_collect(made, *part, taken, signals) for part in parts])
        local.write_json(made / "metadata.json", merged)
    return merged


def _collect(
    into: Path, folder: Path, manifest: Manifest, taken: set[str], signals: Signals
) -> Manifest:
    """Links the shards of a part and writes its answers; its manifest, with their names there.

    taken: owners in the names of other parts, to which those of this one are added. One that is
    taken, as where the parts ran on different numbers of processes, gets the next free number.
    """
    part, _ = _part(manifest)
    shards = stored.shards_of([manifest]).values()
    answers = stored.answers_to(folder, shards)
    owners: dict[str, str] = {}
    files = []
    for shard in shards:
        signals.check()
        if shard.owner not in owners:
            # A part of format 1 as it was first written has no number in its names.
            first = int(shard.owner.removeprefix("_host") or part)
            names = (f"_host{number:03d}" for number in itertools.count(first))
            owners[shard.owner] = next(name for name in names if name not in taken)
            taken.add(owners[shard.owner])
        owner = owners[shard.owner]
        name = shard.filename.replace(f"activations{shard.owner}", f"activations{owner}")
        _link(folder / shard.filename, into / name)
        files.append(replace(shard, filename=name, uploaded=False).to_json())
        with open(into / stored.journal_name(owner), "a") as journal:
            journal.writelines(local.to_json(answers[key]) + "\n" for key in shard.samples)
    return {**manifest, "files": files}


def _joint(folders: list[Path], manifests: list[Manifest]) -> Manifest:
    ordered = sorted(manifests, key=_part)
    merged = stored.union_of({str(i): manifest for i, manifest in enumerate(ordered)})
    datasets = [manifest["dataset"] for manifest in ordered]
    hashes = "".join(dataset["hash"] for dataset in datasets)
    merged |= {
        "dataset": {
            **merged["dataset"],
            "hash": sha256(hashes.encode()).hexdigest(),
            "tasks": sum(dataset["tasks"] for dataset in datasets),
        },
        "arguments": {**merged["arguments"], "shard_id": 0, "num_shards": 1},
        "merged_from": [str(folder) for folder in folders],
    }
    if all("train_pairs" in manifest for manifest in ordered):
        counted = [manifest["train_pairs"] for manifest in ordered]
        merged["train_pairs"] = {key: sum(pairs[key] for pairs in counted) for key in counted[0]}
    merged.pop("scores", None)  # they were one part's
    merged.pop("useful_slots", None)
    return merged


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or a file system without links
        shutil.copyfile(source, target)


def submission(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """Kaggle's submission, of the answers in a merged folder; skipped samples are unsolved."""
    answers = stored.read_answers(folder)
    counts: dict[str, int] = {}
    for task, index, *_ in [*answers, *map(sample_key, manifest["skipped"])]:
        counts[task] = max(counts.get(task, 0), index + 1)
    targets = {task: [None] * counts[task] for task in sorted(counts)}
    if manifest["prompt"].get("augmentations", 1) > 1:
        answers = scoring.vote(answers)
    return scoring.submission(targets, answers)


if __name__ == "__main__":
    run(main, build_parser())
