"""What a dry run says, and that it is what the run then does."""

import contextlib

import pytest
from conftest import NoSignals
from test_arc_inference import planned

from utils.plan.plan import plan_run
from utils.run.dry_run import bytes_per_layer, plan_storage, planned_items, print_plan
from utils.run.loop import run
from utils.run.opening import stored_already
from utils.run.peers import Peers
from utils.shards import load_shard
from utils.shards.items import sample_key

ALONE = ["--max_output_tokens", 0]


class TwoPeers(Peers):
    """Stands for process 0 of two that write to two disks; the other one's folder holds `done`."""

    index, count = 0, 2

    def __init__(self, done):
        self._done = done

    def exchange(self, name, value):
        if name == "samples":
            shard = {"activations_host001_batch_000001.pkl": ["crc", self._done]}
            files = list(shard) * bool(self._done)
            other = {"listed": shard, "there": files, "files": files, "missing": [], "unsound": []}
            return [value, {"folder": "elsewhere", **other}]
        return [value] if name == "weights" else [value, value]

    def check(self):
        pass

    @contextlib.contextmanager
    def together(self, step):
        yield


def test_of_several_processes_all_that_is_stored_counts(tiny_model, tasks_file, tmp_path):
    plan = planned(tiny_model, tasks_file, tmp_path, *ALONE)
    keys = [sample.key for sample in plan.samples]
    assert stored_already(plan, TwoPeers(keys[:3])) == (set(keys[:3]), 0.5)
    assert stored_already(plan, Peers()) == (set(), 1)
    assert not plan.run_folder.exists()


def test_a_disk_that_holds_its_share_is_not_refused(
    tiny_model, tasks_file, tmp_path, monkeypatch, capsys
):
    plan = planned(tiny_model, tasks_file, tmp_path, *ALONE, "--no_logits")
    need = sum(s.length.total for s in plan.samples) * 32 * 2 * len(plan.capture.names)
    monkeypatch.setattr("utils.run.dry_run.free_bytes", lambda folder: need * 0.6)
    print_plan(plan, set())
    assert "would be refused: " in capsys.readouterr().out
    print_plan(plan, {plan.samples[0].key}, share=0.5)
    said = capsys.readouterr().out
    assert "would be refused: " not in said and "stored        1 of these already" in said


def test_generated_answers_are_planned_at_their_longest(tiny_model, tasks_file, tmp_path):
    """The bound holds shard by shard, and nothing of a model is asked for it."""
    flags = ["--max_output_tokens", 24, "--save_every_n_samples", 3, "--augmentations", 2]
    plan = planned(tiny_model, tasks_file, tmp_path, *flags)
    tokens, shards = plan_storage(plan)
    items = {sample_key(item): item for item in planned_items(plan, 0)}
    assert {len(i["input_ids"]) - i["prompt_length"] for i in items.values()} == {24}
    assert all(len(i["cells_original"]) == len(i["cells"]) for i in items.values())
    manifest = run(plan_run(plan.request), NoSignals())
    assert manifest["total_tokens"] <= tokens == sum(len(i["input_ids"]) for i in items.values())
    written = [(entry["num_samples"], entry["size_bytes"]) for entry in manifest["files"]]
    assert [count for count, _ in written] == [count for count, _ in shards]
    assert all(size <= most for (_, size), (_, most) in zip(written, shards, strict=True))


@pytest.mark.parametrize(
    ("tokens", "more"),
    [
        ("all", []),
        ("last", []),
        ("cells", ["--activation_dtype", "int8"]),
        ("prompt", ["--max_rows_per_sample", 5]),
    ],
)
def test_bytes_of_a_layer_are_those_that_are_stored(tiny_model, tasks_file, tmp_path, tokens, more):
    """At both its hook points, scales of int8 too, of prompts and forced answers."""
    flags = ["--teacher_forcing", "--token_positions", tokens, "--layers_to_extract", 0, 1, *more]
    flags += ["--hook_points", "resid_post", "mlp_out", "--max_output_tokens", 8]
    plan = planned(tiny_model, tasks_file, tmp_path, *flags)
    manifest = run(plan, NoSignals())
    shards = [load_shard(plan.run_folder / entry["filename"]) for entry in manifest["files"]]
    items = [item for shard in shards for item in shard]
    kinds = [item[kind] for item in items for kind in ("activations", "scales") if kind in item]
    stored = [a.nbytes for kind in kinds for name, a in kind.items() if name.endswith(".1")]
    assert bytes_per_layer(plan) == sum(stored) > 0
