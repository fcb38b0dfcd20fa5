"""Writing, closing, resuming, refusing and reading the shards of a run."""

import errno
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_crashes import check_consistent, item

from utils.errors import UserError
from utils.shards import iter_items, load_shard
from utils.shards.filling import planned_shards
from utils.shards.held import Writer
from utils.shards.manifest import differences, read_answers, read_manifest
from utils.shards.writer import RunFolder
from utils.store.local import Sink, whole_name, write_json

SETTINGS = {
    "model": {"path": "/models/a", "hash": "abc", "layers": 2},
    "dataset": {"path": "tasks.json", "hash": "def"},
    "prompt": {"format": "chat"},
    "activations": {"resid_post.0": {"layer": 0, "dtype": "float16"}},
}
FACTS = {"arguments": {"batch_size": 1}, "processes": 1}


def opened(folder, settings=SETTINGS, host=None, hosts=1, **options):
    """host: this process's number among `hosts`, None for the only one."""
    writer = Writer() if host is None else Writer(host, max(hosts, host + 1, 2))
    return RunFolder(folder, settings, FACTS, writer=writer, **options)


def begun(*args, **options):
    run = opened(*args, **options)
    run.clear()
    run.begin()
    return run


def answer(index, text=""):
    return {"task_id": f"task{index // 2}", "sample_idx": index % 2, "text": text}


def write(folder, indices, finish=True, tokens=5, **options):
    """A run that ends, or without `finish` is killed."""
    with begun(folder, **options) as run:
        for index in indices:
            run.add(item(index, tokens, width=4), answer(index))
        if finish:
            run.finish()
    return run


def names(folder):
    return sorted(os.listdir(folder))


def stored(folder):
    """What was written, to tell that nothing changed."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ------------------------------------------------------------------------------------ closing


def test_a_run_and_its_manifest(tmp_path):
    folder = tmp_path / "new" / "activations"
    writer = opened(folder, save_every_n_samples=2)
    assert not writer.held.is_complete and writer.done == set()
    writer.clear()
    writer.begin([{"task_id": "x", "sample_idx": 0, "reason": "too long"}])
    assert read_manifest(folder)["status"] == "running"
    for index in range(5):
        writer.add(item(index, tokens=5 + index, width=4), answer(index))
    assert read_manifest(folder)["total_samples"] == 4  # the fifth is in memory
    writer.update_timing(2.0, 1.5, 100)
    returned = writer.finish({"scores": {"outputs_solved": 0.5}})
    manifest = json.loads((folder / "metadata.json").read_text())
    assert returned == manifest == read_manifest(folder)
    assert names(folder) == [
        "activations_batch_000001.pkl",
        "activations_batch_000002.pkl",
        "activations_batch_000003.pkl",
        "answers.jsonl",
        "metadata.json",
    ]
    assert manifest["status"] == "complete" and manifest["format_version"] == 1
    assert (manifest["total_samples"], manifest["total_batches"]) == (5, 3)
    assert manifest["total_tokens"] == 5 + 6 + 7 + 8 + 9
    assert (manifest["seconds"], manifest["compile_seconds"]) == (2, 1.5)
    assert manifest["tokens_per_second"] == 50
    assert manifest["scores"] == {"outputs_solved": 0.5}
    assert manifest["skipped"][0]["reason"] == "too long"
    assert manifest["cell_columns"][0] == "pair" and manifest["arguments"] == {"batch_size": 1}
    assert {key: manifest[key] for key in SETTINGS} == SETTINGS
    entry = manifest["files"][1]
    assert entry["samples"] == [["task1", 0], ["task1", 1]]
    assert entry["num_samples"] == 2 and entry["num_tokens"] == 7 + 8
    assert entry["size_bytes"] == (folder / entry["filename"]).stat().st_size
    assert entry["uploaded"] is False
    assert [i["activations"]["resid_post.0"][0, 0] for i in iter_items(folder)] == [0, 1, 2, 3, 4]
    assert read_answers(folder)["task2", 0] == answer(4)


def test_the_quick_start_s_snippet_runs_unchanged(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(Path("results/activations"), range(5), save_every_n_samples=2)
    snippet = """
import pickle
import json
import numpy as np

with open('results/activations/metadata.json') as f:
    metadata = json.load(f)
print(f"Total samples: {metadata['total_samples']}")
print(f"Total batches: {metadata['total_batches']}")

all_activations = []
for file_info in metadata['files']:
    filepath = f"results/activations/{file_info['filename']}"
    with open(filepath, 'rb') as f:
        batch_data = pickle.load(f)
    for item in batch_data:
        all_activations.append(item['output_logits'])

activations_array = np.concatenate(all_activations, axis=0)
print(f"Activations shape: {activations_array.shape}")
"""
    exec(snippet, {})
    assert capsys.readouterr().out.splitlines() == [
        "Total samples: 5",
        "Total batches: 3",
        "Activations shape: (5, 9)",
    ]


@pytest.mark.parametrize(
    ("tokens", "max_mb", "counts"),
    [
        ([10, 10, 10, 10], 512, [4]),
        ([1000, 1000, 1000, 1000], 0.0251, [2, 2]),  # 12,024 bytes of arrays an item
        ([1000, 1000, 1000, 1000], 0.0239, [1, 1, 1, 1]),
        ([10, 5000, 10, 10], 0.01, [1, 1, 2]),  # the second alone is too large
    ],
)
def test_a_shard_closes_before_its_arrays_pass_the_limit(tmp_path, tokens, max_mb, counts):
    writer = begun(tmp_path, max_shard_mb=max_mb)
    for index, count in enumerate(tokens):
        writer.add(item(index, count, width=4), answer(index))
    assert [f["num_samples"] for f in writer.finish()["files"]] == counts


def test_the_caller_can_close_a_shard(tmp_path):
    writer = begun(tmp_path, save_every_n_samples=3)
    writer.seal()  # nothing to write
    for index in range(5):
        writer.add(item(index), answer(index))
        if index == 0:
            writer.seal()
    assert [f["num_samples"] for f in writer.finish()["files"]] == [1, 3, 1]


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.one_of(st.none(), st.integers(1, 3000)), max_size=12),
    st.one_of(st.none(), st.integers(1, 4)),
    st.floats(0.001, 0.2),
)
def test_the_dry_run_predicts_every_shard_to_the_byte(tmp_path_factory, tokens, every, max_mb):
    folder = tmp_path_factory.mktemp("run")
    writer = begun(folder, save_every_n_samples=every, max_shard_mb=max_mb)
    planned = []
    for index, count in enumerate(tokens):
        if count is None:
            writer.seal()
            planned.append(None)
            continue
        writer.add(item(index, count, width=4), answer(index))
        zeros = {"resid_post.0": np.zeros((count, 4), np.float16)}
        planned.append({**item(index, count, 4), "activations": zeros})
    written = [(f["num_samples"], f["size_bytes"]) for f in writer.finish()["files"]]
    assert list(planned_shards(planned, "float16", every, max_mb)) == written


def test_overflows_are_counted_and_kept(tmp_path):
    writer = begun(tmp_path, save_every_n_samples=1)
    huge = item(0, 3, 4)
    huge["activations"]["resid_post.0"][1, 1] = 1e6
    huge["output_logits"][0, 0] = -1e5
    writer.add(huge, answer(0))
    writer.add(item(1), answer(1))
    assert writer.finish()["float16_overflows"] == 2
    first, second = iter_items(tmp_path)
    assert first["activations"]["resid_post.0"].dtype == np.float32
    assert first["activations"]["resid_post.0"][1, 1] == 1e6
    assert first["output_logits"].dtype == np.float32
    assert second["activations"]["resid_post.0"].dtype == np.float16
    with begun(tmp_path / "wide", activation_dtype="float32") as run:  # where all is meant to be
        run.add(item(1), answer(1))
        assert run.finish()["float16_overflows"] == 0


def test_equal_runs_are_equal_to_the_byte(tmp_path):
    for name in ("one", "two"):
        write(tmp_path / name, range(5), save_every_n_samples=2, tokens=3000)
    assert stored(tmp_path / "one") == stored(tmp_path / "two")


def test_a_sample_is_taken_once_and_with_its_own_answer(tmp_path):
    writer = write(tmp_path, [0], finish=False)
    with pytest.raises(ValueError, match="stored already"):
        writer.add(item(0), answer(0))
    with pytest.raises(ValueError, match="another"):
        writer.add(item(1), answer(2))


# ----------------------------------------------------------------- an existing run in the folder


def test_a_folder_with_a_run_is_refused_naming_both_ways_out(tmp_path):
    write(tmp_path, range(3))
    before = stored(tmp_path)
    with pytest.raises(UserError, match=r"complete, 3 samples.*--resume.*--overwrite") as error:
        opened(tmp_path)
    assert error.value.exit_code == 2 and "\n" not in str(error.value)
    assert stored(tmp_path) == before


def test_resume_finishes_the_rest(tmp_path):
    first = begun(tmp_path, save_every_n_samples=2)
    for index in range(5):
        first.add(item(index, 5, 4), answer(index))
    first.update_timing(10, 1, 70)
    first.seal()
    first.close()
    second = opened(tmp_path, save_every_n_samples=2, mode="resume")
    assert not second.held.is_complete
    assert second.done == {("task0", 0), ("task0", 1), ("task1", 0), ("task1", 1), ("task2", 0)}
    second.clear()
    second.begin()
    for index in range(5, 8):
        second.add(item(index, 5, 4), answer(index))
    second.update_timing(5, 2, 80)
    manifest = second.finish()
    assert (manifest["seconds"], manifest["compile_seconds"]) == (15, 3)
    assert manifest["tokens_per_second"] == 10
    assert [f["num_samples"] for f in manifest["files"]] == [2, 2, 1, 2, 1]
    assert len(list(iter_items(tmp_path))) == len(read_answers(tmp_path)) == 8


def test_resume_starts_in_an_empty_folder_and_knows_a_complete_run(tmp_path):
    write(tmp_path, range(3), mode="resume")
    assert opened(tmp_path, mode="resume").held.is_complete


def test_resume_removes_what_a_kill_left(tmp_path):
    write(tmp_path, range(2), finish=False, save_every_n_samples=1)
    shard = (tmp_path / "activations_batch_000002.pkl").read_bytes()
    (tmp_path / "activations_batch_000003.pkl").write_bytes(shard)  # renamed, not committed
    (tmp_path / "activations_batch_000004.pkl.partial").write_bytes(shard[:9])
    (tmp_path / "metadata.json.partial").write_text("{")
    (tmp_path / "mine.pkl").write_text("foreign")
    with open(tmp_path / "answers.jsonl", "a") as journal:
        journal.write(json.dumps(answer(2, "not committed")) + "\n" + '{"task_id": "to')
    assert set(read_answers(tmp_path)) == {("task0", 0), ("task0", 1)}
    writer = opened(tmp_path, mode="resume", save_every_n_samples=1)
    assert writer.done == {("task0", 0), ("task0", 1)}
    writer.clear()
    writer.begin()
    assert names(tmp_path) == [
        "activations_batch_000001.pkl",
        "activations_batch_000002.pkl",
        "answers.jsonl",
        "metadata.json",
        "mine.pkl",
    ]
    writer.add(item(2), answer(2, "committed"))
    writer.finish()
    assert read_answers(tmp_path)["task1", 0]["text"] == "committed"  # and no torn line before it
    check_consistent(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {**SETTINGS["model"], "hash": "xyz"}}, r"model\.hash was 'abc', is 'xyz'"),
        ({"prompt": {"format": "turns"}}, r"prompt\.format was 'chat', is 'turns'"),
        ({"dataset": {"path": "tasks.json"}}, r"dataset\.hash was 'def', is None"),
        ({"activations": {}}, r"activations\.resid_post\.0 was .*float16.*, is None"),
        ({"seed": 1}, r"seed was None, is 1"),
    ],
)
def test_resume_names_the_settings_that_differ(tmp_path, changes, message):
    write(tmp_path, range(3))
    before = stored(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        opened(tmp_path, {**SETTINGS, **changes}, mode="resume")
    assert error.value.exit_code == 2 and "\n" not in str(error.value)
    assert stored(tmp_path) == before


def test_resume_allows_another_path_and_other_facts(tmp_path):
    write(tmp_path, range(3), finish=False)
    moved = {**SETTINGS, "model": {**SETTINGS["model"], "path": "/elsewhere"}}
    writer = RunFolder(tmp_path, moved, {"processes": 8}, mode="resume")
    writer.begin()
    assert writer.finish()["model"]["path"] == "/elsewhere"


def test_of_a_template_the_content_counts_and_not_its_path():
    """Also where runs are merged or read together, and where processes compare what they read."""
    one = {"prompt": {"format": "mine.jinja", "template_hash": "a"}}
    assert differences(one, {"prompt": {"format": "/b/mine.jinja", "template_hash": "a"}}) == []
    edited = {"prompt": {"format": "mine.jinja", "template_hash": "b"}}
    assert differences(one, edited) == ["prompt.template_hash was 'a', is 'b'"]
    other = {"prompt": {"format": "chat", "template_hash": "b"}}
    assert differences(one, other)[0] == "prompt.format was 'mine.jinja', is 'chat'"
    quantized = {"quantization": {"format": "gemm"}}, {"quantization": {"format": "gemv"}}
    assert len(differences(*quantized)) == 1


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def lose_an_answer(path):
    journal = path.with_name("answers.jsonl")
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([lines[0], b"\0" * len(lines[1][:-1]) + b"\n", *lines[2:]]))


@pytest.mark.parametrize("finish", [True, False])
@pytest.mark.parametrize(
    "damage", [Path.unlink, lambda path: path.write_bytes(b"x"), flip_a_bit, lose_an_answer]
)
def test_what_is_gone_is_computed_again(tmp_path, damage, finish):
    """And its number is not given again."""
    write(tmp_path, range(3), finish=finish, save_every_n_samples=1)
    damage(tmp_path / "activations_batch_000002.pkl")
    with begun(tmp_path, mode="resume", save_every_n_samples=1) as run:
        assert run.held.missing == {"activations_batch_000002.pkl"}
        assert run.done == {("task0", 0), ("task1", 0)}
        assert read_manifest(tmp_path)["total_samples"] == 2
        run.add(item(1), answer(1))
        run.finish()
    with begun(tmp_path, mode="resume", save_every_n_samples=1) as run:
        run.add(item(3), answer(3))
        run.finish()
    listed = [f["filename"] for f in read_manifest(tmp_path)["files"]]
    assert listed == [f"activations_batch_00000{i}.pkl" for i in (1, 3, 4, 5)]
    check_consistent(tmp_path)


FIRST_LINE = (json.dumps(answer(0)) + "\n").encode()


@pytest.mark.parametrize("content", [None, b"", b"no JSON\n", FIRST_LINE])
def test_a_lost_journal_is_noticed_at_once(tmp_path, content):
    write(tmp_path, range(3), save_every_n_samples=2)
    journal = tmp_path / "answers.jsonl"
    journal.write_bytes(content) if content is not None else journal.unlink()
    with begun(tmp_path, mode="resume", save_every_n_samples=2) as run:
        assert run.done == set()
        for index in range(3):
            run.add(item(index), answer(index))
        run.finish()
    check_consistent(tmp_path)


def test_a_file_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    write(tmp_path, range(3))

    def unreadable(file, most=None):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("utils.shards.held.checksum", unreadable)
    with pytest.raises(UserError, match=r"000001\.pkl: Input/output error; .*delete it"):
        opened(tmp_path, mode="resume")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
def test_the_advice_is_about_space_only_where_space_lacks(tmp_path, monkeypatch, number):
    run = write(tmp_path, range(2), finish=False)

    def refuse(*args):
        raise OSError(number, os.strerror(number))

    run.add(item(3), answer(3))
    monkeypatch.setattr(os, "fsync", refuse)
    words = "make it writable" if number == errno.EACCES else "put that right"
    with pytest.raises(UserError, match=rf"intact: {words} and --resume") as error:
        run.seal()
    assert "MB are free" not in str(error.value)


def test_overwrite_replaces_the_run_and_nothing_else(tmp_path):
    write(tmp_path, range(6), save_every_n_samples=1)
    for name in ("notes.txt", "activations_batch_1.pkl", "answers.jsonl.bak"):
        (tmp_path / name).write_text("foreign")
    (tmp_path / "activations_host003_batch_000001.pkl").write_text("of a run")
    before = stored(tmp_path)
    writer = opened(tmp_path, mode="overwrite")
    assert stored(tmp_path) == before  # until it starts
    assert writer.done == set()
    writer.clear()
    writer.begin()
    writer.add(item(7), answer(7))
    writer.finish()
    assert names(tmp_path) == [
        "activations_batch_000001.pkl",
        "activations_batch_1.pkl",
        "answers.jsonl",
        "answers.jsonl.bak",
        "metadata.json",
        "notes.txt",
    ]
    assert list(read_answers(tmp_path)) == [("task3", 1)]


@pytest.mark.parametrize("mode", ["resume", "new"])
def test_shards_without_a_manifest_are_not_written_over(tmp_path, mode):
    write(tmp_path, range(3))
    (tmp_path / "metadata.json").unlink()
    before = stored(tmp_path)
    with pytest.raises(UserError, match=r"no metadata\.json.*--resume.*--overwrite"):
        opened(tmp_path, mode=mode)
    assert stored(tmp_path) == before
    write(tmp_path, range(2), mode="overwrite")
    assert len(list(iter_items(tmp_path))) == 2


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"name": "a dataset"}', '{"format_version": 1, "files": [{"filename": "x"}]}'],
)
def test_a_metadata_json_that_is_no_manifest_is_left_alone(tmp_path, text):
    (tmp_path / "metadata.json").write_text(text)
    for mode in ("new", "resume", "overwrite"):
        with pytest.raises(UserError, match=r"metadata\.json is not the manifest of a run"):
            opened(tmp_path, mode=mode)
    assert names(tmp_path) == ["metadata.json"]


MISFITS = {
    "status": [None, 1],
    "skipped": [{}, [1], [{"task_id": 1, "sample_idx": 0}], [{"task_id": "x", "sample_idx": "0"}]],
    "files": [None, {}, [1]],
    "seconds": ["1", None],
    "total_samples": ["3"],
    "activations": [[], {"resid_post.0": 1}],
    "model": ["m", {"path": 1}],
    "dataset": [[], {"tasks": "3"}],
    "prompt": [1, {"augmentations": "2"}],
    "arguments": [None, {"num_shards": "2"}],
    "capture": [{"token_positions": 1}],
    "special_ids": [1],
}
ENTRY_MISFITS = {
    "filename": [1, None, "x.pkl"],
    "num_samples": ["2", -1, 1.5],
    "num_tokens": [None],
    "size_bytes": ["9"],
    "crc32c": [1, None],
    "samples": [1, [1], [["t"]], [[1, 0]], [["t", "0"]], [["t", -1]]],
    "float16_overflows": ["0"],
    "relative_error": [1, {"a": {"rows": "1"}}, {"a": {"other": 1}}],
    "uploaded": [
        None,
        "gs://bucket/x",
        {"uri": "/etc/passwd", "size": 1, "crc32c": "", "generation": 1},
        {"uri": "gs://bucket/other.pkl", "size": 1, "crc32c": "", "generation": 1},
        {"uri": 1},
        {},
    ],
}


def test_every_wrong_type_in_a_manifest_is_one_line(tmp_path):
    """Where a file says that it lies decides what is read: never a path, or another's object."""
    write(tmp_path, range(3))
    path = tmp_path / "metadata.json"
    manifest = json.loads(path.read_text())
    wrong = [{**manifest, key: value} for key, values in MISFITS.items() for value in values]
    entry = manifest["files"][0]
    for key, values in ENTRY_MISFITS.items():
        wrong += [{**manifest, "files": [{**entry, key: value}]} for value in values]
    texts = [*map(json.dumps, wrong), "[" * 100_000]
    for text in texts:
        path.write_text(text)
        with pytest.raises(UserError, match=r"metadata\.json is not the manifest of a run"):
            read_manifest(tmp_path)


def test_a_manifest_cannot_name_files_elsewhere(tmp_path):
    write(tmp_path / "run", range(3))
    path = tmp_path / "run" / "metadata.json"
    path.write_text(path.read_text().replace("activations_batch", "../activations_batch"))
    with pytest.raises(UserError, match="not the manifest"):
        list(iter_items(tmp_path / "run"))


def test_another_format_version_is_refused(tmp_path):
    write(tmp_path, range(3))
    path = tmp_path / "metadata.json"
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(UserError, match="has format 2"):
        opened(tmp_path, mode="resume")


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file: choose a folder"):
        opened(tmp_path / "file")
    with pytest.raises(UserError, match="Not a directory"):
        opened(tmp_path / "file" / "folder")

    def read_only(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("tempfile.TemporaryFile", read_only)
    with pytest.raises(UserError, match=r"cannot write to .*Read-only file system") as error:
        opened(tmp_path)
    assert error.value.exit_code == 2


# ------------------------------------------------------------------------------ one owner


@pytest.mark.parametrize("mode", ["new", "resume", "overwrite"])
def test_a_folder_is_one_process_s_from_the_check_to_the_end(tmp_path, mode):
    """Also while it loads its model, and has written nothing yet."""
    with opened(tmp_path / "run") as first:
        with pytest.raises(UserError, match="another process is writing to"):
            opened(tmp_path / "run", mode=mode)
        first.clear()
        first.begin()
        first.add(item(0), answer(0))
        first.finish()
    if mode == "new":
        with pytest.raises(UserError, match="complete, 1 samples"):
            opened(tmp_path / "run")


@pytest.mark.parametrize("host", [None, 0, 1])
def test_the_folder_of_a_process_that_is_frozen_is_not_taken(tmp_path, host):
    """Process 2 of three still holds its journal when fewer go on."""
    writers = hosts(tmp_path, 3, range(3))
    for writer in writers[:2]:
        writer.close()
    if host == 1:  # it does not touch what process 2 wrote; the first process does
        opened(tmp_path, mode="resume", host=1, hosts=2).close()
        return
    with pytest.raises(UserError, match="another process is writing to"):
        opened(tmp_path, mode="resume", host=host, hosts=2)


def test_a_frozen_process_that_wakes_changes_nothing(tmp_path, monkeypatch):
    """On a disk without locks, where the run went on without it."""

    def flock(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", flock)
    frozen = begun(tmp_path, save_every_n_samples=1)
    frozen.add(item(0), answer(0))
    with begun(tmp_path, mode="resume", save_every_n_samples=1) as run:
        run.add(item(1), answer(1, "of the run"))
        after = stored(tmp_path)
        with pytest.raises(UserError, match="was changed by another process") as error:
            frozen.add(item(1), answer(1, "of the frozen one"))
        assert error.value.exit_code == 1
        assert stored(tmp_path) == after
        run.add(item(2), answer(2))
        run.finish()
    check_consistent(tmp_path)
    assert read_answers(tmp_path)["task0", 1]["text"] == "of the run"


def test_a_shard_never_takes_a_name_that_is_there(tmp_path):
    with begun(tmp_path, save_every_n_samples=1) as run:
        (tmp_path / "activations_batch_000001.pkl").write_text("of somebody else")
        with pytest.raises(UserError, match="File exists"):
            run.add(item(0), answer(0))
    assert (tmp_path / "activations_batch_000001.pkl").read_text() == "of somebody else"
    assert read_manifest(tmp_path)["files"] == []
    taken = [f"activations{host}_batch_00000{i}.pkl" for host, i in (("", 4), ("_host001", 7))]
    with begun(tmp_path, mode="overwrite", save_every_n_samples=1, taken=taken) as run:
        run.add(item(0), answer(0))
    assert read_manifest(tmp_path)["files"][0]["filename"] == "activations_batch_000005.pkl"


def test_a_folder_that_was_only_looked_at_is_left_as_it_was(tmp_path):
    with opened(tmp_path / "new" / "run"):
        pass
    assert names(tmp_path) == []
    write(tmp_path / "run", range(2))
    before = stored(tmp_path / "run")
    for mode in ("resume", "overwrite"):
        with opened(tmp_path / "run", mode=mode):
            pass
    assert stored(tmp_path / "run") == before


# ----------------------------------------------------------------------- numbers that are none


def broken(index, rows):
    made = item(index, 5, 4)
    made["activations"]["resid_post.0"][rows] = np.nan
    return made


def test_rows_that_are_not_finite_are_counted(tmp_path):
    with begun(tmp_path, save_every_n_samples=1) as run:
        run.add(broken(0, [1, 3]), {**answer(0), "attempts": [{"logprob": float("nan")}]})
        run.add(item(1, 5, 4), answer(1))
        manifest = run.finish()
    assert manifest["non_finite"] == 2 == read_manifest(tmp_path)["non_finite"]
    assert [entry["non_finite"] for entry in manifest["files"]] == [2, 0]
    assert manifest["float16_overflows"] == 0
    assert "NaN" not in (tmp_path / "answers.jsonl").read_text()
    assert read_answers(tmp_path)["task0", 0]["attempts"] == [{"logprob": None}]
    assert np.isnan(next(iter(iter_items(tmp_path)))["activations"]["resid_post.0"][1]).all()


def test_an_answer_without_a_finite_logprob_ends_a_run_that_keeps_no_rows(tmp_path):
    nothing = {**item(0, 5, 4), "activations": {}, "prompt_length": 3}
    nothing["output_logprobs"] = np.full(2, np.nan)
    with begun(tmp_path) as run, pytest.raises(UserError, match="nothing that the model gives"):
        run.add(nothing, answer(0))


def test_a_sample_without_a_finite_row_ends_the_run(tmp_path):
    with begun(tmp_path, save_every_n_samples=2) as run:
        run.add(item(0, 5, 4), answer(0))
        with pytest.raises(
            UserError, match="task0, sample 1: nothing that the model gives is finite"
        ) as error:
            run.add(broken(1, slice(None)), answer(1))
        assert error.value.exit_code == 1
        run.seal()
    assert read_manifest(tmp_path)["total_samples"] == 1


# ----------------------------------------------------------------------------- several processes


def hosts(folder, count, samples, **options):
    writers = [opened(folder, host=host, hosts=count, **options) for host in range(count)]
    for step in (RunFolder.clear, RunFolder.begin):
        for writer in writers:
            step(writer)
    for index in samples:
        writers[index % count].add(item(index, 5, 4), answer(index))
    return writers


def test_processes_share_a_folder_and_a_reader_merges_them(tmp_path):
    for number, writer in enumerate(hosts(tmp_path, 3, range(7), save_every_n_samples=2)):
        writer.update_timing(10 + number, 1, 100)
        writer.finish()
    assert names(tmp_path)[:3] == [
        "activations_host000_batch_000001.pkl",
        "activations_host000_batch_000002.pkl",
        "activations_host001_batch_000001.pkl",
    ]
    assert {"answers_host002.jsonl", "metadata_host002.json"} <= set(names(tmp_path))
    manifest = read_manifest(tmp_path)
    assert (manifest["status"], manifest["total_samples"], manifest["total_batches"]) == (
        "complete",
        7,
        4,
    )
    assert (manifest["seconds"], manifest["tokens_per_second"]) == (12, 25)
    assert len({(i["task_id"], i["sample_idx"]) for i in iter_items(tmp_path)}) == 7
    assert read_answers(tmp_path)["task1", 1] == answer(3)
    write_json(tmp_path / "metadata.json", manifest)  # merged by a process, it counts once
    assert read_manifest(tmp_path) == manifest
    load_shard(tmp_path / "activations_host002_batch_000001.pkl")


@pytest.mark.parametrize("host", [None, 0, 1])
def test_a_run_is_resumed_with_another_number_of_processes(tmp_path, host):
    for number, writer in enumerate(hosts(tmp_path, 3, range(9), save_every_n_samples=2)):
        if number < 2:
            writer.update_timing(10, 1, 60)
            writer.seal()  # the third dies with what it had in memory
        writer.close()
    assert read_manifest(tmp_path)["status"] == "running"
    writer = opened(tmp_path, host=host, mode="resume")
    assert {(f"task{i // 2}", i % 2) for i in range(9)} - writer.done == {("task4", 0)}
    writer.clear()
    writer.begin()
    writer.add(item(8, 5, 4), answer(8))
    writer.update_timing(2, 1, 24)
    writer.finish()
    check_consistent_hosts(tmp_path, 9)
    manifest = read_manifest(tmp_path)
    assert manifest["status"] == ("running" if writer.writer.owner else "complete")
    assert (manifest["seconds"], manifest["compile_seconds"]) == (12, 2)
    assert manifest["tokens_per_second"] * 12 == pytest.approx(144)


def check_consistent_hosts(folder, total):
    listed = [(i["task_id"], i["sample_idx"]) for i in iter_items(folder)]
    assert len(listed) == len(set(listed)) == len(read_answers(folder)) == total


def test_what_is_stored_is_not_skipped(tmp_path):
    """Two processes leave a sample out for want of memory; one finds room for it on its mesh."""
    skipped = [
        {"task_id": f"task{i}", "sample_idx": 0, "reason": "takes more memory than there is"}
        for i in (1, 2)
    ]
    for host in (0, 1):
        with opened(tmp_path, host=host, mode="resume") as run:
            run.clear()
            run.begin(skipped)
            run.finish()
    with begun(tmp_path, mode="resume") as run:
        run.add(item(2, 5, 4), answer(2))
        run.finish()
    assert read_manifest(tmp_path)["files"][0]["samples"] == [["task1", 0]]
    assert read_manifest(tmp_path)["skipped"] == skipped[1:]


@pytest.mark.parametrize("damage", [Path.unlink, flip_a_bit])
def test_what_is_lost_is_listed_by_nobody(tmp_path, damage):
    """The third of three processes takes no part any more, nor is the run complete."""
    for writer in hosts(tmp_path, 3, range(6), save_every_n_samples=1):
        writer.finish()
        writer.close()
    write_json(tmp_path / "metadata.json", read_manifest(tmp_path))
    damage(tmp_path / "activations_host002_batch_000001.pkl")
    with opened(tmp_path, host=0, hosts=2, mode="resume") as run:
        run.settle(run.held.missing, run.shards)
        run.clear()
        run.begin()
    for name, status, count in (("", "running", 5), ("_host002", "complete", 1)):
        manifest = json.loads((tmp_path / f"metadata{name}.json").read_text())
        assert manifest["status"] == status
        assert manifest["total_samples"] == len(manifest["files"]) == count


def test_a_process_clears_only_its_own_leftovers(tmp_path):
    for writer in hosts(tmp_path, 2, range(2)):
        writer.close()
    for host in (0, 1):
        (tmp_path / f"activations_host00{host}_batch_000001.pkl.partial").write_text("")
    begun(tmp_path, host=1, mode="resume")
    assert "activations_host000_batch_000001.pkl.partial" in names(tmp_path)
    assert "activations_host001_batch_000001.pkl.partial" not in names(tmp_path)


@pytest.mark.parametrize("name", ["metadata.json", "metadata_host000.json"])
def test_whichever_manifest_knows_of_an_upload_is_believed(tmp_path, name):
    for writer in hosts(tmp_path, 2, range(2)):
        writer.finish()
    write_json(tmp_path / "metadata.json", read_manifest(tmp_path))
    manifest = json.loads((tmp_path / name).read_text())
    manifest["files"][0]["uploaded"] = True
    write_json(tmp_path / name, manifest)
    assert [f["uploaded"] for f in read_manifest(tmp_path)["files"]] == [True, False]


def test_two_files_of_one_name_are_an_error(tmp_path):
    """Also where they are of equal size, as shards of other numbers are."""
    for writer in hosts(tmp_path, 2, range(2)):
        writer.finish()
    manifest = read_manifest(tmp_path)
    manifest["files"][1]["crc32c"] = "AAAAAA=="
    write_json(tmp_path / "metadata.json", manifest)
    with pytest.raises(UserError, match="different files activations_host001_batch_000001"):
        read_manifest(tmp_path)


def test_one_sample_in_two_shards_is_an_error(tmp_path):
    for host in (0, 1):
        write(tmp_path / str(host), [0], host=host)
        shutil.copytree(tmp_path / str(host), tmp_path / "both", dirs_exist_ok=True)
    with pytest.raises(UserError, match=r"both hold task0, sample 0"):
        read_manifest(tmp_path / "both")


# ------------------------------------------------------------------------------ kills, full disks


@pytest.mark.parametrize("way", ["steps", "moments"])
def test_killed_anywhere_a_run_resumes_with_every_sample_once(way):
    script = Path(__file__).with_name("shard_crashes.py")
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None  # where fsync takes no time
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        command = [sys.executable, str(script), way, folder]
        run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) > 20  # kills


def test_what_a_manifest_lists_is_on_the_disk_before_it(tmp_path, monkeypatch):
    """Where power fails, all is lost that was not synced, which a kill does not show."""
    steps, fsync = [], os.fsync

    def noted(handle):
        fsync(handle)
        steps.append(whole_name(os.path.basename(os.readlink(f"/proc/self/fd/{handle}"))))

    with begun(tmp_path, save_every_n_samples=1) as run:
        monkeypatch.setattr(os, "fsync", noted)
        run.add(item(0), answer(0))
    shard, folder = "activations_batch_000001.pkl", tmp_path.name
    assert steps == [shard, folder, "answers.jsonl", "metadata.json", folder]


@pytest.mark.parametrize("target", ["activations_batch", "answers", "metadata"])
def test_a_full_disk_ends_the_run_in_one_line(tmp_path, monkeypatch, target):
    writer = write(tmp_path, range(4), finish=False, save_every_n_samples=2)
    manifest = (tmp_path / "metadata.json").read_bytes()
    original = Sink.write

    def write_part(sink, buffer):
        if sink.file and target in os.readlink(f"/proc/self/fd/{sink.file.fileno()}"):
            original(sink, memoryview(buffer)[:10])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(sink, buffer)

    writer.add(item(4), answer(4))
    monkeypatch.setattr(Sink, "write", write_part)
    with pytest.raises(
        UserError, match=r"No space left.*takes 0\.\d MB, .* MB are free.*intact.*--resume"
    ) as error:
        writer.add(item(5), answer(5))
    assert error.value.exit_code == 1 and "\n" not in str(error.value)
    monkeypatch.undo()
    for call in (writer.seal, writer.finish):  # the manifest's word is the last
        with pytest.raises(UserError, match="No space left"):
            call()
    assert (tmp_path / "metadata.json").read_bytes() == manifest
    assert not [name for name in names(tmp_path) if name.endswith(".partial")]
    check_consistent(tmp_path)
    write_rest(tmp_path)


def write_rest(folder, total=6):
    writer = begun(folder, mode="resume")
    for index in range(total):
        if (f"task{index // 2}", index % 2) not in writer.done:
            writer.add(item(index), answer(index))
    writer.finish()
    check_consistent(folder)
    assert read_manifest(folder)["total_samples"] == total


def test_a_disk_that_is_really_full(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk can only be mounted by root")
    try:
        run = tmp_path / "run"
        (tmp_path / "ballast").write_bytes(bytes(400_000))
        with pytest.raises(UserError, match="No space left") as error:
            write(run, range(6), tokens=15_000, save_every_n_samples=1)  # 240 KB each
        assert error.value.exit_code == 1
        check_consistent(run)
        (tmp_path / "ballast").unlink()
        assert 0 < read_manifest(run)["total_samples"] < 6
        write_rest(run, 3)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_file_size_limit(tmp_path):
    writer = write(tmp_path, range(4), finish=False, save_every_n_samples=2)
    writer.add(item(4), answer(4))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(UserError, match="File too large; the shard takes"):
            writer.add(item(5), answer(5))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    check_consistent(tmp_path)
    write_rest(tmp_path)


# ------------------------------------------------------------------------------------- reading


@pytest.fixture
def shard(tmp_path):
    write(tmp_path, range(4), save_every_n_samples=2)
    return tmp_path / "activations_batch_000002.pkl"


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_a_bit, "damaged: its crc32c is"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes, not the"),
        (lambda path: path.write_bytes(b""), "it has 0 bytes"),
        (lambda path: path.unlink(), "No such file"),
        (lambda path: path.rename(path.with_name("copy.pkl")) and path.mkdir(), "Is a directory"),
    ],
)
def test_a_damaged_shard_is_refused_before_it_is_unpickled(shard, damage, message, monkeypatch):
    assert len(load_shard(shard)) == 2
    damage(shard)

    def never(file):
        raise AssertionError("unpickled")

    monkeypatch.setattr("utils.shards.reader.load", never)
    with pytest.raises(UserError, match=message) as error:
        load_shard(str(shard))
    assert shard.name in str(error.value) and error.value.exit_code == 2


def test_a_shard_needs_its_manifest(shard, tmp_path):
    other = shard.with_name("activations_batch_000009.pkl")
    shutil.copy(shard, other)
    with pytest.raises(UserError, match="does not list it"):
        load_shard(other)
    assert len(load_shard(other, verify=False)) == 2
    (tmp_path / "metadata.json").unlink()
    with pytest.raises(UserError, match=r"no metadata\.json"):
        load_shard(shard)
    with pytest.raises(UserError, match="No such file"):
        read_manifest(tmp_path / "nowhere")


class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


def seal(shard, data):
    """Put `data` in the shard's place, with a manifest that vouches for it."""
    shard.write_bytes(data)
    manifest = json.loads((shard.parent / "metadata.json").read_text())
    with open(os.devnull, "wb") as nowhere:
        sink = Sink(nowhere)
        sink.write(data)
    for entry in manifest["files"]:
        if entry["filename"] == shard.name:
            entry.update(size_bytes=len(data), crc32c=sink.crc32c)
    write_json(shard.parent / "metadata.json", manifest)


def test_a_hostile_shard_with_a_valid_manifest_runs_nothing(shard, monkeypatch):
    monkeypatch.chdir(shard.parent)
    items = load_shard(shard)
    seal(shard, pickle.dumps(items, 5))
    assert len(load_shard(shard)) == 2
    items[1]["prediction"] = Evil()
    seal(shard, pickle.dumps(items, 5))
    for verify in (True, False):
        with pytest.raises(UserError, match=r"activations_batch_000002\.pkl is refused.*system"):
            load_shard(shard, verify)
    with pytest.raises(UserError, match="system"):
        list(iter_items(shard.parent))
    assert not Path("executed").exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"no pickle", "no pickle"),
        (pickle.dumps([{"task_id": "x"}]), "item 0: it lacks sample_idx"),
    ],
)
def test_a_sealed_file_that_is_no_shard(shard, data, message):
    seal(shard, data)
    with pytest.raises(UserError, match=message):
        load_shard(shard)


def test_a_shard_under_another_s_name_is_refused(shard):
    seal(shard, shard.with_name("activations_batch_000001.pkl").read_bytes())
    with pytest.raises(UserError, match="other samples"):
        load_shard(shard)


def test_a_journal_that_was_tampered_with(shard):
    journal = shard.parent / "answers.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("{\n" + "".join(lines))  # what is no answer is in nobody's way
    assert len(read_answers(shard.parent)) == 4
    journal.write_text("".join(lines[:3]))
    with pytest.raises(UserError, match=r"answers\.jsonl lacks the answer to task1, sample 1"):
        read_answers(shard.parent)
