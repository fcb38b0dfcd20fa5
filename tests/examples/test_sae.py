"""The example's autoencoder on data whose features are known."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import NoSignals, run_script

from examples import sae as sae_module
from examples.sae import SaeConfig, fit, main, split, write
from examples.sae_training import Progress, Trainer, alike, guarded, measure, shuffled, train
from utils import cli
from utils.dataset import ActivationDataset, Selection
from utils.dataset.contrast import contrast, pair_up, roles_of_tokens
from utils.dataset.shuffle import ActivationRows
from utils.errors import UserError
from utils.model.autoencoder import Autoencoder, load_autoencoder
from utils.shards.writer import RunFolder

D, F = 16, 24


@pytest.fixture(scope="module")
def planted():
    """Rows that are sums of two of 24 directions, shifted and scaled, and which two."""
    random = np.random.default_rng(0)
    directions = random.standard_normal((F, D))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    which = np.array([random.permutation(F)[:2] for _ in range(20_000)])
    strength = random.uniform(1, 2, which.shape)
    rows = (directions[which] * strength[..., None]).sum(axis=1) * 7 + 3
    return rows.astype(np.float32), directions, which


def trainer_of(rows, **changes):
    settings = {"width": 32, "k": 2, "steps": 600, "batch_size": 256, "learning_rate": 5e-3}
    devices = changes.pop("devices", 1)
    config = SaeConfig(**{**settings, **changes})
    return Trainer(config, rows.mean(axis=0), float(rows.std()), devices)


@pytest.fixture(scope="module", params=["topk", "batchtopk", "jumprelu"])
def trained(request, planted):
    rows, *_ = planted
    trainer = trainer_of(rows, arch=request.param, steps=800)
    progress = train(trainer, rows[2000:], rows[:2000])
    assert progress.steps == 800 and not progress.fallen
    return trainer.autoencoder(progress.state)


def test_it_finds_the_directions_that_were_planted(planted, trained):
    rows, directions, _ = planted
    cosines = np.abs(directions @ trained.weights["w_dec"].T).max(axis=1)
    assert (cosines > 0.95).mean() > 0.9
    found = measure(trained, rows[:2000])
    assert found["explained_variance"] > 0.9 and found["l0"] <= 2 * 1.1
    assert found["often_active"] == 0
    np.testing.assert_allclose(np.linalg.norm(trained.weights["w_dec"], axis=1), 1, atol=1e-5)


def test_what_is_measured_is_what_it_says(planted, trained):
    rows = planted[0][:500].copy()
    latents = trained.encode(rows)
    left = rows - trained.decode(latents)
    found = measure(trained, rows)
    want = 1 - (left**2).sum() / ((rows - rows.mean(axis=0)) ** 2).sum()
    assert found["explained_variance"] == pytest.approx(want, abs=1e-5)
    assert found["l0"] == pytest.approx((latents > 0).sum() / 500)
    assert found["dead_fraction"] == pytest.approx((~(latents > 0).any(axis=0)).mean())
    always = {**trained.weights, "b_enc": np.full(32, 1e3, np.float32)}
    all_active = replace(trained, architecture="standard", weights=always)
    assert measure(all_active, rows)["often_active"] == 32


def test_alike_decoder_rows_are_counted_in_pairs():
    random = np.random.default_rng(0)
    decoder = random.standard_normal((10, D))
    decoder[[3, 7]] = 2 * decoder[0]
    decoder[9] = -decoder[1]
    for block in (1, 4, 100):
        assert alike(decoder, block=block) == 3


def test_the_auxiliary_loss_wakes_latents_that_would_never_fire(planted, monkeypatch):
    """Half of the latents begin too weak to be among the two highest."""
    rows, *_ = planted

    def dead(coefficient):
        trainer = trainer_of(rows, steps=400, aux_coefficient=coefficient, dead_steps=20)
        state = trainer.begin(rows[:256])
        strong = (np.arange(32) < 16)[:, None]
        state["params"]["encoder"] *= np.where(strong, 1, 0.1).astype(np.float32)
        for batch in itertools.islice(shuffled(rows, 256, 0), 400):
            state, _ = trainer.step(state, batch)
        return measure(trainer.autoencoder(state), rows)["dead_fraction"]

    assert dead(1 / 8) < 0.1 < 0.3 < dead(0)


def test_a_short_training_of_batchtopk_is_not_ended_by_its_own_threshold():
    """Which has to follow the latents as they grow."""
    random = np.random.default_rng(0)
    directions = random.standard_normal((256, 64))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    shares = np.where(random.random((4000, 256)) < 1 / 16, random.uniform(1, 2, (4000, 256)), 0)
    rows = (shares @ directions).astype(np.float32)
    sizes = {"width": 256, "k": 16, "steps": 100, "learning_rate": 2e-3}
    progress = train(trainer_of(rows, arch="batchtopk", **sizes), rows[500:], rows[:500])
    assert progress.steps == 100 and progress.best_variance > 0.5


def test_training_ends_and_keeps_its_best_where_it_falls():
    """Of what is measured, in the order of training: all latents active, good, better, NaN."""
    random = np.random.default_rng(0)
    rows = random.standard_normal((1000, D)).astype(np.float32)
    identity = np.concatenate([np.eye(D), -np.eye(D)]).astype(np.float32)
    zeros = np.zeros(2 * D, np.float32)

    def sae(scale, b_enc=0.0):
        weights = {"w_enc": identity.T, "b_enc": zeros + np.float32(b_enc), "b_dec": zeros[:D]}
        return Autoencoder("standard", None, None, {**weights, "w_dec": identity * scale})

    progress = Progress(0, {}, {})
    for made, best, fallen in (
        (sae(1.0, b_enc=10), -np.inf, False),  # explains all, but is not sparse
        (sae(np.float32(0.9)), 0.99, False),
        (sae(np.float32(0.8)), 0.99, False),  # 3 points lower
        (sae(np.float32(0.7)), 0.99, True),
        (sae(np.float32(np.nan)), 0.99, True),
        (sae(1.0), 1.0, True),
    ):
        progress = guarded(progress, made, rows, k=D)
        assert (
            progress.best_variance == pytest.approx(best, abs=0.002) and progress.fallen == fallen
        )
    # Rows that are all alike have no variance, and tell nothing.
    for alike_rows in (rows[:1], rows[:1].repeat(7, axis=0)):
        assert not guarded(Progress(0, {}, {}), sae(np.float32(0.9)), alike_rows, k=D).fallen


def test_the_best_is_kept_where_training_falls(run_folder, monkeypatch, caplog):
    from examples import sae_training

    dataset, config = (
        ActivationDataset(run_folder, Selection(2)),
        SaeConfig(width=64, k=8, steps=40, batch_size=64),
    )
    variances = iter([0.5, 0.7, 0.66, 0.64, 0.9])
    weights = []

    def pretended(sae, rows):
        weights.append(sae.weights)
        return {"explained_variance": next(variances, 0.1), "l0": 8.0}

    monkeypatch.setattr(sae_training, "measure", pretended)
    made, found = fit(dataset, config)
    assert found["steps"] == 8 and len(weights) == 5  # every second step, and then what was kept
    assert "8 of 40 steps: the explained variance on held-out tasks had fallen" in caplog.text
    assert all(np.array_equal(made.weights[n], weights[1][n]) for n in weights[1])
    assert not np.array_equal(made.weights["w_enc"], weights[3]["w_enc"])


@pytest.mark.parametrize("arch", ["topk", "batchtopk", "jumprelu"])
def test_a_training_that_stops_and_goes_on_gives_the_same_bytes(arch, run_folder, tmp_path):
    dataset = ActivationDataset(run_folder, Selection(2))
    config = SaeConfig(arch, width=64, k=8, steps=30, batch_size=64, dead_steps=5)
    write(tmp_path / "whole", *(whole := fit(dataset, config))[:1], dataset, config, whole[1])
    file, polls = tmp_path / "part.training.safetensors", itertools.count()
    assert fit(dataset, config, file=file, stopping=lambda: next(polls) >= 12) is None
    with pytest.raises(UserError, match="is of a training with k 8, not 9: repeat its command"):
        fit(dataset, replace(config, k=9), file=file)
    part = fit(dataset, config, file=file)
    write(tmp_path / "part", part[0], dataset, config, part[1])
    for name in ("cfg.json", "sae_weights.safetensors"):
        assert (tmp_path / "part" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"is damaged .*: delete it to begin anew"):
        fit(dataset, config, file=file)


@pytest.mark.parametrize("arch", ["topk", "batchtopk"])
def test_devices_that_share_a_batch_give_the_weights_of_one(arch, planted):
    rows, *_ = planted
    found = []
    for devices in (1, 4):
        trainer = trainer_of(rows, arch=arch, steps=20, dead_steps=5, devices=devices)
        progress = train(trainer, rows, rows[:2000])
        assert len(progress.state["params"]["w_dec"].sharding.device_set) == devices
        found.append(trainer.autoencoder(progress.state).weights)
    for name, value in found[0].items():
        np.testing.assert_allclose(
            found[1][name], value, rtol=1e-3, atol=1e-3 * np.abs(value).max()
        )


def test_an_sae_that_cannot_be_trained_is_refused(run_folder):
    dataset = ActivationDataset(run_folder, Selection(0))
    for config, devices, said in (
        (SaeConfig(width=31), 1, "of 31 latents is narrower than its input of 32"),
        (SaeConfig(width=64, k=0), 1, "k 0 is not between 1 and the width 64"),
        (SaeConfig(width=64), 1000, "--mesh 1000 is more than the 8 devices there are"),
        (SaeConfig(width=64, batch_size=9), 2, "batch of 9 rows does not go into 2 devices"),
        (SaeConfig(width=64, k=4, batch_size=10**6), 1, "rows to train on are fewer than a batch"),
    ):
        with pytest.raises(UserError, match=said):
            fit(dataset, config, devices=devices)


def test_rows_in_int8_train_an_autoencoder_as_good(planted, tmp_path):
    """The explained variance on held-out tasks is that of float32 to 0.3 points.

    Eight latents are active at a time: with the two that were planted, training is so sensitive
    that seeds alone differ by a point and more.
    """
    found = {}
    settings = {"activations": {"resid_post.0": {"hook_point": "resid_post", "layer": 0}}}
    settings["activations"]["resid_post.0"]["width"] = D
    settings["capture"] = {"token_positions": "all"}
    config = SaeConfig(width=64, k=8, steps=400, batch_size=256, learning_rate=2e-3)
    for dtype in ("float32", "int8"):
        with RunFolder(tmp_path / dtype, settings, {}, activation_dtype=dtype) as run:
            run.clear()
            run.begin()
            for number, rows in enumerate(np.split(planted[0], 20)):
                key = {"task_id": f"task{number}", "sample_idx": 0}
                made = {
                    **key,
                    "input_ids": np.arange(len(rows)),
                    "prompt_length": len(rows),
                    "activations": {"resid_post.0": rows},
                    "output_logprobs": np.zeros(0),
                    "cells": np.zeros((0, 7), np.int32),
                    "num_train_pairs": 1,
                    **dict.fromkeys(("prediction", "target", "correct")),
                    "teacher_forced": False,
                }
                run.add(made, key)
            run.finish()
        dataset = ActivationDataset(tmp_path / dtype, Selection(0))
        found[dtype] = fit(dataset, config)[1]["explained_variance"]
    assert found["int8"] != found["float32"] > 0.9
    assert abs(found["int8"] - found["float32"]) < 0.003


def test_the_script_trains_on_a_run(run_folder, tmp_path):
    flags = ["--activations_dir", run_folder, "--layer", 2, "--output_dir", tmp_path / "sae"]
    small = ["--width", 64, "--k", 8, "--steps", 30, "--batch_size", 64]
    result = run_script("examples/sae.py", *flags, *small)
    assert result.returncode == 0, result.stderr
    assert "explained variance" in result.stdout and "special tokens" in result.stderr
    sae = load_autoencoder(tmp_path / "sae")
    assert (sae.architecture, sae.k, sae.hook) == ("topk", 8, "resid_post.2")
    about = json.loads((tmp_path / "sae" / "cfg.json").read_text())["metadata"]
    assert about["activation"] == "resid_post.2" and 0 < about["held_out"]["l0"] <= 8
    assert about["selection"].startswith("Selection(layer=2")
    assert "drop_sinks=10" in about["selection"]
    again = run_script("examples/sae.py", *flags, *small)
    assert again.returncode == 2 and "sae exists" in again.stderr
    # Several layers in one pass: this one's bytes are those of the layer alone.
    flags[2:] = ["--layers", 0, 2, "--output_dir", tmp_path / "saes"]
    result = run_script("examples/sae.py", *flags, *small)
    assert result.returncode == 0, result.stderr
    names = ("cfg.json", "sae_weights.safetensors")
    both = [
        (tmp_path / f / name).read_bytes() for f in ("sae", "saes/resid_post.2") for name in names
    ]
    assert both[:2] == both[2:]
    again = run_script("examples/sae.py", *flags, *small, "--resume")
    assert again.returncode == 0 and again.stdout.count("made already") == 2


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        *(
            ((flag, 0), f"argument {flag}: 0 is below 1 ")
            for flag in ("--k", "--max_rows", "--mesh")
        ),
        (("--width", 8), "narrower than its input"),
        (("--layers", 1), "argument --layers: not allowed with argument --layer"),
        (("--layer", 9), "has no resid_post.9"),
        (("--hook_point", "resid_mid"), "has no resid_mid.2"),
    ],
)
def test_a_mistake_is_a_line(flags, said, run_folder, tmp_path, capsys):
    args = ["--activations_dir", run_folder, "--layer", 2, "--output_dir", tmp_path / "b", *flags]
    with pytest.raises((SystemExit, UserError)) as caught:
        main(sae_module.build_parser().parse_args(list(map(str, args))), NoSignals())
    assert said in str(caught.value) + capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_the_working_folder_can_be_that_of_an_autoencoder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sae_module.progress_file(Path(".")) == Path(f"{tmp_path}.training.safetensors")


def test_a_stopped_training_is_not_begun_anew_by_mistake(run_folder, tmp_path):
    flags = ["--activations_dir", run_folder, "--layer", 2, "--output_dir", tmp_path / "sae"]
    small = ["--width", 64, "--k", 8, "--steps", 30, "--batch_size", 64]

    stopped = NoSignals()
    stopped.note(15)

    def script(signals, *more):
        args = map(str, [*flags, *small, *more])
        main(sae_module.build_parser().parse_args(list(args)), signals)

    with pytest.raises(cli.Interrupted):
        script(stopped)
    left = tmp_path / "sae.training.safetensors"
    assert left.exists() and not (tmp_path / "sae").exists()
    with pytest.raises(UserError, match="is of a training that was stopped: --resume goes on"):
        script(NoSignals())
    script(NoSignals(), "--resume")
    assert load_autoencoder(tmp_path / "sae").k == 8 and not left.exists()
    left.write_bytes(b"")  # as after a kill between the last two steps
    script(NoSignals(), "--resume", "--layer", -2)  # the same, counted from the end
    assert not left.exists()
    for more, said in (
        (["--k", 9], "training.k was 8, is 9"),
        (["--drop_sinks", 0], "drop_sinks was 10.0, is None"),
        (["--layer", 0], "activation was 'resid_post.2', is 'resid_post.0'"),
    ):
        with pytest.raises(UserError, match=f"sae was made with other settings: {said}; go back"):
            script(NoSignals(), "--resume", *more)
    (tmp_path / "sae" / "cfg.json").write_text('{"metadata": {"sae_lens_version": "6.0.0"}}')
    with pytest.raises(UserError, match="does not say how it was trained: choose another folder"):
        script(NoSignals(), "--resume")


def test_the_smaller_group_is_paired_with_the_nearest_of_the_other():
    assert pair_up({"a": 100, "b": 10}, {"x": 11, "y": 90, "z": 500}) == [("b", "x"), ("a", "y")]
    failed = {f"f{i}": 100 + 10 * i for i in range(100)}
    solved = {f"s{i}": 900 + 10 * i for i in range(10)}
    assert pair_up(failed, solved) == [(f"f{80 + i}", f"s{i}") for i in range(10)]
    assert pair_up({"a": 1, "b": 2}, {"x": 5}) == [("b", "x")]
    assert pair_up({}, {"x": 5}) == []


def one_token_a_role(task, correct, value, **more):
    cells = [[0, 0, 0, 0, 1, 0, 1], [0, 1, 0, 0, 1, 1, 2], [-1, 0, 0, 0, 1, 2, 3]]
    if value is not None:
        cells.append([-1, 1, 0, 0, 1, 4, 5])
    return {
        "task_id": task,
        "sample_idx": 0,
        "input_ids": np.arange(6, dtype=np.int32),
        "prompt_length": 4,
        "cells": np.array(cells, np.int32),
        "correct": correct,
        "activations": {"resid_post.0": np.full((6, 2), value or 0, np.float16)},
        **more,
    }


def test_a_contrast_is_the_mean_difference_of_its_pairs(monkeypatch):
    """Two failed and two solved samples, and views and unknown answers that do not count."""
    items = [
        one_token_a_role("a", True, 3),
        one_token_a_role("b", False, 1),
        one_token_a_role("c", True, 5),
        one_token_a_role("d", False, None),  # an answer that does not parse has no cell
        one_token_a_role("a", False, 99, view={"number": 2}),
        one_token_a_role("e", None, 99),
    ]
    assert roles_of_tokens(items[0]).tolist() == [0, 1, 2, 4, 3, 5]
    assert roles_of_tokens(items[3]).tolist() == [0, 1, 2, 4, 5, 5]
    monkeypatch.setattr("utils.dataset.contrast.iter_items", lambda _: iter(items))
    found = contrast("anywhere")
    assert found.pairs == [(("b", 0), ("a", 0)), (("d", 0), ("c", 0))]
    assert found.lengths.tolist() == [[4, 4], [4, 4]]
    assert found.counts["resid_post.0", "answer"] == 1
    assert found.differences["resid_post.0", "answer"].tolist() == [2, 2]
    assert found.consistency["resid_post.0", "answer"] == pytest.approx(1)
    place = "resid_post.0", "train input"
    assert found.counts[place] == 2 and found.differences[place].tolist() == [3.5, 3.5]
    assert found.consistency[place] == pytest.approx((2 + 5) / np.sqrt(2**2 + 5**2))
    assert found.chance[place] == pytest.approx(found.consistency[place])  # of two signs, either
    items[3]["activations"]["resid_post.0"][0] = np.nan  # the train input: one pair has it no more
    found = contrast("anywhere")
    assert found.counts[place] == 1 and found.differences[place].tolist() == [2, 2]
    items[:] = items[:1]
    with pytest.raises(UserError, match="1 solved and 0 failed samples"):
        contrast("anywhere")


def test_a_contrast_of_models_of_two_widths_is_refused(monkeypatch):
    items = {name: one_token_a_role("a", True, 3) for name in ("one", "other")}
    items["other"]["activations"]["resid_post.0"] = np.ones((6, 5), np.float32)
    monkeypatch.setattr("utils.dataset.contrast.iter_items", lambda folder: iter([items[folder]]))
    with pytest.raises(UserError, match=r"resid_post\.0 is 2 wide in one, and 5 in other: compare"):
        contrast("one", "other")


def test_chance_stays_below_its_bound_nineteen_times_in_twenty(monkeypatch):
    random = np.random.default_rng(0)
    items = []
    for i in range(60):
        item = one_token_a_role(f"t{i}", i % 2 == 0, 1)
        states = random.standard_normal((6, 40))
        item["activations"] = {f"resid_post.{j}": states[:, 2 * j : 2 * j + 2] for j in range(20)}
        items.append(item)
    monkeypatch.setattr("utils.dataset.contrast.iter_items", lambda _: iter(items))
    found = contrast("anywhere")
    above = np.mean([found.consistency[place] > found.chance[place] for place in found.chance])
    assert 0 < above < 0.12


def test_a_task_is_held_out_with_all_its_samples():
    count = 1000
    samples = np.arange(count) % 40
    rows = ActivationRows(
        np.arange(count, dtype=np.float32)[:, None], samples, samples, samples, samples
    )
    task_ids = [f"task{i % 20}" for i in samples]  # two samples a task
    trained, held_out = split(rows, task_ids)
    assert len(trained) + len(held_out) == count and len(held_out) == count // 10
    tasks = [{task_ids[int(row)] for row in part[:, 0]} for part in (trained, held_out)]
    assert not tasks[0] & tasks[1] and len(tasks[1]) == 2
    with pytest.raises(UserError, match="one task"):
        split(rows, ["a"] * count)


def test_a_large_mean_does_not_count_as_variance():
    random = np.random.default_rng(0)
    rows = random.standard_normal((100_000, 4)).astype(np.float32)
    rows[:, 0] = 3000 + 3 * rows[:, 0]
    mean = rows.mean(axis=0, dtype=np.float64).astype(np.float32)
    nothing = np.zeros((4, 4), np.float32)
    weights = {"w_enc": nothing, "b_enc": nothing[0], "w_dec": nothing, "b_dec": mean}
    sae = Autoencoder("topk", 1, None, weights)
    assert abs(measure(sae, rows)["explained_variance"]) < 1e-3
