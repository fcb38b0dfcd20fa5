"""Parts of a run become one folder; see also `test_format_1` and `run/test_processes`."""

import json

import pytest
from conftest import NoSignals
from shard_crashes import item

from utils.cli import Interrupted
from utils.errors import UserError
from utils.shards import __main__ as merge
from utils.shards import iter_items, manifest
from utils.shards.held import Writer
from utils.shards.items import sample_key
from utils.shards.manifest import read_answers, read_manifest
from utils.shards.writer import RunFolder

SETTINGS = {
    "model": {"path": "/models/a", "hash": "abc"},
    "prompt": {"format": "chat"},
    "activations": {"resid_post.0": {"layer": 0, "dtype": "float16"}},
}


def merged(*args, signals=None):
    argv = ["merge", *map(str, args)]
    return merge.main(merge.build_parser().parse_args(argv), signals or NoSignals())


def write_part(folder, part, counts, settings=SETTINGS):
    """A part of two in `folder`, of `counts[part]` processes that each store two samples in a shard
    and let 100 tokens through in 10 s."""
    count = counts[part]
    arguments = {"shard_id": part, "num_shards": 2}
    facts = {"arguments": arguments, "dataset": {"hash": str(part), "tasks": 1}}
    writers = [Writer(index, count, part, 2) for index in range(count)]
    options = {"mode": "resume", "save_every_n_samples": 1}
    runs = [RunFolder(folder, settings, facts, writer=writer, **options) for writer in writers]
    for step in (RunFolder.clear, RunFolder.begin):
        for run in runs:
            step(run)
    for index, run in enumerate(runs):
        for number in (2 * index, 2 * index + 1):
            sample = {"task_id": f"part{part}", "sample_idx": number}
            run.add({**item(number, tokens=5, width=4), **sample}, {**sample, "attempts": []})
        run.update_timing(10.0, 1.0, 100)
        run.finish()
        run.close()
    (folder / "metadata.json").write_text(json.dumps(read_manifest(folder)))
    return folder


@pytest.fixture
def parts(request, tmp_path):
    counts = getattr(request, "param", (1, 1))
    return [write_part(tmp_path / f"part{part}", part, counts) for part in (0, 1)]


def test_parts_without_activations_are_refused_with_the_way_on(parts, tmp_path):
    """Of such a run `metadata.json` alone is left, and it lists no shards."""
    for part in parts:
        joint = json.loads((part / "metadata.json").read_text())
        for path in part.iterdir():
            path.unlink()
        joint |= {"files": [], "activations": {}}
        (part / "metadata.json").write_text(json.dumps(joint))
    assert read_manifest(parts[0])["total_samples"] == 2
    with pytest.raises(UserError, match=r"kept no activations: .* instead of the folders"):
        merged(*parts, "--into", tmp_path / "all", "--output_filepath", tmp_path / "sub.json")
    assert not (tmp_path / "all").exists() and not (tmp_path / "sub.json").exists()
    with pytest.raises(UserError, match=r"holds a run \(complete, 2 samples\)"):
        RunFolder(parts[0], {**SETTINGS, "activations": {}}, {})

    submissions, joint = [tmp_path / f"{part.name}.json" for part in parts], tmp_path / "joint.json"
    for part, path in zip(parts, submissions, strict=True):
        path.write_text(json.dumps({part.name: [{"attempt_1": [[0]], "attempt_2": [[0]]}]}))
        part.rename(f"{path}.run")
    with pytest.raises(UserError, match="of 2 parts these are missing: 1"):
        merged(submissions[0], "--output_filepath", joint)
    with pytest.raises(UserError, match="cannot be merged together"):
        merged(submissions[0], f"{submissions[1]}.run", "--into", tmp_path / "all")
    with pytest.raises(UserError, match="fetch them with `gcloud storage cp -r`"):
        merged("gs://bucket/part0", "gs://bucket/part1", "--into", tmp_path / "all")
    assert merged(*submissions, "--output_filepath", joint) == 0
    assert list(json.loads(joint.read_text())) == ["part0", "part1"]


@pytest.mark.parametrize("parts", [(2, 2)], indirect=True)
def test_the_rate_of_a_merged_run_is_that_of_its_parts_together(parts, tmp_path):
    rates = [read_manifest(part)["tokens_per_second"] for part in parts]
    assert merged(*reversed(parts), "--into", tmp_path / "all") == 0
    joint = json.loads((tmp_path / "all" / "metadata.json").read_text())
    assert joint["tokens_per_second"] == sum(rates)
    assert joint["dataset"]["tasks"] == 2 and joint["seconds"] == 10


@pytest.mark.parametrize("parts", [(2, 1), (1, 2), (2, 2)], indirect=True)
def test_parts_of_any_numbers_of_processes_are_merged(parts, tmp_path):
    """On two and on one, both parts have a process 1, with other samples in shards of its name."""
    expected = {key: answer for part in parts for key, answer in read_answers(part).items()}
    stored = {sample_key(item): item for part in parts for item in iter_items(part)}
    assert merged(*parts, "--into", tmp_path / "all", "--verify") == 0
    assert read_answers(tmp_path / "all") == expected
    items = list(iter_items(tmp_path / "all"))
    assert len(items) == len(expected) == len(stored)
    for found in items:
        states = stored[sample_key(found)]["activations"]["resid_post.0"]
        assert (found["activations"]["resid_post.0"] == states).all()


def test_verifying_reads_each_manifest_once(parts, tmp_path, monkeypatch):
    read, parse = [], manifest.parse
    monkeypatch.setattr(
        manifest, "parse", lambda path, content: read.append(path) or parse(path, content)
    )
    assert merged(*parts, "--into", tmp_path / "all", "--verify") == 0
    assert len(read) == len(set(read)) == 4
    shard = next(parts[1].glob("*.pkl"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"damaged: its crc32c is .*; --resume of its run"):
        merged(*parts, "--into", tmp_path / "again", "--verify")


def test_a_signal_leaves_nothing_of_a_merge(parts, tmp_path, monkeypatch):
    signals, link = NoSignals(), merge._link
    monkeypatch.setattr(merge, "_link", lambda *paths: signals.note(15) or link(*paths))
    with pytest.raises(Interrupted):
        merged(*parts, "--into", tmp_path / "new" / "all", signals=signals)
    assert signals.held and not list((tmp_path / "new").iterdir())
