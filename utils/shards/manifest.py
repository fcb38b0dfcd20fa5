"""The manifest of a run's folder and the journal of its answers: names, reading, merging.

A folder can hold the manifest of the only process (`metadata.json`), of each of several
(`metadata_host003.json`), and the merged one (`metadata.json`); the run is the union of what they
list, whichever is newer.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

from utils.arc.tasks import SampleKey
from utils.errors import UserError, some
from utils.shards.items import sample_key, sample_name
from utils.store.local import PARTIAL
from utils.store.places import place_of

FORMAT_VERSION = 1
SHARD = re.compile(r"activations(_host\d{3,})?_batch_(\d{6,})\.pkl")
MANIFEST = re.compile(r"metadata(_host\d{3,})?\.json")
JOURNAL = re.compile(r"answers(_host\d{3,})?\.jsonl")

_TIMINGS = ("seconds", "compile_seconds", "tokens_per_second")
_EMPTY = (None, [], {})
_LATER = {"prompt.tokenizer_hash", "prompt.stop_ids"}  # which the first manifests do not say
_ENTRY = {"samples", "size_bytes", "crc32c", "uploaded"}

Manifest = dict[str, Any]


def stem(name: str) -> str | None:
    """The name, less the mark of a partial file, if a run gives such names; else None."""
    name = name.removesuffix(PARTIAL)
    return name if any(kind.fullmatch(name) for kind in (SHARD, MANIFEST, JOURNAL)) else None


def owner_of(name: str) -> str:
    """`_host003`, or nothing, of the name of a file of a run."""
    return (re.search(r"_host\d+", name) or [""])[0]


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of a run, all processes' together, whether they were merged or not.

    folder: of a disk, or `gs://bucket/prefix`.
    """
    if manifests := read_manifests(folder):
        return merge_manifests(manifests)
    raise UserError(
        f"{folder} holds no metadata.json: is it the --activations_dir or --cloud_bucket of a run?"
    )


def read_manifests(folder: str | Path) -> dict[str, Manifest]:
    """File name -> manifest. Raises UserError for a file of that name that is no manifest."""
    place = place_of(folder)
    names = filter(MANIFEST.fullmatch, place.names())
    return {name: _parse(f"{place}/{name}", place.read(name)) for name in names}


def _parse(path: str, content: bytes) -> Manifest:
    try:
        manifest = json.loads(content)
        version, files = manifest["format_version"], manifest["files"]
        totals(files)
        valid = {"status", "skipped", *_TIMINGS} <= manifest.keys() and all(
            entry.keys() >= _ENTRY and SHARD.fullmatch(entry["filename"]) for entry in files
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        valid, version = False, FORMAT_VERSION
    if version != FORMAT_VERSION:
        raise UserError(f"{path} has format {version!r}; this program reads {FORMAT_VERSION}")
    if not valid:
        raise UserError(
            f"{path} is not the manifest of a run, or damaged: put the right one back, move it "
            "away, or choose another folder"
        )
    return manifest


def merge_manifests(manifests: dict[str, Manifest]) -> Manifest:
    """File name -> manifest of one run, to one manifest.

    Of `metadata.json`, where there is one, the settings, status and extra entries are kept. Raises
    UserError when two shards hold the same sample.
    """
    ordered = [manifests[name] for name in sorted(manifests, key=lambda name: (len(name), name))]
    files: dict[str, dict[str, Any]] = {}
    for entry in (entry for manifest in ordered for entry in manifest["files"]):
        known = files.setdefault(entry["filename"], entry)
        if entry["uploaded"] or known.get("elsewhere"):
            files[entry["filename"]] = entry
    owners: dict[SampleKey, str] = {}
    for name, entry in files.items():
        for key in map(tuple, entry["samples"]):
            if (other := owners.setdefault(key, name)) != name:
                raise UserError(
                    f"{other} and {name} both hold {sample_name(key)}: not one run's shards"
                )
    skipped = {sample_key(s): s for m in ordered for s in m["skipped"]}
    merged = manifests.get("metadata.json")
    parts = [m for m in ordered if m is not merged]
    seconds, compile_seconds, tokens = map(max, zip(*map(timing, ordered), strict=True))
    tokens = max(tokens, sum(timing(part)[2] for part in parts))  # processes run side by side
    complete = all(m["status"] == "complete" for m in ([merged] if merged else parts))
    return {
        **ordered[0],
        "status": "complete" if complete else "running",
        **totals(list(files.values())),
        "seconds": seconds,
        "compile_seconds": compile_seconds,
        "tokens_per_second": tokens / seconds if seconds else 0.0,
        "skipped": list(skipped.values()),
        "files": list(files.values()),
    }


def resumable_run(
    folder: Path, manifests: dict[str, Manifest], settings: dict[str, Any], resume: bool
) -> Manifest | None:
    """The run that `folder` holds, once it is sure that it can be continued; None for no run.

    manifests: of the folder, and of what is known of the run from elsewhere. Raises UserError
    without `resume`, and when settings differ or shards are missing.
    """
    there = folder.exists() and any(name == stem(name) for name in os.listdir(folder))
    if not there and not manifests:
        return None
    if not manifests:
        raise UserError(
            f"{folder} holds files of a run but no metadata.json: put that back and --resume, "
            "replace the run with --overwrite, or choose another folder"
        )
    run = merge_manifests(manifests)
    if not resume:
        raise UserError(
            f"{folder} holds a run ({run['status']}, {run['total_samples']} samples): "
            "--resume continues it, --overwrite replaces it"
        )
    if changes := differences({key: run.get(key) for key in settings}, settings):
        raise UserError(
            f"cannot resume {folder} with other settings: {some(changes)}; go back to the former, "
            "choose another folder, or --overwrite"
        )
    if damaged := [entry["filename"] for entry in run["files"] if not _is_there(folder, entry)]:
        raise UserError(
            f"cannot resume {folder}, shards are missing or damaged: {some(damaged)}; put them "
            "back, or --overwrite"
        )
    return run


def _is_there(folder: Path, entry: dict[str, Any]) -> bool:
    path = folder / entry["filename"]
    if entry.get("elsewhere"):  # in the folder of another process, which looks after it
        return True
    return path.stat().st_size == entry["size_bytes"] if path.is_file() else entry["uploaded"]


def totals(files: list[dict[str, Any]]) -> dict[str, int]:
    """The manifest entries that sum up its files."""
    return {
        "total_samples": sum(entry["num_samples"] for entry in files),
        "total_batches": len(files),
        "total_tokens": sum(entry["num_tokens"] for entry in files),
        "float16_overflows": sum(entry["float16_overflows"] for entry in files),
    }


def timing(manifest: Manifest) -> tuple[float, float, float]:
    """Seconds of the run loop, seconds of compiling, tokens through the model."""
    seconds, compile_seconds, rate = (manifest.get(key, 0.0) for key in _TIMINGS)
    return seconds, compile_seconds, rate * seconds


def differences(was: Any, now: Any, name: str = "") -> list[str]:
    """`model.hash was 'a', is 'b'` for each entry that differs; keys named `path` do not count.

    An entry that is not there is one that is empty. Those of _LATER are compared where both sides
    have them: manifests of earlier versions do not say what they were.
    """
    if not isinstance(was, dict) or not isinstance(now, dict):
        empty = was in _EMPTY and now in _EMPTY
        unknown = name in _LATER and None in (was, now)
        same = was == now or empty or unknown
        return [] if same else [f"{name} was {was!r:.80}, is {now!r:.80}"]
    return [
        change
        for key in {**was, **now}
        if key != "path"  # what is read matters, not where it lies
        for change in differences(was.get(key), now.get(key), f"{name}.{key}".lstrip("."))
    ]


def read_answers(folder: str | Path, all_here: bool = True) -> dict[SampleKey, dict[str, Any]]:
    """The answer to every sample that the manifest lists, from the journals of all processes.

    all_here: raise UserError for those whose journal is in another process's folder.
    """
    journals: dict[str, dict[SampleKey, dict[str, Any]]] = {}
    answers = {}
    for entry in read_manifest(folder)["files"]:
        host = owner_of(entry["filename"])
        journal = Path(folder) / f"answers{host}.jsonl"
        if entry.get("elsewhere") and not all_here and not journal.exists():
            continue
        if host not in journals:
            journals[host] = _read_journal(journal)
        for key in map(tuple, entry["samples"]):
            if key not in journals[host]:
                raise UserError(
                    f"{journal} lacks the answer to {sample_name(key)}: put the file back, or "
                    "--overwrite"
                )
            answers[key] = journals[host][key]
    return answers


def _read_journal(path: Path) -> dict[SampleKey, dict[str, Any]]:
    try:
        *lines, _torn = path.read_bytes().split(b"\n")
        answers = map(json.loads, lines)  # of a sample that was computed twice, the last counts
        return {sample_key(answer): answer for answer in answers}
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: put it back, or --overwrite") from error
