"""Which rows of what the device captures are stored: cells, and some that are drawn."""

from dataclasses import replace

import numpy as np
import pytest
from runs import extracted, planned

from utils.prompt.codec import Codec
from utils.run.dry_run import plan_storage
from utils.shards import iter_items
from utils.shards.items import sample_key
from utils.shards.manifest import read_manifest


def items_of(folder, model, tasks, **flags):
    flags = {"activation_dtype": "float32", "layers_to_extract": [1, 3], **flags}
    made = extracted(folder, model, tasks, **flags)
    return {sample_key(item): item for item in iter_items(made)}


@pytest.fixture
def answers_hold_a_cell(monkeypatch):
    """As they are read, the third and the fourth token of every generated answer."""
    read = Codec.read

    def with_cell(codec, ids, prompt_length=0):
        cells = [[-1, 1, 0, 0, 5, prompt_length + 2, prompt_length + 4]]
        return replace(read(codec, ids, prompt_length), grid=[[5]], cells=np.array(cells, np.int32))

    monkeypatch.setattr(Codec, "read", with_cell)


@pytest.mark.parametrize("forced", [True, False])
def test_rows_of_cells_are_those_of_the_item(
    forced, four_layers, tasks_file, tmp_path, answers_hold_a_cell
):
    """All of them, or some that are drawn, whatever the batches; those of the answer too."""
    flags = {"teacher_forcing": True} if forced else {}
    every = items_of(tmp_path / "all", four_layers, tasks_file, **flags)
    flags["token_positions"] = "cells"
    cells = items_of(tmp_path / "cells", four_layers, tasks_file, **flags)
    flags["max_rows_per_sample"] = 9
    some, batched, other = (
        items_of(tmp_path / name, four_layers, tasks_file, **flags, **more)
        for name, more in (("some", {}), ("batched", {"batch_size": 3}), ("other", {"seed": 1}))
    )
    assert cells.keys() == some.keys() == batched.keys() == every.keys()
    for key, item in every.items():
        held = {t for *_, start, stop in item["cells"].tolist() for t in range(start, stop)}
        assert max(held) >= item["prompt_length"] and "positions" not in item
        assert cells[key]["positions"].tolist() == sorted(held)
        drawn = some[key]["positions"].tolist()
        assert drawn == sorted(set(drawn)) == batched[key]["positions"].tolist()
        assert len(drawn) == min(9, len(held)) and set(drawn) <= held
        for run in (cells, some, batched):
            for name, states in run[key]["activations"].items():
                whole = item["activations"][name][run[key]["positions"]]
                assert np.array_equal(states, whole)
    assert any(other[key]["positions"].tolist() != some[key]["positions"].tolist() for key in every)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("max_rows", [None, 30])
@pytest.mark.parametrize("positions", ["cells", "prompt"])
def test_the_dry_run_counts_the_rows_that_are_kept(
    positions, max_rows, dtype, four_layers, tasks_file, tmp_path
):
    flags = {"teacher_forcing": True, "token_positions": positions, "activation_dtype": dtype}
    flags |= {"max_rows_per_sample": max_rows} if max_rows else {}
    folder = extracted(tmp_path, four_layers, tasks_file, **flags)
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    words = [word for word in words if word is not True]
    words += ["--layers_to_extract", 0, 2, 3, "--save_every_n_samples", 2]
    plan = planned(four_layers, tasks_file, tmp_path / "dry", *words)
    written = [(e["num_samples"], e["size_bytes"]) for e in read_manifest(folder)["files"]]
    assert plan_storage(plan)[1] == written
    for item in iter_items(folder):
        (sample,) = (s for s in plan.samples if s.key == sample_key(item))
        length = sample.length
        counted = plan.capture.num_kept(length.prompt, length.answer, sample.cell_tokens)
        assert counted == len(item["positions"])


def test_a_generated_answer_is_planned_as_cells_alone(four_layers, tasks_file, tmp_path):
    flags = ["--token_positions", "cells", "--max_output_tokens", 6, "--save_every_n_samples", 2]
    plan = planned(four_layers, tasks_file, tmp_path / "dry", *flags)
    folder = extracted(tmp_path, four_layers, tasks_file, token_positions="cells")
    written = [e["size_bytes"] for e in read_manifest(folder)["files"]]
    at_most = [size for _, size in plan_storage(plan)[1]]
    # Of eight samples, six tokens each in three layers of 32 float16 values, and what says so.
    assert all(size <= most for most, size in zip(at_most, written, strict=True))
    assert sum(at_most) - sum(written) < 8 * (6 * 3 * 32 * 2 + 1000)
