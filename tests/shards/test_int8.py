"""Activations as int8: their values, how far off they are, and that every reader gives floats."""

import io
import json
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
from conftest import NoSignals
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from runs import extracted
from shard_crashes import item

from utils.dataset import ActivationDataset, Selection
from utils.dataset.bridges import export_for_saelens
from utils.dataset.contrast import contrast
from utils.dataset.stats import activation_stats
from utils.run import conclude
from utils.shards import __main__ as merge
from utils.shards import iter_items, load_shard
from utils.shards.held import Writer
from utils.shards.int8 import RelativeError, quantized
from utils.shards.items import load, sample_key, stored_item
from utils.shards.manifest import Shard, read_manifest, totals, union_of
from utils.shards.pickles import dump
from utils.shards.writer import RunFolder
from utils.store.local import Sink

NAME = "resid_post.0"
SETTINGS = {"activations": {NAME: {"layer": 0, "dtype": "int8"}}}


def test_values_and_scales_of_rows_that_one_can_check():
    rows = np.array([[127, -127, 1, 0.4], [0, 0, 0, 0], [2.54, -1.27, 0.5, 0.02]], np.float32)
    values, scales, errors = quantized(rows)
    assert values.dtype == np.int8 and scales.dtype == np.float32
    assert values.tolist() == [[127, -127, 1, 0], [0, 0, 0, 0], [127, -64, 25, 1]]
    assert scales.tolist() == [1, 0, pytest.approx(0.02)]
    off = [0.4, 0.0, 0.01]  # -1.27 becomes -1.28
    lengths = [(2 * 127**2 + 1 + 0.16) ** 0.5, 1, (2.54**2 + 1.27**2 + 0.25 + 0.0004) ** 0.5]
    np.testing.assert_allclose(errors, np.divide(off, lengths), rtol=1e-4)
    assert all(len(part) == 0 for part in quantized(np.zeros((0, 4), np.float32)))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3.4028235e38, 1e-38, 1e-45])
def test_what_int8_cannot_hold_is_kept_whole(value):
    rows = np.ones((3, 4), np.float32)
    rows[1] = 0
    rows[1, 2] = value
    values, scales, errors = quantized(rows)
    assert values is None and scales is None
    assert errors.tolist() == [0.0] * (3 if np.isfinite(value) else 2)


@given(
    npst.arrays(
        np.float32,
        st.tuples(st.integers(0, 6), st.integers(1, 9)),
        elements=st.floats(width=32) | st.floats(-1e4, 1e4, width=32),
    )
)
def test_no_element_is_off_by_more_than_1_254th_of_the_largest(rows):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        values, scales, errors = quantized(rows)
    if values is None:
        extreme = np.abs(rows).max(axis=1)
        assert not (np.isfinite(extreme) & ((extreme == 0) | (extreme > 1e-35))).all() or (
            extreme.max() > 3.4e38
        )
        return
    back = values.astype(np.float64) * scales[:, None].astype(np.float64)
    exact = rows.astype(np.float64)
    largest = np.abs(exact).max(axis=1, keepdims=True)
    assert (np.abs(back - exact) <= largest / 254 * (1 + 1e-5)).all()
    norms = np.linalg.norm(exact, axis=1)
    want = np.linalg.norm(back - exact, axis=1) / np.where(norms, norms, 1)
    np.testing.assert_allclose(errors, want, rtol=1e-3, atol=1e-6)


def test_large_arrays_are_worked_on_in_blocks(monkeypatch):
    rows = np.random.default_rng(0).standard_normal((50, 8), np.float32)
    whole = quantized(rows)
    monkeypatch.setattr("utils.shards.int8._BLOCK", 24)
    assert all(np.array_equal(a, b) for a, b in zip(whole, quantized(rows), strict=True))


def random_item(index, tokens=6, width=5):
    made = item(index, tokens, width)
    rows = np.random.default_rng(index).standard_normal((tokens, width), np.float32)
    sizes = 10.0 ** np.arange(-2, tokens - 2)[:, None]
    made["activations"] = {NAME: (rows * sizes).astype(np.float32)}
    return made


def answer(index):
    return {"task_id": f"task{index // 2}", "sample_idx": index % 2}


def write(folder, indices, finish=True, writer=None, settings=SETTINGS, facts=None, **options):
    options = {"activation_dtype": "int8", "save_every_n_samples": 2, **options}
    run = RunFolder(folder, settings, facts or {}, writer=writer or Writer(), **options)
    with run:
        run.clear()
        run.begin()
        for index in indices:
            if sample_key(answer(index)) not in run.done:
                run.add(random_item(index), answer(index))
        if finish:
            run.finish()


def check_errors(manifest, folder, indices):
    """What the manifest says is what the stored rows are off from those that were given."""
    entry = manifest["activations"][NAME]
    items = {sample_key(item): item for item in iter_items(folder)}
    assert set(items) == {sample_key(answer(i)) for i in indices}
    errors = []
    for index in indices:
        exact = random_item(index)["activations"][NAME].astype(np.float64)
        stored = items[sample_key(answer(index))]["activations"][NAME]
        errors.append(np.linalg.norm(stored - exact, axis=1) / np.linalg.norm(exact, axis=1))
    errors = np.concatenate(errors)
    assert entry["relative_error"] == {
        "mean": pytest.approx(errors.mean(), rel=1e-4),
        "max": pytest.approx(errors.max(), rel=1e-4),
    }
    assert {key: entry[key] for key in ("layer", "dtype")} == {"layer": 0, "dtype": "int8"}


def test_items_say_their_scales_and_readers_give_values(tmp_path):
    write(tmp_path, range(2))
    (stored, _) = load_shard(tmp_path / "activations_batch_000001.pkl")
    keys = list(stored)
    assert keys[keys.index("activations") + 1] == "scales"
    assert stored["activations"][NAME].dtype == np.int8
    assert stored["scales"][NAME].dtype == np.float32 and stored["scales"][NAME].shape == (6,)
    assert stored["output_logits"].dtype == np.float16
    values = stored["activations"][NAME] * stored["scales"][NAME][:, None]
    read = next(iter_items(tmp_path))
    assert "scales" not in read and read["activations"][NAME].dtype == np.float32
    assert np.array_equal(read["activations"][NAME], values)


def test_errors_are_right_across_shards_kills_and_resumption(tmp_path):
    write(tmp_path, range(5), finish=False)  # a kill loses the fifth
    check_errors(read_manifest(tmp_path), tmp_path, range(4))
    (tmp_path / "activations_batch_000001.pkl").unlink()
    write(tmp_path, range(7), mode="resume")
    check_errors(json.loads((tmp_path / "metadata.json").read_text()), tmp_path, range(7))


def test_errors_are_right_of_several_processes_and_after_a_merge(tmp_path):
    for index in (0, 1):
        write(tmp_path / "run", range(index, 7, 2), writer=Writer(index, 2), mode="resume")
    check_errors(read_manifest(tmp_path / "run"), tmp_path / "run", range(7))
    both = [
        json.loads((tmp_path / "run" / f"metadata_host00{index}.json").read_text())
        for index in (0, 1)
    ]
    joint = conclude._joint(both[0], [(manifest, []) for manifest in both])
    check_errors(joint, tmp_path / "run", range(7))
    parts, manifests = [tmp_path / "part0", tmp_path / "part1"], []
    for part, folder in enumerate(parts):
        facts = {
            "arguments": {"num_shards": 2, "shard_id": part},
            "dataset": {"hash": "h", "tasks": 1},
            "prompt": {},
        }
        write(folder, range(part, 7, 2), writer=Writer(part=part, parts=2), facts=facts)
        manifests.append(read_manifest(folder))
    merge.check(parts, manifests)  # which differ in what was measured alone
    merged = merge.join(parts, manifests, tmp_path / "merged", NoSignals())
    check_errors(merged, tmp_path / "merged", range(7))
    assert merged == json.loads((tmp_path / "merged" / "metadata.json").read_text())
    check_errors(union_of({"metadata.json": merged}), tmp_path / "merged", range(7))


def test_of_no_rows_no_error_is_told():
    """Where none is finite, or all shards are lost that an earlier manifest summed up."""
    shard = Shard("activations_batch_000001.pkl", 1, 1, 1, "", (), 0, 3, {NAME: RelativeError()})
    earlier = {NAME: {"layer": 0, "relative_error": {"mean": 1.0, "max": 1.0}}}
    for shards in ([], [shard]):
        assert totals(shards, earlier)["activations"] == {NAME: {"layer": 0}}


def test_rows_that_are_not_finite_lose_nothing_and_are_counted(tmp_path):
    run = RunFolder(tmp_path, SETTINGS, {}, activation_dtype="int8")
    run.clear()
    run.begin()
    broken = random_item(0)
    broken["activations"][NAME][2, 1:3] = np.nan, np.inf
    given_ = broken["activations"][NAME].copy()
    run.add(broken, answer(0))
    run.add(random_item(1), answer(1))
    manifest = run.finish()
    assert (manifest["non_finite"], manifest["float16_overflows"]) == (1, 1)
    read, whole = (item["activations"][NAME] for item in iter_items(tmp_path))
    assert np.array_equal(read, given_, equal_nan=True) and np.isfinite(whole).all()
    assert manifest["files"][0]["relative_error"][NAME]["rows"] == 11
    stored = load_shard(tmp_path / manifest["files"][0]["filename"])
    assert [list(item["scales"]) for item in stored] == [[], [NAME]]


def test_int8_and_scales_belong_together():
    good = random_item(0)
    good["activations"] = {NAME: np.zeros((6, 5), np.int8)}
    good["scales"] = {NAME: np.zeros(6, np.float32)}
    file = io.BytesIO()
    dump([stored_item(good, "int8")], Sink(file))
    file.seek(0)
    assert load(file)[0]["scales"][NAME].tolist() == [0] * 6
    with pytest.raises(ValueError, match=r"scales of resid_post\.0 do not fit"):
        stored_item({**good, "scales": {NAME: np.zeros(5, np.float32)}}, "int8")
    stored = stored_item(good, "int8")
    for wrong in ({**stored, "scales": {}}, {k: v for k, v in stored.items() if k != "scales"}):
        file = io.BytesIO()
        dump([wrong], Sink(file))
        file.seek(0)
        with pytest.raises(pickle.UnpicklingError, match=r"resid_post\.0 is int8 without scales"):
            load(file)


@pytest.fixture(scope="module")
def pair(tmp_path_factory, four_layers, tasks_file) -> tuple[Path, Path]:
    """A run in int8 of three hook points, one of which is all zero, and one in float32 that holds
    the same values; every other sample is solved."""
    folder = tmp_path_factory.mktemp("pair")
    flags = {"hook_points": ["resid_pre", "resid_post"], "activation_dtype": "float32"}
    made = extracted(folder / "made", four_layers, tasks_file, **flags)
    manifest = read_manifest(made)
    settings = {key: manifest[key] for key in ("model", "prompt", "capture", "activations")}
    facts = {"special_ids": manifest["special_ids"]}
    items = list(iter_items(made))
    for number, one in enumerate(items):
        one["correct"] = number % 2 == 0
        one["activations"]["resid_pre.0"][:] = 0
    for name in ("int8", "float32"):
        run = RunFolder(
            folder / name, settings, facts, activation_dtype=name, save_every_n_samples=3
        )
        with run, warnings.catch_warnings():
            warnings.simplefilter("error")
            run.clear()
            run.begin()
            for one in items:
                run.add(one, {key: one[key] for key in ("task_id", "sample_idx")})
            run.finish()
        items = list(iter_items(folder / "int8"))
    return folder / "int8", folder / "float32"


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(one.columns(), other.columns(), strict=True))


@pytest.mark.parametrize(
    "selection",
    [
        Selection(2),
        Selection(0, "resid_pre"),
        Selection(0, role="output", colors=[1, 2, 3]),
        Selection(3, drop_special=True, drop_sinks=1.2, correct=True),
    ],
    ids=str,
)
def test_a_dataset_gives_the_rows_that_float32_would(pair, selection):
    int8, float32 = (ActivationDataset(folder, selection) for folder in pair)
    assert int8.rows().activations.dtype == np.float32 and same(int8.rows(), float32.rows())
    assert same(int8.rows(50, seed=1), float32.rows(50, seed=1))
    for options in ({}, {"shuffle_buffer": 60, "seed": 3, "dtype": np.float16}):
        batches = [list(dataset.batches(20, **options)) for dataset in (int8, float32)]
        assert all(same(one, other) for one, other in zip(*batches, strict=True))
    assert int8.left_out == float32.left_out


def test_statistics_contrast_and_items_are_those_of_float32(pair):
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        one, other = map(activation_stats, pair)
    for name in one:
        assert np.array_equal(one[name].mean, other[name].mean)
        assert np.array_equal(one[name].std, other[name].std)
        assert one[name].norm_median == other[name].norm_median
    one, other = map(contrast, pair)
    assert one.pairs == other.pairs and one.consistency == other.consistency
    for a, b in zip(*map(iter_items, pair), strict=True):
        assert a.keys() == b.keys()
        for name, states in a["activations"].items():
            assert states.dtype == np.float32
            assert np.array_equal(states, b["activations"][name])
    assert read_manifest(pair[0])["activations"]["resid_pre.0"]["relative_error"]["max"] == 0
    assert "relative_error" not in read_manifest(pair[1])["activations"]["resid_pre.0"]


def test_an_export_for_saelens_is_that_of_float32(pair, tmp_path):
    datasets = pytest.importorskip("datasets")
    exports = []
    for folder in pair:
        export_for_saelens(ActivationDataset(folder, Selection(2)), tmp_path / folder.name, 16)
        made = datasets.load_from_disk(tmp_path / folder.name).with_format("numpy")
        exports.append(made["blocks.2.hook_resid_post"][:])
    assert np.array_equal(*exports)
