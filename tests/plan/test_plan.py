"""A plan: what it holds, what a resumed run must have the same, and paths that are refused."""

import json
import os
import random
import shutil
import socket
from dataclasses import FrozenInstanceError, replace

import jax
import pytest
from checkpoints import write_adapter
from conftest import random_task, words
from test_arc_inference import planned
from tiny import write_model

import simple_extraction_inference as script
from utils.errors import UserError
from utils.model.layout import Layout
from utils.plan import plan as plan_module
from utils.plan.plan import plan_meshes
from utils.run.dry_run import check_disk

PROMPT_ALONE = ["--max_output_tokens", 0, "--layers_to_extract", 0, "--max_tasks", 1]


# ---------------------------------------------------------------------------------- plans


def test_a_plan_does_not_change(tiny_model, tasks_file, tmp_path):
    plan = planned(tiny_model, tasks_file, tmp_path, *PROMPT_ALONE)
    for name in ("layout", "batches", "request"):
        with pytest.raises(FrozenInstanceError):
            setattr(plan, name, None)
    assert isinstance(plan.samples, tuple) and isinstance(plan.batches, tuple)


def test_plans_for_several_meshes_from_one_reading(tiny_model, tasks_file, tmp_path, monkeypatch):
    """The tokenizer and the tasks are read once; each plan has batches for its own mesh."""
    flags = ["--batch_size", 2, "--max_output_tokens", 0]
    request = planned(tiny_model, tasks_file, tmp_path, *flags).request
    read = []
    for name in ("load_codec", "read_tasks", "open_checkpoint"):
        original = getattr(plan_module, name)

        def counted(*args, name=name, original=original):
            read.append(name)
            return original(*args)

        monkeypatch.setattr(plan_module, name, counted)
    shapes = [(8, 1), (4, 2), None]
    plans = list(plan_meshes(request, shapes, jax.devices(), writes=False))
    assert sorted(read) == ["load_codec", "open_checkpoint", "read_tasks"]
    assert [(p.layout.data, p.layout.model) for p in plans] == [(8, 1), (4, 2), (8, 1)]
    for plan in plans:
        assert isinstance(plan.layout, Layout) and plan.codec is plans[0].codec
        assert all(len(batch.rows) % plan.layout.data == 0 for batch in plan.batches)
        found = [i for batch in plan.batches for i in batch.rows if i >= 0]
        assert sorted(found) == list(range(len(plan.samples)))


def test_what_is_still_to_do(tiny_model, tasks_file, tmp_path):
    """Shapes stay, samples that are done become padding, batches without any other go."""
    plan = planned(tiny_model, tasks_file, tmp_path, "--max_output_tokens", 0, "--batch_size", 2)
    assert plan.without(set()) == list(plan.batches)
    assert plan.without({sample.key for sample in plan.samples}) == []
    done = {plan.samples[i].key for i in (*plan.batches[0].rows, plan.batches[1].rows[0]) if i >= 0}
    first, *rest = plan.without(done)
    assert first == replace(plan.batches[1], rows=(-1, *plan.batches[1].rows[1:]))
    assert rest == list(plan.batches[2:])


# ------------------------------------------------------------------------------- resuming


@pytest.fixture(scope="module")
def finished(tiny_model, tasks_file, tmp_path_factory):
    """A model of its own, and a complete run of it."""
    from conftest import NoSignals

    from utils.run.loop import run

    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(tiny_model, folder / "model")
    run(planned(folder / "model", tasks_file, folder, *PROMPT_ALONE), NoSignals())
    return folder


def resumed(folder, tasks_file, in_shell):
    paths = {"model_path": folder / "model", "dataset_path": tasks_file, "dtype": "float32"}
    paths |= {"output_path": folder / "predictions.json", "activations_dir": folder / "acts"}
    return in_shell(script, [*words(paths), *PROMPT_ALONE, "--resume"])


def swap_two_colors(model):
    fields = json.loads((model / "tokenizer.json").read_text())
    vocabulary = fields["model"]["vocab"]
    vocabulary["1"], vocabulary["2"] = vocabulary["2"], vocabulary["1"]
    (model / "tokenizer.json").write_text(json.dumps(fields))


def add_a_token(model):
    fields = json.loads((model / "tokenizer_config.json").read_text())
    fields["unk_token"] = fields["eos_token"]
    (model / "tokenizer_config.json").write_text(json.dumps(fields))


def end_elsewhere(model):
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [7]}))


@pytest.mark.parametrize(
    ("edit", "name"),
    [
        (swap_two_colors, "prompt.tokenizer_hash"),
        (add_a_token, "prompt.tokenizer_hash"),
        (end_elsewhere, "prompt.stop_ids"),
    ],
)
def test_resume_refuses_other_tokens(finished, tasks_file, in_shell, tmp_path, edit, name):
    """One run would hold two ids for one color, or two ends of an answer."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    assert resumed(folder, tasks_file, in_shell)[0] == 0
    edit(folder / "model")
    code, _, stderr = resumed(folder, tasks_file, in_shell)
    (line,) = [line for line in stderr.splitlines() if line.startswith("error")]
    assert code == 2 and f"{name} was " in line and "cannot resume" in line


def test_a_run_of_an_earlier_version_is_resumed(finished, tasks_file, in_shell, tmp_path):
    """Its manifest says neither tokenizer nor stop ids, and knows no adapters or interventions."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    path = folder / "acts" / "metadata.json"
    manifest = json.loads(path.read_text())
    assert manifest.pop("interventions") == []
    assert manifest["model"].pop("adapter") is manifest["model"].pop("quantization") is None
    del manifest["prompt"]["tokenizer_hash"], manifest["prompt"]["stop_ids"]
    path.write_text(json.dumps(manifest))
    assert resumed(folder, tasks_file, in_shell)[0] == 0
    manifest["interventions"] = [{"hook": "resid_post.0", "op": "zero"}]
    path.write_text(json.dumps(manifest))
    code, _, stderr = resumed(folder, tasks_file, in_shell)
    assert code == 2 and "interventions was" in stderr


def test_the_tokenizer_of_an_adapter_and_the_ends_of_its_base(tiny_model, tasks_file, tmp_path):
    """Its folder may hold the tokenizer that it was trained with, and no generation_config.json."""
    model, lora = tmp_path / "model", tmp_path / "lora"
    shutil.copytree(tiny_model, model)
    end_elsewhere(model)
    shapes = {"model.layers.1.mlp.down_proj": (32, 64)}
    write_adapter(lora, shapes, base_model_name_or_path=str(model))
    without = planned(lora, tasks_file, tmp_path, *PROMPT_ALONE).codec
    for path in (model / "tokenizer.json", model / "tokenizer_config.json"):
        shutil.copy(path, lora)
    shutil.copy(model / "chat_template.jinja", lora)
    swap_two_colors(lora)
    codec = planned(lora, tasks_file, tmp_path, *PROMPT_ALONE).codec
    assert codec.tokenizer_hash != without.tokenizer_hash
    assert codec.stop_ids == without.stop_ids and 7 in codec.stop_ids


# ---------------------------------------------------------------------------------- paths


@pytest.fixture(params=["device", "link to a device", "fifo", "socket"])
def no_file(request, tmp_path, monkeypatch):
    """A path of something that can be written to, and must not be replaced."""
    monkeypatch.chdir(tmp_path)  # a socket's name is short
    if request.param == "device":
        yield "/dev/null"
    elif request.param == "fifo":
        os.mkfifo("out")
        yield "out"
    elif request.param == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("out")
            yield "out"
    else:
        os.symlink("/dev/null", "out")
        yield "out"


@pytest.mark.parametrize("flags", [[], ["--overwrite"], ["--resume"]])
def test_what_is_no_file_is_not_replaced(tiny_model, tasks_file, tmp_path, no_file, flags):
    before = os.lstat(no_file).st_ino
    with pytest.raises(UserError, match="no regular file") as caught:
        planned(tiny_model, tasks_file, tmp_path, "--output_path", no_file, *flags)
    assert "\n" not in str(caught.value) and "--overwrite" not in str(caught.value)
    assert "--output_path" in str(caught.value) and os.lstat(no_file).st_ino == before


# ----------------------------------------------------------------------------------- disk


def test_the_disk_is_asked_for_what_is_missing(tiny_model, tasks_file, tmp_path, monkeypatch):
    """Samples that any process has stored do not count, and of the others this disk's share."""
    plan = planned(tiny_model, tasks_file, tmp_path, "--max_output_tokens", 0, "--no_logits")
    keys = [sample.key for sample in plan.samples]
    need = sum(s.length.total for s in plan.samples) * 32 * 2 * len(plan.capture.names)
    monkeypatch.setattr("utils.run.dry_run.free_bytes", lambda folder: need - 1)
    with pytest.raises(UserError, match="needs at least"):
        check_disk(plan, set())
    check_disk(plan, set(keys[:1]))
    check_disk(plan, set(), share=0.5)
    monkeypatch.setattr("utils.run.dry_run.free_bytes", lambda folder: need / 2 - 1)
    with pytest.raises(UserError, match="needs at least"):
        check_disk(plan, set(), share=0.5)
    deletes = replace(plan, request=replace(plan.request, delete_after_upload=True))
    with pytest.raises(UserError, match="lower --max_pending_gb and --max_shard_mb"):
        check_disk(deletes, set(), share=0.5)


def test_what_is_replaced_makes_room(tiny_model, tasks_file, tmp_path, monkeypatch):
    flags = ["--max_output_tokens", 0, "--no_logits", "--overwrite"]
    plan = planned(tiny_model, tasks_file, tmp_path, *flags)
    need = sum(s.length.total for s in plan.samples) * 32 * 2 * len(plan.capture.names)
    monkeypatch.setattr("utils.run.dry_run.free_bytes", lambda folder: 1000)
    plan.run_folder.mkdir()
    (plan.run_folder / "mine.txt").write_bytes(bytes(need))
    with pytest.raises(UserError, match="needs at least"):
        check_disk(plan, set())
    (plan.run_folder / "activations_batch_000001.pkl").write_bytes(bytes(need - 1000))
    check_disk(plan, set())


# ---------------------------------------------------------------------------- what fits


@pytest.fixture
def short_and_long(tmp_path):
    """A plan of a prompt of some hundred tokens and one of 2,000, made anew at each call."""
    grid = [[1] * 25] * 25
    tasks = {
        "short": random_task(random.Random(0), 1)[0],
        "long": {"train": [{"input": grid, "output": grid}], "test": [{"input": grid}]},
    }
    path = tmp_path / "tasks.json"
    path.write_text(json.dumps(tasks))
    model = write_model(tmp_path / "model", max_position_embeddings=4096)
    flags = ("--prompt_format", "compact", *PROMPT_ALONE[:-2])
    return lambda: planned(model, path, tmp_path, *flags)


def test_a_sample_that_does_not_fit_is_skipped(short_and_long, monkeypatch):
    """With its reason, before anything is compiled, and the others are run."""
    plan = short_and_long()
    work, layout, (batch, *_) = plan.workload, plan.layout, plan.batches
    assert len(plan.samples) == 2 and batch.shape.slots > 1024
    need = work.parameter_bytes(layout) + work.batch_bytes(layout, 1, 1024)
    monkeypatch.setattr(plan_module, "device_bytes", lambda device: int(need / 0.9) + 1)
    plan = short_and_long()
    assert [sample.key for sample in plan.samples] == [("short", 0)]
    (skipped,) = plan.skipped
    assert (skipped["task_id"], skipped["sample_idx"]) == ("long", 0)
    assert skipped["reason"].startswith("does not fit in 0.0 GB a device: ")


def test_nothing_fits(short_and_long, monkeypatch):
    monkeypatch.setattr(plan_module, "device_bytes", lambda device: 1000)
    with pytest.raises(UserError, match=r"not even the shortest sample, \d+ tokens, fits on 1 dev"):
        short_and_long()
