"""Rows of shards as training data: what is selected, in which order, and what it says of itself."""

import json
import logging
from collections import Counter
from functools import partial
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import extracted, made_run, sorted_rows

from utils.dataset import ActivationDataset, Selection, select, stats
from utils.dataset.shuffle import NO_CELL, ActivationRows, mixed
from utils.dataset.stats import STATS_FILE, _Running, activation_stats
from utils.errors import UserError
from utils.shards import iter_items
from utils.shards.items import to_float32
from utils.shards.manifest import read_manifest
from utils.shards.reader import read_entry


def stored(folder, name="resid_post.2"):
    """Every row of a run, read without the code under test."""
    return np.concatenate([item["activations"][name] for item in iter_items(folder)])


def test_all_rows_come_once_in_order_and_shuffled(run_folder):
    want = stored(run_folder)
    dataset = ActivationDataset(run_folder, Selection(layer=2))
    assert (dataset.name, dataset.width, len(dataset.samples)) == ("resid_post.2", 32, 8)
    plain = list(dataset.batches(64))
    assert [len(batch) for batch in plain[:-1]] == [64] * (len(plain) - 1)
    assert plain[0].activations.dtype == np.float32
    assert np.array_equal(np.concatenate([b.activations for b in plain]), want.astype(np.float32))

    for buffer in (64, 100, 10_000):
        mixed = np.concatenate(
            [b.activations for b in dataset.batches(64, shuffle_buffer=buffer, seed=1)]
        )
        assert not np.array_equal(mixed, want)
        assert np.array_equal(sorted_rows(mixed), sorted_rows(want))


def test_the_seed_decides_the_order_and_each_epoch_has_its_own(run_folder):
    dataset = ActivationDataset(run_folder, Selection(layer=0))

    def order(seed, epochs=1):
        batches = dataset.batches(32, shuffle_buffer=200, seed=seed, epochs=epochs)
        return np.concatenate([np.stack([b.samples, b.tokens], 1) for b in batches])

    assert np.array_equal(order(3), order(3))
    assert not np.array_equal(order(3), order(4))
    twice = order(3, epochs=2)
    first, second = np.split(twice, 2)
    assert np.array_equal(first, order(3)) and not np.array_equal(first, second)
    assert np.array_equal(sorted_rows(first), sorted_rows(second))
    batches = list(dataset.batches(32, shuffle_buffer=32, epochs=6))
    assert len({batch.samples[0] // 2 for batch in batches[:: len(batches) // 6]}) > 1  # shards


def test_rows_say_where_they_come_from(run_folder):
    dataset = ActivationDataset(run_folder, Selection(layer=-1))
    assert dataset.name == "resid_post.3"
    items = {(i["task_id"], i["sample_idx"]): i for i in iter_items(run_folder)}
    for batch in dataset.batches(50, shuffle_buffer=300):
        for i in range(len(batch)):
            item = items[dataset.samples[batch.samples[i]]]
            token = batch.tokens[i]
            assert batch.token_ids[i] == item["input_ids"][token]
            assert np.array_equal(batch.activations[i], item["activations"]["resid_post.3"][token])
            holding = [c[:5] for c in item["cells"] if c[5] <= token < c[6]]
            expected = holding[0] if holding else [NO_CELL] * 5
            assert np.array_equal(batch.cells[i], expected)


SELECTIONS = {
    "prompt": (Selection(0, part="prompt"), lambda item, t, c: t < item["prompt_length"]),
    "answer": (Selection(0, part="answer"), lambda item, t, c: t >= item["prompt_length"]),
    "outputs": (Selection(0, role="output"), lambda item, t, c: c is not None and c[1] == 1),
    "inputs": (Selection(0, role="input"), lambda item, t, c: c is not None and c[1] == 0),
    "test pair": (Selection(0, pair="test"), lambda item, t, c: c is not None and c[0] == -1),
    "train pairs": (Selection(0, pair="train"), lambda item, t, c: c is not None and c[0] >= 0),
    "pair 1": (Selection(0, pair=1), lambda item, t, c: c is not None and c[0] == 1),
    "colors": (Selection(0, colors=(3, 4)), lambda item, t, c: c is not None and c[4] in (3, 4)),
    "failed": (Selection(0, correct=False), lambda item, t, c: item["correct"] is False),
    "several": (
        Selection(0, part="prompt", role="output", pair="train", colors=[0]),
        lambda item, t, c: c is not None and c[1] == 1 and c[0] >= 0 and c[4] == 0,
    ),
}


@pytest.mark.parametrize("name", SELECTIONS)
def test_a_selection_takes_these_rows_and_no_others(name, run_folder):
    selection, belongs = SELECTIONS[name]
    want = []
    for item in iter_items(run_folder):
        for token in range(len(item["input_ids"])):
            cell = next((c for c in item["cells"] if c[5] <= token < c[6]), None)
            if belongs(item, token, cell):
                want.append(item["activations"]["resid_post.0"][token])
    dataset = ActivationDataset(run_folder, selection)
    assert len(want) and np.array_equal(dataset.rows().activations, np.array(want))
    assert dataset.left_out.total() + len(want) == len(stored(run_folder))


@pytest.mark.parametrize("correct", [True, False])
def test_solved_samples_and_failed_ones(tmp_path, correct):
    def states(random, item, task):
        return {"resid_post.0": np.full((len(item["input_ids"]), 2), task)}

    dataset = ActivationDataset(made_run(tmp_path, states, tasks=5), Selection(0, correct=correct))
    assert set(dataset.rows().activations[:, 0]) == ({1, 3} if correct else {0, 2, 4})
    (cause,) = dataset.left_out
    assert cause == "of samples not " + ("solved" if correct else "failed")


def test_a_token_of_several_cells_has_the_first_that_is_selected():
    cells = [[0, 0, 0, 0, 3, 1, 2], [0, 0, 0, 1, 5, 1, 2], [0, 1, 0, 0, 7, 2, 4]]
    item = {"input_ids": np.zeros(5, np.int32), "cells": np.array(cells, np.int32)}
    for colors, held in ((None, [NO_CELL, 3, 7, 7, NO_CELL]), (5, [NO_CELL, 5, *[NO_CELL] * 3])):
        found = select.cells_of_tokens(item, Selection(0, colors=colors))
        assert found[:, 4].tolist() == held


def test_what_is_dropped_is_counted_and_said(run_folder, caplog):
    caplog.set_level(logging.INFO)
    everything = ActivationDataset(run_folder, Selection(0)).rows()
    assert not caplog.records
    special = json.loads((run_folder / "metadata.json").read_text())["special_ids"]
    is_special = np.isin(everything.token_ids, special)
    assert is_special.any()
    dataset = ActivationDataset(run_folder, Selection(0, drop_special=True))
    assert len(dataset.rows()) == (~is_special).sum()
    assert f"left out {is_special.sum()} special tokens" in caplog.text

    norms = np.linalg.norm(everything.activations.astype(np.float32), axis=1)
    limit = 1.2 * activation_stats(run_folder)["resid_post.0"].norm_median
    assert 0 < (norms > limit).sum() < len(norms)
    dataset = ActivationDataset(run_folder, Selection(0, drop_sinks=1.2))
    assert len(dataset.rows()) == (norms <= limit).sum()
    assert f"{(norms > limit).sum()} attention sinks" in caplog.text


def test_a_run_that_kept_some_positions_is_read_too(tmp_path, four_layers, tasks_file):
    folder = extracted(tmp_path, four_layers, tasks_file, token_positions="answer")
    rows = ActivationDataset(folder, Selection(0)).rows()
    items = list(iter_items(folder))
    assert np.array_equal(rows.tokens, np.concatenate([item["positions"] for item in items]))
    assert len(rows) == sum(len(item["input_ids"]) - item["prompt_length"] for item in items)


def test_rows_that_were_drawn_are_selected_by_their_own_tokens(tmp_path, four_layers, tasks_file):
    flags = {"teacher_forcing": True, "max_rows_per_sample": 40, "prompt_format": "compact"}
    folder = extracted(tmp_path, four_layers, tasks_file, **flags)
    special, total = read_manifest(folder)["special_ids"], len(stored(folder))
    selections = {name: SELECTIONS[name] for name in ("prompt", "answer", "outputs", "pair 1")}
    selections["special tokens"] = (
        Selection(0, drop_special=True),
        lambda item, t, c: item["input_ids"][t] not in special,
    )
    for selection, belongs in selections.values():
        want = []
        for item in iter_items(folder):
            for row, token in enumerate(item["positions"]):
                cell = next((c for c in item["cells"] if c[5] <= token < c[6]), None)
                if belongs(item, token, cell):
                    want.append((item["activations"]["resid_post.0"][row], token, item, cell))
        rows = ActivationDataset(folder, selection).rows()
        assert 0 < len(want) < total and rows.tokens.tolist() == [t for _, t, *_ in want]
        assert np.array_equal(rows.activations, np.array([row for row, *_ in want]))
        assert rows.token_ids.tolist() == [item["input_ids"][t] for _, t, item, _ in want]
        colors = [NO_CELL if cell is None else cell[4] for *_, cell in want]
        assert rows.cells[:, 4].tolist() == colors


def test_statistics_are_those_of_numpy_and_are_kept(run_folder):
    found = activation_stats(run_folder)["resid_post.2"]
    rows = stored(run_folder).astype(np.float64)
    norms = np.linalg.norm(rows, axis=1)
    assert found.count == len(rows)
    np.testing.assert_allclose(found.mean, rows.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(found.std, rows.std(axis=0), rtol=1e-4)
    np.testing.assert_allclose(
        [found.norm_mean, found.norm_std, found.norm_max],
        [norms.mean(), norms.std(), norms.max()],
        rtol=1e-4,
    )
    assert abs(found.norm_median / np.median(norms) - 1) < 0.01

    path = run_folder / STATS_FILE
    kept = path.read_bytes()
    marked = json.loads(kept)
    marked["resid_post.2"]["count"] = 1
    path.write_text(json.dumps(marked))
    assert activation_stats(run_folder)["resid_post.2"].count == 1  # read, not computed
    path.write_text(json.dumps({**marked, "files_hash": "of other shards"}))
    assert activation_stats(run_folder)["resid_post.2"].count == len(rows)
    assert path.read_bytes() == kept
    for damaged in ("{", json.dumps({"files_hash": json.loads(kept)["files_hash"]})):
        path.write_text(damaged)
        assert activation_stats(run_folder)["resid_post.2"].count == len(rows)
    # Shards of a run that was overwritten have the names of the former ones.
    manifest = read_manifest(run_folder)
    other = [{**entry, "crc32c": "AAAAAA=="} for entry in manifest["files"]]
    assert stats._digest({"files": other}) != stats._digest(manifest)


def test_norms_that_float32_cannot_square_are_finite():
    running = _Running()
    running.add(np.array([[1e20] * 3, [2e20] * 3], np.float32))
    found = running.result()
    norms = np.array([1e20, 2e20]) * np.sqrt(3)
    np.testing.assert_allclose(
        [found["norm_mean"], found["norm_std"], found["norm_max"]],
        [norms.mean(), norms.std(), norms.max()],
        rtol=1e-6,
    )


def test_numpys_whole_numbers_are_whole_numbers():
    three = np.int64(3)
    assert Selection(three, pair=three, colors=three) == Selection(3, pair=3, colors=3)
    assert repr(Selection(three)) == repr(Selection(3))  # as an autoencoder's folder keeps it


def test_statistics_name_a_model_that_made_no_finite_row(monkeypatch):
    item = {"activations": {"resid_post.0": np.full((3, 4), np.nan, np.float32)}}
    monkeypatch.setattr(stats, "iter_items", lambda folder: iter([item]))
    with pytest.raises(UserError, match=r"all 3 rows of resid_post\.0 in run hold a NaN"):
        stats._computed("run", {"activations": {"resid_post.0": {}}, "total_samples": 1})


def test_a_bucket_is_read_like_a_folder(run_folder, gcs, tmp_path):
    (run_folder / STATS_FILE).unlink(missing_ok=True)
    for path in run_folder.iterdir():
        gcs.store(f"run/{path.name}", path.read_bytes())
    here = ActivationDataset(run_folder, Selection(0, drop_sinks=1.2))
    there = ActivationDataset("gs://bucket/run", Selection(0, drop_sinks=1.2))
    assert np.array_equal(here.rows().activations, there.rows().activations)
    assert gcs.objects()[f"run/{STATS_FILE}"] == (run_folder / STATS_FILE).read_bytes()


def test_statistics_that_cannot_be_kept_are_given(run_folder, gcs, caplog):
    for path in run_folder.iterdir():
        if path.name != STATS_FILE:
            gcs.store(f"run/{path.name}", path.read_bytes())
    gcs.fault(403, lambda request: request.kind == "multipart", times=99)
    found = activation_stats("gs://bucket/run")["resid_post.2"]
    assert found.count == len(stored(run_folder))
    assert "are not kept in gs://bucket/run: no permission to write" in caplog.text


def bad(**given):
    return Selection(**{"layer": 0, **given})


def test_mistakes_are_one_line(run_folder, tmp_path, four_layers, tasks_file):
    def refused(*words_, folder=run_folder, **selection):
        with pytest.raises(UserError) as error:
            ActivationDataset(folder, bad(**selection)).rows()
        assert "\n" not in str(error.value)
        for word in words_:
            assert word in str(error.value)

    refused("resid_post.1", "captured were", "resid_post.0", layer=1)
    refused("resid_post.-9", layer=-9)
    refused("attn_out.0", hook_point="attn_out")
    refused("hook_point 'nowhere'", hook_point="nowhere")
    refused("part 'middle'", "prompt, answer", part="middle")
    refused("role 'outputs' is none of input, output", role="outputs")
    refused("pair 'tests' is none of train, test", pair="tests")
    refused("pair True is none of train, test", pair=True)
    refused("0..9", colors=[10])
    refused("0..9", colors=10)
    refused("layer '1' is not a whole number", layer="1")
    refused("correct 0 is none of True, False, None", correct=0)
    refused("drop_sinks", drop_sinks=0.5)
    refused("nothing is selected", "not solved", correct=True)
    refused("nothing is selected", pair=99)
    refused("no metadata.json", folder=tmp_path)
    dataset = ActivationDataset(run_folder, Selection(0))
    with pytest.raises(UserError, match="fewer rows than a batch"):
        next(dataset.batches(10**6, drop_last=True, epochs=None))
    with pytest.raises(UserError, match="shuffle_buffer 5 is below"):
        next(dataset.batches(10, shuffle_buffer=5))
    with pytest.raises(UserError, match="batch_size 0"):
        next(dataset.batches(0))


def test_what_is_not_known_to_be_right_or_wrong_is_named(tmp_path, four_layers, tasks_file):
    folder = extracted(tmp_path, four_layers, tasks_file, teacher_forcing=True)
    with pytest.raises(UserError, match="without a generated answer"):
        ActivationDataset(folder, Selection(0, correct=True)).rows()


def test_views_are_selected_by_the_cells_of_the_task(tmp_path, four_layers, tasks_file):
    flags = {"augmentations": 3, "teacher_forcing": True}
    folder = extracted(tmp_path, four_layers, tasks_file, **flags)
    original = ActivationDataset(folder, Selection(0, colors=3, pair=0, original=True)).rows()
    want, seen = [], []
    for item in iter_items(folder):
        held = item["cells_original"]
        chosen = held[(held[:, 0] == 0) & (held[:, 4] == 3)]
        want += [item["activations"]["resid_post.0"][start] for start in sorted(chosen[:, 5])]
        seen += item["cells"][(held[:, 0] == 0) & (held[:, 4] == 3), 4].tolist()
    assert (
        np.array_equal(original.activations, np.array(want)) and (original.cells[:, 4] == 3).all()
    )
    assert set(seen) > {3}  # shown in other colors
    assert {len(key) for key in ActivationDataset(folder, Selection(0)).samples} == {3}


def test_workers_share_the_shards_and_one_without_any_ends(run_folder):
    dataset = ActivationDataset(run_folder, Selection(0))
    for options in ({}, {"shuffle_buffer": 100}, {"shuffle_buffer": 100, "drop_last": True}):
        options["epochs"] = 2
        parts = [[*dataset.batches(16, worker=i, workers=6, **options)] for i in range(6)]
        assert all(parts[:4]) and not parts[4] and not parts[5]  # of four shards
        rows = [np.stack([b.samples, b.tokens], 1).tolist() for part in parts for b in part]
        taken = Counter(map(tuple, chain.from_iterable(rows)))
        assert max(taken.values()) == 2
        if "drop_last" not in options:
            assert taken.total() == 2 * len(stored(run_folder))
    assert list(dataset.batches(16, worker=5, workers=6, epochs=None)) == []
    nothing = ActivationDataset(run_folder, Selection(0, pair=99))
    assert list(nothing.batches(16, worker=0, workers=2, epochs=None)) == []


def test_some_rows_are_drawn_from_all_alike(run_folder):
    dataset = ActivationDataset(run_folder, Selection(0))
    every = dataset.rows()
    times = np.zeros(len(every))
    place = {pair: i for i, pair in enumerate(zip(every.samples, every.tokens, strict=True))}
    for seed in range(60):
        some = dataset.rows(200, seed)
        where = [place[pair] for pair in zip(some.samples, some.tokens, strict=True)]
        assert len(set(where)) == 200
        assert np.array_equal(some.activations, every.activations[where])
        times[where] += 1
    thirds = [part.sum() for part in np.array_split(times, 3)]
    assert max(thirds) < 1.1 * min(thirds)
    assert len(dataset.rows(10**6)) == len(every)
    assert np.array_equal(dataset.rows(50, 1).tokens, dataset.rows(50, 1).tokens)


def test_room_is_made_for_no_more_rows_than_there_are(run_folder):
    dataset = ActivationDataset(run_folder, Selection(0))
    every = dataset.rows()
    assert np.array_equal(dataset.rows(2**63 - 1).activations, every.activations)
    orders = [
        np.concatenate([rows.tokens for rows in dataset.batches(64, shuffle_buffer=size)])
        for size in (len(every) + 1, 10**6, 2**63 - 1)
    ]
    assert np.array_equal(orders[0], orders[1]) and np.array_equal(orders[0], orders[2])


def test_two_passes_at_once_do_not_mix_their_counts(run_folder):
    dataset = ActivationDataset(run_folder, Selection(0, part="answer"))
    one, two = dataset.parts(), dataset.parts()
    next(one)
    list(two)
    list(one)
    assert dataset.left_out.total() + len(dataset.rows()) == len(stored(run_folder))


def rows_of(states, start):
    numbers = np.arange(start, start + len(states), dtype=np.int32)
    return ActivationRows(states, numbers, numbers, numbers, np.repeat(numbers[:, None], 5, axis=1))


@given(
    st.lists(st.tuples(st.integers(0, 40), st.booleans()), min_size=1, max_size=8),
    st.integers(1, 60),
    st.integers(1, 20),
    st.booleans(),
)
@settings(max_examples=200)
def test_the_buffer_gives_every_row_once_with_what_belongs_to_it(sizes, size, batch, drop_last):
    size, start, blocks = max(size, batch), 0, []
    for count, is_wide in sizes:
        values = np.arange(start, start + count, dtype=np.float32)[:, None] + 0.25 * is_wide
        blocks.append(rows_of(values.astype(np.float32 if is_wide else np.float16), start))
        start += count
    random = np.random.default_rng(0)
    batches = list(mixed(iter(blocks), size, batch, drop_last, random))
    assert all(len(b) == batch for b in batches[: None if drop_last else -1])
    if not batches:
        assert (start < batch and drop_last) or not start
        return
    found = ActivationRows.joined(batches)
    order = np.argsort(found.samples)
    if drop_last:
        assert start - batch < len(found) <= start and len(set(found.samples)) == len(found)
    else:
        assert np.array_equal(found.samples[order], np.arange(start))
        whole = ActivationRows.joined(blocks)
        assert np.array_equal(found.activations[order], whole.activations)
    for column in (found.tokens, found.token_ids, found.cells[:, 3], found.activations[:, 0] // 1):
        assert np.array_equal(column, found.samples)


def test_a_batch_is_drawn_from_the_whole_buffer():
    rows = rows_of(np.zeros((1000, 1), np.float32), 0)
    for batch in mixed(iter([rows]), 400, 20, False, np.random.default_rng(0)):
        assert np.ptp(batch.samples) > 200


def test_half_precision_is_widened_exactly(monkeypatch):
    monkeypatch.setattr("utils.shards.items._BLOCK", 1000)
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    finite = halves[np.isfinite(halves)]
    assert np.array_equal(
        to_float32(finite).view(np.int32), finite.astype(np.float32).view(np.int32)
    )
    assert np.array_equal(to_float32(halves), halves.astype(np.float32), equal_nan=True)
    columns = np.asfortranarray(finite[:60_000].reshape(300, 200))
    assert np.array_equal(to_float32(columns), columns.astype(np.float32))
    widened = to_float32(columns)
    assert to_float32(widened) is widened


def test_what_float16_cannot_hold_is_not_made_an_infinity(run_folder, monkeypatch):
    dataset = ActivationDataset(run_folder, Selection(0))
    large = rows_of(np.full((4, 2), 1e6, np.float32), 0)
    monkeypatch.setattr(dataset, "parts", lambda *_: iter([large]))
    with pytest.raises(UserError, match="too large for float16"):
        list(dataset.batches(4, dtype=np.float16))


def test_rows_that_are_not_finite_are_counted_in_the_statistics():
    running = _Running()
    rows = np.ones((10, 3), np.float16)
    rows[2, 1], rows[5, 0] = np.nan, np.inf
    running.add(rows)
    found = running.result()
    assert (found["count"], found["non_finite"]) == (8, 2) and found["mean"] == [1, 1, 1]


@pytest.mark.parametrize("spoilt", [[0, 3], slice(None)], ids=["some", "all"])
def test_rows_that_are_not_finite_are_left_out_and_said(run_folder, monkeypatch, caplog, spoilt):
    def spoil(folder, entry):
        items = read_entry(folder, entry)
        for item in items:
            item["activations"]["resid_post.0"][spoilt] = np.nan
        return items

    counted = {**read_manifest(run_folder), "non_finite": 16}
    monkeypatch.setattr(select, "read_entry", spoil)
    monkeypatch.setattr(select, "read_manifest", lambda folder: counted)
    caplog.set_level(logging.INFO)
    dataset, count = ActivationDataset(run_folder, Selection(0)), len(stored(run_folder))
    if spoilt == slice(None):
        with pytest.raises(UserError, match=f"of {count} rows {count} with a NaN or an inf"):
            dataset.rows()
        return
    rows = dataset.rows()
    assert len(rows) == count - 16 and np.isfinite(rows.activations).all()
    assert not np.isin(rows.tokens, spoilt).any()
    assert dataset.left_out == {select.NON_FINITE: 16}
    assert "left out 16 with a NaN or an infinity, which the model made" in caplog.text


def test_of_several_runs_each_is_asked(tmp_path):
    """The second has rows that are not finite; norms are those of both."""

    def states(random, item, task, size):
        rows = np.full((len(item["input_ids"]), 2), size)
        rows[0] = np.nan if size > 1 else size
        return {"resid_post.0": rows}

    sizes = {"small": 1.0, "large": 10.0}
    folders = [
        made_run(tmp_path / name, partial(states, size=size), tasks=3)
        for name, size in sizes.items()
    ]
    dataset = ActivationDataset(folders, Selection(0, drop_sinks=2))  # of 5.5, that is 11
    rows = dataset.rows()
    assert set(rows.activations[:, 0]) == {1, 10}
    assert +dataset.left_out == {select.NON_FINITE: 3}


def test_runs_that_do_not_belong_together_are_refused(
    run_folder, tmp_path, four_layers, tasks_file
):
    spaced = extracted(tmp_path / "a", four_layers, tasks_file, grid_encoding="spaced")
    with pytest.raises(UserError, match=r"is of another run than .*prompt.encoding"):
        ActivationDataset([run_folder, spaced], Selection(0))
    with pytest.raises(UserError, match=r"both hold the shard .* count double"):
        ActivationDataset([run_folder, f"{run_folder}/"], Selection(0))
    fewer = extracted(tmp_path / "b", four_layers, tasks_file, layers_to_extract=[0])
    with pytest.raises(UserError, match=r"has no resid_post.2, which"):
        ActivationDataset([run_folder, fewer], Selection(2))
    some = extracted(tmp_path / "d", four_layers, tasks_file, token_positions="last")
    with pytest.raises(UserError, match="the states of last tokens"):
        ActivationDataset([run_folder, some], Selection(0))
    more = extracted(tmp_path / "c", four_layers, tasks_file, max_tasks=2, dtype="float32", seed=1)
    both = ActivationDataset([run_folder, more], Selection(0)).rows()
    assert np.array_equal(
        both.activations, np.concatenate([stored(f, "resid_post.0") for f in (run_folder, more)])
    )
    # A shard of one run in the folder of another.
    shard = "activations_batch_000001.pkl"
    (more / shard).write_bytes((spaced / shard).read_bytes())
    with pytest.raises(UserError, match=f"{shard} is refused"):
        ActivationDataset(more, Selection(0)).rows()
