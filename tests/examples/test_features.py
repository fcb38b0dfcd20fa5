"""Programs that name latents: what each says of a grid, and that they find what was planted."""

import json

import numpy as np
import pytest
from runs import made_run
from scipy.sparse import csr_array

from examples import features as script
from examples.features import LEAST, Cells, chosen, encoded, name_latents, read_cells, shuffled
from examples.predicates import PREDICATES, Scene, labels, masks_of
from utils.errors import UserError

GRID = np.array(
    [
        [0, 2, 2, 2, 5],
        [0, 2, 0, 2, 0],
        [3, 2, 2, 2, 0],
        [0, 3, 0, 0, 0],
        [7, 7, 0, 0, 0],
    ]
)
GIVEN = GRID[:4].copy()
GIVEN[0, 1] = 9
# Of an output GRID to an input GIVEN: name -> its cells.
RED = [(0, 1), (0, 2), (0, 3), (1, 1), (1, 3), (2, 1), (2, 2), (2, 3)]
TRUE = {
    "red": RED,
    "of the grid's most common color": RED,
    "of the grid's rarest color": [(0, 4)],
    "in the train input": [],
    "in pair 2": [(r, c) for r in range(5) for c in range(5)],
    "in the third row": [(2, c) for c in range(5)],
    "in the last column": [(r, 4) for r in range(5)],
    "in a corner": [(0, 0), (0, 4), (4, 0), (4, 4)],
    "on the diagonal": [(i, i) for i in range(5)],
    "on the other diagonal": [(i, 4 - i) for i in range(5)],
    "an object of one cell": [(0, 4)],
    "in an object of 2 to 4 cells": [(2, 0), (3, 1), (4, 0), (4, 1)],
    "in an object of 5 cells or more": RED,
    "in the largest object": RED,
    "in an object that does not fill its box": [*RED, (2, 0), (3, 1)],
    "in an object in a square box": [*RED, (2, 0), (3, 1)],
    "in a horizontal line": [(4, 0), (4, 1)],
    "in a vertical line": [],
    "inside an object": [],
    "in a hole": [(1, 2)],
    "like the cell to the right": [
        *((0, 1), (0, 2), (2, 1), (2, 2), (3, 2), (3, 3)),
        *((4, 0), (4, 2), (4, 3)),
    ],
    "like the cell above": [
        *((1, 0), (1, 1), (1, 3), (2, 1), (2, 3), (2, 4)),
        *((3, 4), (4, 2), (4, 3), (4, 4)),
    ],
    "unlike the input's cell at its place": [(0, 1)],
    "first of its row that is not black": [(0, 1), (1, 1), (2, 0), (3, 1), (4, 0)],
    "last of its column that is not black": [(4, 0), (4, 1), (2, 2), (2, 3), (0, 4)],
}


def test_a_predicate_says_what_its_name_does():
    scene, known = Scene(GRID, role=1, pair=1, given=GIVEN), {}
    for of_kind in PREDICATES.values():
        known |= of_kind

    def said(name):
        cells = np.argwhere(np.broadcast_to(known[name](scene), GRID.shape))
        return [(int(r), int(c)) for r, c in cells]

    for name, cells in TRUE.items():
        assert said(name) == sorted(cells), name
    same = np.argwhere(np.flipud(GRID) == GRID).tolist()
    assert said("like its mirror image top to bottom") == [(r, c) for r, c in same]
    assert len(said("like the input's cell at its place")) == 19
    assert 55 <= len(labels()) <= 75 and len({name for _, name in labels()}) == len(labels())


@pytest.mark.parametrize("shape", [(1, 1), (1, 30), (30, 1), (2, 3)])
def test_every_predicate_takes_every_grid(shape):
    for grid in (
        np.zeros(shape, int),
        np.full(shape, 4),
        np.arange(np.prod(shape)).reshape(shape) % 10,
    ):
        for role, given in ((0, None), (3, np.ones((2, 2), int))):
            scene = Scene(grid, role, -1, given)
            for of_kind in PREDICATES.values():
                for name, holds in of_kind.items():
                    assert np.broadcast_to(holds(scene), shape).dtype == bool, name
    solid = Scene(np.pad(np.full((3, 3), 6), 1), 0, 0)
    assert PREDICATES["object"]["inside an object"](solid).sum() == 1


def test_masks_are_those_of_the_cells_own_grid():
    """Cells in another order than that of their grid, of two grids."""
    cells = np.array(
        [
            [0, 0, 0, 1, 3, 0, 1],
            [0, 0, 0, 0, 2, 1, 2],
            [-1, 1, 1, 0, 2, 2, 3],
            [-1, 1, 0, 0, 4, 3, 4],
        ]
    )
    names = [name for _, name in labels()]
    masks = masks_of(cells)
    assert masks[:, names.index("red")].tolist() == [False, True, True, False]
    assert masks[:, names.index("in the last column")].tolist() == [True, False, True, True]
    assert masks[:, names.index("in the answer")].tolist() == [False, False, True, True]
    assert not masks[:, names.index("like the input's cell at its place")].any()


D = 48


def states(random, item, task):
    """Latents of their own: 0 is red, 1 is the last column of an output, 2 the first row but for
    one cell in five; all others fire on cells at random."""
    cells = item["cells"]
    rows = random.uniform(1, 2, (len(item["input_ids"]), D))
    rows *= random.random(rows.shape) < np.linspace(0.01, 0.5, D)
    last = np.array([cells[(cells[:, :2] == c[:2]).all(axis=1), 3].max() for c in cells])
    red, column = cells[:, 4] == 2, (cells[:, 3] == last) & (cells[:, 1] == 1)
    row = (cells[:, 2] == 0) & (random.random(len(cells)) < 0.8)
    rows[cells[:, 5], :3] = np.stack([red, column, row], axis=1)
    return {"resid_post.0": rows.astype(np.float32)}


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return made_run(tmp_path_factory.mktemp("planted") / "run", states)


@pytest.fixture(scope="module")
def cells(planted):
    return read_cells(planted, "resid_post.0")


def test_what_was_planted_is_named_and_noise_as_often_as_stated(cells):
    found = {f.latent: f for f in name_latents(encoded(lambda x: x, cells.rows.activations), cells)}
    assert found[0].predicate == "red" and found[0].precision == found[0].recall == 1
    assert "in the last column" in found[1].predicate and "output" in found[1].predicate
    assert found[1].precision == found[1].recall == 1
    assert found[2].predicate == "in the first row" and found[2].precision == 1
    assert 0.7 < found[2].recall < 0.9
    assert all(found[latent].named and found[latent].chance < 0.6 for latent in (0, 1, 2))
    of_noise = [f.named for f in found.values() if f.latent > 2]
    assert len(of_noise) > 40 and sum(of_noise) <= 8  # one in 20 is stated
    picked = chosen(list(found.values()), 3)
    assert {f.latent for f in picked} == {0, 1, 2}
    assert str(found[0]).startswith("latent 0: red (precision 100%, recall 100%, F1 1.00, on shuf")


def test_scores_are_those_of_a_plain_count(cells):
    active = np.random.default_rng(0).random((len(cells.rows), 4)) < 0.3
    names, _, masks = script.with_conjunctions(cells.masks)
    best, f1, common = script.best_fits(csr_array(active, dtype=np.int32), masks)
    masks, known = (
        masks.toarray().astype(bool),
        dict(zip([n for _, n in labels()], cells.masks.T, strict=True)),
    )
    for latent in range(4):
        meets = (active[:, [latent]] & masks).sum(axis=0)
        want = 2 * meets / (active[:, latent].sum() + masks.sum(axis=0))
        assert (
            f1[latent] == want.max() == want[best[latent]] and common[latent] == meets[best[latent]]
        )
    for name, mask in zip(names, masks.T, strict=True):
        one, _, other = name.partition(" and ")
        assert mask.sum() >= LEAST
        if name not in known:
            assert np.array_equal(mask, known[one] & known[other]), name


def test_shuffled_cells_are_of_other_tasks_and_stay_side_by_side():
    samples = np.repeat(np.arange(6), [9, 5, 7, 9, 8, 8])
    for seed in range(20):
        order = shuffled(samples, np.random.default_rng(seed))
        assert sorted(order) == list(range(46)) and (samples[order] != samples).all()
        assert (np.diff(order) == 1).sum() == 44
    with pytest.raises(UserError, match="of too few samples"):
        shuffled(samples[:36], np.random.default_rng(0))


def test_latents_of_shuffled_tasks_are_named_as_often_as_stated(cells):
    """What has the structure of real latents, but of other tasks."""
    random = np.random.default_rng(0)
    parts = [cells.rows.activations[shuffled(cells.rows.samples, random)] for _ in range(20)]
    moved = csr_array(np.concatenate([part[:, :3] for part in parts], axis=1))
    named = [feature.named for feature in name_latents(moved, cells, seed=1)]
    assert len(named) == 60 and sum(named) <= 9  # 3 are stated


def test_the_script_names_latents_of_an_autoencoder(planted, tmp_path, in_shell):
    save_identity(tmp_path / "sae", D)
    flags = [
        "--activations_dir",
        planted,
        "--sae",
        tmp_path / "sae",
        "--output",
        tmp_path / "f.json",
    ]
    code, out, _ = in_shell(script, flags)
    found = json.loads((tmp_path / "f.json").read_text())
    assert code == 0 and "latent 0: red (" in out
    assert found["activation"] == "resid_post.0"
    first = found["latents"][0]
    assert (first["latent"], first["predicate"], first["precision"]) == (0, "red", 1)
    assert first["chance"] < first["recall"] == 1 and first["named"]
    code, _, err = in_shell(script, flags)
    assert code == 2 and "f.json exists: add --overwrite to replace it" in err
    flags.append("--overwrite")
    code, _, err = in_shell(script, [*flags, "--hook_point", "resid_post.1"])
    assert code == 2 and "is of resid_post.0, not of resid_post.1" in err
    save_identity(tmp_path / "wide", D + 1)
    code, _, err = in_shell(script, [*flags, "--sae", tmp_path / "wide"])
    assert code == 2 and "49 wide, and resid_post.0 is 48" in err and err.count("\n") == 1


def save_identity(folder, width):
    autoencoder = pytest.importorskip("utils.model.autoencoder")
    identity = np.eye(width, dtype=np.float32)
    weights = {"w_enc": identity, "w_dec": identity}
    weights |= dict.fromkeys(("b_enc", "b_dec"), np.zeros(width, np.float32))
    autoencoder.Autoencoder("standard", None, "resid_post.0", weights).save(folder, {})


def test_rows_that_are_not_finite_are_left_out_and_counted(tmp_path, caplog):
    def broken(random, item, task):
        rows = states(random, item, task)["resid_post.0"]
        rows[item["cells"][3, 5], 7], rows[item["cells"][5, 5], 0] = np.nan, np.inf
        rows[np.flatnonzero(item["input_ids"] == 10)[0]] = np.nan  # holds no cell
        return {"resid_post.0": rows}

    whole = read_cells(made_run(tmp_path / "whole", states, tasks=3), "resid_post.0")
    run = made_run(tmp_path / "run", broken, tasks=3)
    with caplog.at_level("INFO"):
        cells = read_cells(run, "resid_post.0")
    assert len(cells.rows) == len(cells.masks) == len(whole.rows) - 6
    assert np.isfinite(cells.rows.activations).all()
    assert "left out 6 rows with a NaN or an infinity" in caplog.text


def test_what_cannot_be_named_is_said(planted, cells, tmp_path):
    with pytest.raises(UserError, match=r"has no resid_post.3; captured were resid_post.0"):
        read_cells(planted, "resid_post.3")
    one = made_run(tmp_path / "one", states, tasks=1)
    alone = read_cells(one, "resid_post.0")
    with pytest.raises(UserError, match="of too few samples"):
        name_latents(encoded(lambda x: x, alone.rows.activations), alone)
    few = Cells(cells.rows[:15], cells.keys, cells.masks[:15])
    with pytest.raises(UserError, match="no predicate is true of 20 cells and more"):
        name_latents(encoded(lambda x: x, few.rows.activations), few)
    assert len(read_cells(planted, "resid_post.0", max_rows=2000).rows) < 0.8 * len(cells.rows)
    assert len(read_cells(planted, "resid_post.0", max_rows=1).rows)  # a sample is drawn
