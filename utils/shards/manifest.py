"""The manifest of a run's folder and the journal of its answers: names, reading, and the union.

A folder can hold the manifest of the only process (`metadata.json`), one of each of several
(`metadata_host003.json`), and the one of all (`metadata.json`). A run is the union of what its
manifests list, wherever they lie: a process lists the shards that it wrote, and who sends a shard
to a bucket lists it with its receipt.
"""

import contextlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import reduce
from pathlib import Path
from typing import Any

from utils.arc.tasks import SampleKey
from utils.errors import UserError
from utils.shards.int8 import Errors, RelativeError, joined
from utils.shards.items import sample_key, sample_name
from utils.store.local import whole_name
from utils.store.places import place_of

FORMAT_VERSION = 1
SHARD = re.compile(r"activations(_host\d{3,})?_batch_(\d{6,})\.pkl")
MANIFEST = re.compile(r"metadata(_host\d{3,})?\.json")
JOURNAL = re.compile(r"answers(_host\d{3,})?\.jsonl")

_TIMINGS = ("seconds", "compile_seconds", "tokens_per_second")
_EMPTY = (None, [], {})
# What is read matters, not where it lies; and what was measured is no setting.
_APART = ("path", "relative_error")
_LATER = ("prompt.tokenizer_hash", "prompt.stop_ids")  # which the first manifests do not say

Manifest = dict[str, Any]  # the JSON object that `metadata.json` holds

_WAY_ON = "put the file back, or --resume the run, which computes those samples again"
_REQUIRED = {"status", "skipped", "files", *_TIMINGS}
# Of what the programs here read of a manifest, the types: of an object those of its entries. An int
# counts something, and is not negative.
_SCHEMA: dict[str, Any] = {
    "status": str,
    "skipped": list,
    "files": list,
    **dict.fromkeys(_TIMINGS, int | float),
    **dict.fromkeys(("total_samples", "total_batches", "total_tokens"), int),
    **dict.fromkeys(("versions", "generation"), dict),
    "special_ids": list,
    "activations": dict,
    "model": {"path": str},
    "dataset": {"hash": str, "tasks": int},
    "prompt": {"augmentations": int},
    "capture": {"token_positions": str},
    "arguments": {"shard_id": int, "num_shards": int},
}
_COUNTS = ("num_samples", "num_tokens", "size_bytes", "float16_overflows", "non_finite")
_ENTRY = {"filename": str, **dict.fromkeys(_COUNTS, int), "crc32c": str}
_RECEIPT = {"uri": str, "size": int, "crc32c": str, "generation": int}
_ERROR = {"rows": int, "sum": int | float, "max": int | float}


@dataclass(frozen=True)
class Shard:
    """A shard as a manifest lists it. Sizes are in bytes, `crc32c` is base64 as buckets give it.

    uploaded: the receipt of the bucket (`uri`, `size`, `crc32c`, `generation`), or False.
    float16_overflows: arrays that were stored as float32. non_finite: activation rows in which the
    model itself made a NaN or an infinity. relative_error: of activations stored as int8, by name.
    """

    filename: str
    num_samples: int
    num_tokens: int
    size_bytes: int
    crc32c: str
    samples: tuple[SampleKey, ...]
    float16_overflows: int = 0
    non_finite: int = 0
    relative_error: Errors = field(default_factory=dict)
    uploaded: dict[str, Any] | bool = False

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "Shard":
        """Raises KeyError, TypeError or ValueError for anything else than an entry of `files`."""
        name, sent, errors = entry["filename"], entry["uploaded"], entry.get("relative_error", {})
        fits = _fits(entry, _ENTRY) and _fits(errors, dict.fromkeys(errors, _ERROR))
        if not (fits and SHARD.fullmatch(name)):
            raise ValueError(name)
        if not isinstance(sent, bool) and not (
            # The receipt is followed where the file is not beside the manifest.
            _fits(sent, _RECEIPT) and re.fullmatch(f"gs://.*/{name}", sent["uri"])
        ):
            raise ValueError(sent)
        known = {f.name: entry[f.name] for f in fields(cls) if f.name in entry}
        known["samples"] = _checked_keys(entry["samples"])
        known["relative_error"] = {key: RelativeError(**error) for key, error in errors.items()}
        return cls(**known)

    def to_json(self) -> dict[str, Any]:
        # `asdict` would copy every key of every sample, and all of them at every commit.
        errors = {name: asdict(error) for name, error in self.relative_error.items()}
        samples = [list(key) for key in self.samples]
        entry = {**vars(self), "samples": samples, "relative_error": errors}
        if not errors:
            del entry["relative_error"]
        return entry

    @property
    def owner(self) -> str:
        return owner_of(self.filename)


def _checked_keys(keys: Iterable[Any]) -> tuple[SampleKey, ...]:
    """`keys`, of JSON, as those of samples. Raises TypeError or ValueError for anything else."""
    found = tuple(map(tuple, keys))
    kinds = {tuple(map(type, key)) for key in found}
    if not kinds <= {(str, int), (str, int, int)} or any(min(key[1:]) < 0 for key in found):
        raise ValueError("no key of a sample")
    return found


def _fits(value: Any, schema: Any) -> bool:
    """Whether a value of JSON is of the type that `_SCHEMA` says, as far as it is there."""
    if not isinstance(schema, dict):
        return isinstance(value, schema) and not (schema is int and value < 0)
    return isinstance(value, dict) and all(
        _fits(value[key], kind) for key, kind in schema.items() if key in value
    )


def stem(name: str) -> str | None:
    """The name, less the mark of a partial file, if a run gives such names; else None."""
    name = whole_name(name)
    return name if any(kind.fullmatch(name) for kind in (SHARD, MANIFEST, JOURNAL)) else None


def owner_of(name: str) -> str:
    """`_host003`, or nothing, of the name of a file of a run: which process writes it."""
    return (re.search(r"_host\d+", name) or [""])[0]


def manifest_name(owner: str) -> str:
    return f"metadata{owner}.json"


def journal_name(owner: str) -> str:
    return f"answers{owner}.jsonl"


def whole_size(path: Path) -> int:
    """Bytes of a file; of a journal those of whole lines, since a kill cuts the last one short."""
    if JOURNAL.fullmatch(path.name):
        return path.read_bytes().rfind(b"\n") + 1
    return path.stat().st_size


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of a run, all processes' together, whether they were merged or not.

    folder: of a disk, or `gs://bucket/prefix`.
    """
    if manifests := read_manifests(folder):
        return union_of(manifests)
    raise UserError(
        f"{folder} holds no metadata.json: is it the --activations_dir or --cloud_bucket of a run?"
    )


def read_manifests(folder: str | Path) -> dict[str, Manifest]:
    """File name -> manifest. Raises UserError for a file of that name that is no manifest."""
    place = place_of(folder)
    names = filter(MANIFEST.fullmatch, place.names())
    return {name: parse(f"{place}/{name}", place.read(name)) for name in names}


def parse(path: str, content: bytes) -> Manifest:
    """The manifest in the file `path`. Raises UserError where `content` is none."""
    version = FORMAT_VERSION
    try:
        manifest = json.loads(content)
        version = manifest["format_version"]
        for entry in manifest["files"]:
            Shard.from_json(entry)
        _checked_keys(map(sample_key, manifest["skipped"]))
        valid = manifest.keys() >= _REQUIRED and _fits(manifest, _SCHEMA)
        valid &= all(isinstance(entry, dict) for entry in manifest.get("activations", {}).values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        valid = False
    if version != FORMAT_VERSION:
        raise UserError(f"{path} has format {version!r}; this program reads {FORMAT_VERSION}")
    if not valid:
        raise UserError(
            f"{path} is not the manifest of a run, or damaged: put the right one back, move it "
            "away, or choose another folder"
        )
    return manifest


def shards_of(manifests: Iterable[Manifest]) -> dict[str, Shard]:
    """File name -> shard, of all that the manifests of one run list, each once.

    Of entries for one file, one with a receipt of a bucket is believed. Raises UserError where two
    shards hold the same sample, or two entries speak of different files.
    """
    shards: dict[str, Shard] = {}
    owners: dict[SampleKey, str] = {}
    for entry in (entry for manifest in manifests for entry in manifest["files"]):
        shard = Shard.from_json(entry)
        known = shards.setdefault(shard.filename, shard)
        if known.crc32c != shard.crc32c:
            raise UserError(
                f"two manifests speak of different files {shard.filename}: not one run's shards"
            )
        if shard.uploaded:
            shards[shard.filename] = shard
    for name, shard in shards.items():
        for key in shard.samples:
            if (other := owners.setdefault(key, name)) != name:
                raise UserError(
                    f"{other} and {name} both hold {sample_name(key)}: not one run's shards"
                )
    return shards


def union_of(manifests: dict[str, Manifest]) -> Manifest:
    """File name -> manifest of one run, to one manifest.

    Of `metadata.json`, where there is one, the settings, status and extra entries are kept, and of
    a run that kept no activations, whose manifest lists no files, the sums. Raises UserError when
    two shards hold the same sample.
    """
    ordered = [manifests[name] for name in sorted(manifests, key=lambda name: (len(name), name))]
    merged = manifests.get("metadata.json")
    parts = [manifest for manifest in ordered if manifest is not merged]
    seconds, compile_seconds, tokens = map(max, zip(*map(timing, ordered), strict=True))
    tokens = max(tokens, sum(timing(part)[2] for part in parts))  # processes run side by side
    complete = all(part["status"] == "complete" for part in ([merged] if merged else parts))
    shards = shards_of(ordered).values()
    skipped = {sample_key(entry): entry for manifest in ordered for entry in manifest["skipped"]}
    for key in (key for shard in shards for key in shard.samples):
        skipped.pop(key, None)  # there was no room for it before the run went on elsewhere
    sums = totals(shards, ordered[0].get("activations", {}))
    return {
        **ordered[0],
        "status": "complete" if complete else "running",
        **(sums if shards else {key: ordered[0].get(key, sums[key]) for key in sums}),
        "seconds": seconds,
        "compile_seconds": compile_seconds,
        "tokens_per_second": tokens / seconds if seconds else 0.0,
        "skipped": list(skipped.values()),
        "files": [shard.to_json() for shard in shards],
    }


def with_shards(manifest: Manifest, shards: Iterable[Shard]) -> Manifest:
    """`manifest` with these shards in place of its own, and what sums them up."""
    shards = list(shards)
    sums = totals(shards, manifest.get("activations", {}))
    return {**manifest, **sums, "files": [shard.to_json() for shard in shards]}


def totals(shards: Iterable[Shard], activations: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest entries that sum up its files. One of them is `activations`, of which each entry
    is given and its `relative_error` is what the shards say together."""
    shards = list(shards)
    errors: Errors = reduce(joined, (shard.relative_error for shard in shards), {})
    described = {name: dict(entry) for name, entry in activations.items()}
    for name, entry in described.items():
        entry.pop("relative_error", None)
        if (error := errors.get(name)) and error.rows:
            entry["relative_error"] = {"mean": error.sum / error.rows, "max": error.max}
    return {
        "total_samples": sum(shard.num_samples for shard in shards),
        "total_batches": len(shards),
        "total_tokens": sum(shard.num_tokens for shard in shards),
        "float16_overflows": sum(shard.float16_overflows for shard in shards),
        "non_finite": sum(shard.non_finite for shard in shards),
        "activations": described,
    }


def timing(manifest: Manifest) -> tuple[float, float, float]:
    """Seconds of the run loop, seconds of compiling, tokens through the model."""
    seconds, compile_seconds, rate = (manifest.get(key, 0.0) for key in _TIMINGS)
    return seconds, compile_seconds, rate * seconds


def changed_settings(manifest: Manifest, settings: Mapping[str, Any]) -> list[str]:
    """What a resumed run was asked to do otherwise than `manifest` says; see `differences`."""
    return differences({key: manifest.get(key) for key in settings}, dict(settings))


def differences(was: Any, now: Any, name: str = "") -> list[str]:
    """`model.hash was 'a', is 'b'` for each entry that differs; keys in _APART do not count, nor
    the `format` of a prompt, which may be the path of a file, where `template_hash` is the same.

    An entry that is not there is one that is empty. Those of _LATER are compared where both sides
    have them: manifests of earlier versions do not say what they were.
    """
    if not isinstance(was, dict) or not isinstance(now, dict):
        unknown = name in _LATER and None in (was, now)
        if was == now or unknown or (was in _EMPTY and now in _EMPTY):
            return []
        return [f"{name} was {was!r:.80}, is {now!r:.80}"]
    same_template = was.get("template_hash") == now.get("template_hash") is not None
    apart = (*_APART, "format") if same_template else _APART
    return [
        change
        for key in {**was, **now}
        if key not in apart
        for change in differences(was.get(key), now.get(key), f"{name}.{key}".lstrip("."))
    ]


def read_answers(folder: str | Path) -> dict[SampleKey, dict[str, Any]]:
    """The answer to every sample that the manifest lists, from the journals of all processes."""
    return answers_to(folder, shards_of(read_manifests(folder).values()).values())


def answers_to(folder: str | Path, shards: Iterable[Shard]) -> dict[SampleKey, dict[str, Any]]:
    """The answers to the samples of these shards, from the journals in their folder.

    Raises UserError where one is missing.
    """
    journals: dict[str, dict[SampleKey, dict[str, Any]]] = {}
    answers = {}
    for shard in shards:
        journal = Path(folder) / journal_name(shard.owner)
        if shard.owner not in journals:
            try:
                journals[shard.owner] = read_journal(journal.read_bytes())
            except OSError as error:
                raise UserError(f"cannot read {journal}: {error.strerror}; {_WAY_ON}") from error
        for key in shard.samples:
            if key not in journals[shard.owner]:
                raise UserError(
                    f"{journal} lacks the answer to {sample_name(key)}, or is damaged: {_WAY_ON}"
                )
            answers[key] = journals[shard.owner][key]
    return answers


def read_journal(content: bytes) -> dict[SampleKey, dict[str, Any]]:
    """The answers in a journal; a line that was cut short or is damaged holds none."""
    answers = {}
    for line in content.split(b"\n")[:-1]:
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
            answer = json.loads(line)
            answers[sample_key(answer)] = answer  # of a sample computed twice the last counts
    return answers
