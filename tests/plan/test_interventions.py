"""`--interventions`: which tokens an entry means, what is refused, and whole runs with them."""

import json
from dataclasses import replace
from hashlib import sha256
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import NoSignals, words
from parity import worst_error
from runs import planned

import simple_extraction_inference as script
from utils.errors import UserError
from utils.model.autoencoder import Autoencoder
from utils.model.config import ModelConfig
from utils.model.interventions import Edit
from utils.plan.donors import Donor
from utils.plan.interventions import Intervention, check_interventions, read_interventions
from utils.plan.plan import plan_run
from utils.plan.request import Request
from utils.prompt.codec import Encoded
from utils.run.loop import run
from utils.shards import iter_items
from utils.shards.manifest import read_manifest

# pair, role, row, col, color, start, stop: two train cells in one token, a test input, an answer
CELLS = np.array(
    [
        [0, 0, 0, 0, 3, 1, 2],
        [0, 0, 0, 1, 5, 1, 2],
        [0, 1, 0, 0, 3, 3, 5],
        [1, 1, 0, 0, 3, 5, 6],
        [-1, 0, 0, 0, 5, 7, 8],
        [-1, 1, 0, 0, 3, 10, 11],
    ],
    np.int32,
)
ENCODED = Encoded(np.arange(12, dtype=np.int32), 9, CELLS)


class Sample:
    key, task, sample_idx, num_train_pairs = ("task", 0), None, 0, 2


@pytest.mark.parametrize(
    ("where", "tokens"),
    [
        (None, range(12)),
        ({}, range(12)),
        ({"part": "prompt"}, range(9)),
        ({"part": "answer"}, [9, 10, 11]),
        ({"role": "input"}, [1, 7]),
        ({"role": "output"}, [3, 4, 5, 10]),
        ({"pair": "train"}, [1, 3, 4, 5]),
        ({"pair": "test"}, [7, 10]),
        ({"pair": 1}, [5]),
        ({"color": 3}, [1, 3, 4, 5, 10]),
        ({"color": [5, 3], "role": "input"}, [1, 7]),
        # One cell has to fulfil both conditions.
        ({"color": 3, "col": 1}, []),
        ({"color": 5, "col": 1}, [1]),
        ({"role": "output", "part": "prompt"}, [3, 4, 5]),
        ({"tokens": [0, 3, 11, 99]}, [0, 3, 11]),
        ({"tokens": [3, 7], "role": "input"}, [7]),
        ({"samples": [["task", 0]], "tokens": [2]}, [2]),
        ({"samples": [["task", 1]]}, []),
    ],
)
def test_which_tokens_are_meant(where, tokens):
    mask = Intervention({"where": where}, None).mask(Sample, ENCODED)
    assert np.flatnonzero(mask).tolist() == list(tokens)


@pytest.mark.parametrize(
    ("where", "tokens"),
    [
        ({}, [0, 1, 2]),
        ({"part": "answer"}, [0, 1, 2]),
        ({"part": "prompt"}, []),
        ({"color": 3}, []),
        ({"tokens": [8, 10]}, [1]),
        ({"samples": [["other", 0]]}, []),
    ],
)
def test_which_generated_tokens_are_meant(where, tokens):
    asked = Encoded(ENCODED.ids[:9], 9, CELLS[:-1])
    mask = Intervention({"where": where}, None).mask(Sample, asked, room=3)
    assert np.flatnonzero(mask[9:]).tolist() == tokens


def test_a_view_is_a_sample_of_its_own():
    view = SimpleNamespace(key=("task", 0, 1))
    for samples, meant in (([["task", 0, 1]], True), ([["task", 0], ["task", 0, 2]], False)):
        one = Intervention({"where": {"samples": samples}}, None)
        assert one.mask(view, ENCODED, room=3).tolist() == [meant] * (len(ENCODED.ids) + 3)


@pytest.mark.parametrize(("asked", "said"), [("task", "holds no sample"), ("other", "matches no")])
def test_a_donor_is_not_asked_for_a_sample_that_is_not_touched(asked, said):
    donor = Donor("a run of another sample", "resid_post.1", {}, None, False)
    where = {"samples": [[asked, 0]]}
    patch = Intervention({"where": where}, Edit("resid_post.1", "patch"), {}, donor)
    request = SimpleNamespace(teacher_forcing=True, interventions="changes.json", room=0)
    codec = SimpleNamespace(encode=lambda *args: ENCODED)
    with pytest.raises(UserError, match=said):
        check_interventions(request, codec, [Sample], [patch])


@pytest.fixture(scope="module")
def config(tiny_model):
    return ModelConfig.from_hf(tiny_model)


@pytest.fixture
def written(tmp_path):
    """Call it with the list: the path of a file that holds it."""

    def write(entries):
        np.save(tmp_path / "wide.npy", np.ones(33, np.float32))
        np.save(tmp_path / "vector.npy", np.ones(32, np.float32))
        np.save(tmp_path / "zeros.npy", np.zeros(32, np.float32))
        np.save(tmp_path / "nan.npy", np.full(32, np.nan))
        (tmp_path / "empty.npy").touch()
        (tmp_path / "zip.npy").write_bytes(b"PK\x03\x04 and no more")
        weights = {"w_enc": np.ones((32, 8)), "b_enc": np.zeros(8), "b_dec": np.zeros(32)}
        weights["w_dec"] = weights["w_enc"].T
        for name, hook in (("sae", "resid_post.1"), ("hookless", None)):
            Autoencoder("standard", None, hook, weights).save(tmp_path / name, {})
        path = tmp_path / "changes.json"
        text = entries if isinstance(entries, str) else json.dumps(entries)
        path.write_text(text.replace("DIR", str(tmp_path)))
        return str(path)

    return write


ZERO = {"hook": "resid_post.1", "op": "zero"}
PROMPTS = {**ZERO, "where": {"part": "prompt"}}
LATENT = {"hook": "resid_post.1", "op": "latent", "sae": "DIR/sae", "latent": 7}


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ("[", "JSON"),
        ("{}", "a list of interventions"),
        ("[]", "a list of interventions"),
        ("[3]", "entry 0: it must be an object"),
        ([ZERO, {**ZERO, "op": "noise"}], "entry 1: op 'noise' does not exist; there are zero"),
        ([{**ZERO, "hook": "resid.1"}], "hook 'resid.1' does not exist"),
        ([{**ZERO, "hook": "resid_post.4"}], "the model has layers 0 to 1"),
        ([{**ZERO, "hook": None}], "hook None does not exist"),
        ([{**ZERO, "alpha": 2}], "zero does not take alpha"),
        ([{**ZERO, "op": "set"}], "set needs vector"),
        ([{**ZERO, "op": "set", "vector": "DIR/wide.npy"}], "[33], and resid_post.1 is 32 wide"),
        ([{**ZERO, "op": "set", "vector": "DIR/none.npy"}], "No such file"),
        ([{**ZERO, "op": "set", "vector": "DIR/changes.json"}], "not a .npy file"),
        ([{**ZERO, "op": "set", "vector": "DIR/empty.npy"}], "not a .npy file"),
        ([{**ZERO, "op": "set", "vector": "DIR/zip.npy"}], "not a .npy file"),
        ([{**ZERO, "op": "add", "vector": "DIR/nan.npy"}], "finite numbers"),
        ([{**ZERO, "op": "add", "vector": "DIR/vector.npy", "alpha": "2"}], "alpha must be a"),
        ([{**ZERO, "op": "ablate_direction", "vector": "DIR/zeros.npy"}], "no direction"),
        ([{**ZERO, "op": "scale", "factor": True}], "factor must be a finite number"),
        ([{**ZERO, "where": {"colour": 3}}], "where has no colour; there are role"),
        ([{**ZERO, "where": {"part": "all"}}], "part is one of prompt, answer"),
        ([{**ZERO, "where": {"row": -1}}], "row must be a number from 0"),
        ([{**ZERO, "where": {"pair": "first"}}], "pair is test, train or"),
        ([{**ZERO, "where": {"samples": ["t"]}}], "samples must be a list of"),
        ([{**ZERO, "where": {"part": "answer", "color": 1}}], "not known before it is generated"),
        ([{**ZERO, "where": {"pair": "test", "role": "output"}}], "take --teacher_forcing"),
        (
            [{**PROMPTS, "op": "patch", "from": "DIR/none"}],
            "DIR/none",
        ),
        ([{**ZERO, "op": "patch", "from": "DIR", "where": {"part": "answer"}}], "known tokens"),
        ([{**ZERO, "op": "patch", "from": "DIR"}], "known tokens"),
        (
            [{**PROMPTS, "op": "patch", "from": "DIR", "sample": [["a", 0], ["b", 0]]}],
            "sample must be [task_id, sample_idx], not [['a', 0], ['b', 0]]",
        ),
        ([{**ZERO, "op": "reconstruct", "sae": "DIR/none"}], "DIR/none"),
        (
            [{"hook": "resid_post.0", "op": "reconstruct", "sae": "DIR/sae"}],
            "is an autoencoder of resid_post.1, not of resid_post.0",
        ),
        (
            [{"hook": "mlp_act.1", "op": "reconstruct", "sae": "DIR/hookless"}],
            "is 32 wide, and mlp_act.1 is 64",
        ),
        ([{**LATENT, "latent": 8, "value": 1}], "latent 8 does not exist: there are 0 to 7"),
        ([{**LATENT, "value": 1, "factor": 1}], "latent takes either `value` or `factor`"),
        ([LATENT], "latent takes either `value` or `factor`"),
        ([{**LATENT, "value": None}], "value must be a finite number, not None"),
    ],
)
def test_what_is_refused(entries, said, written, config, tmp_path):
    path = written(entries)
    with pytest.raises(UserError) as error:
        read_interventions(path, config, generates=True)
    assert said.replace("DIR", str(tmp_path)) in str(error.value)
    assert path in str(error.value) and "\n" not in str(error.value)


def test_what_is_computed_with_and_noted(written, config, tmp_path):
    vector = {"hook": "resid_mid.0", "vector": "DIR/vector.npy"}
    adds = [{**vector, "op": "add", **more} for more in ({}, {"alpha": 2})]
    ablated, latent = {**vector, "op": "ablate_direction"}, {**LATENT, "factor": 3}
    found = read_interventions(written([*adds, ablated, latent]), config, generates=True)
    assert [set(one.constants["vector"]) for one in found[:2]] == [{1}, {2}]
    assert np.linalg.norm(found[2].constants["vector"]) == pytest.approx(1)
    assert (found[3].constants["latent"], found[3].constants["amount"]) == (7, 3)
    for one, name in zip(found, [*["vector.npy"] * 3, "sae/sae_weights.safetensors"], strict=True):
        assert one.entry["sha256"] == sha256((tmp_path / name).read_bytes()).hexdigest()


def test_a_mixture_has_no_mlp_act(written, config):
    path = written([{**ZERO, "hook": "mlp_act.1"}])
    assert len(read_interventions(path, config, generates=True)) == 1
    with pytest.raises(UserError, match=r"hook 'mlp_act\.1' does not exist"):
        read_interventions(path, replace(config, num_experts=4), generates=True)


def test_no_file_is_refused_by_name(config):
    with pytest.raises(UserError, match=r"nowhere\.json"):
        read_interventions("nowhere.json", config, generates=True)


@pytest.fixture
def computed(tiny_model, tasks_file, tmp_path):
    """Call it with a name, entries and flags: the items of a run, by sample, and its manifest."""

    def compute(name, entries=None, **more):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        if entries is not None:
            (folder / "changes.json").write_text(json.dumps(entries))
            more["interventions"] = folder / "changes.json"
        flags = {
            "model_path": tiny_model,
            "dataset_path": tasks_file,
            "output_path": folder / "predictions.json",
            "activations_dir": folder / "acts",
            "dtype": "float32",
            "activation_dtype": "float32",
            "prompt_format": "compact",
            "layers_to_extract": "all",
            "max_tasks": 3,
            "batch_size": 4,
            **({} if more.pop("generates", False) else {"teacher_forcing": True}),
            **more,
        }
        request = Request.from_flags(script.build_parser().parse_args(words(flags)))
        run(plan_run(request), NoSignals())
        items = {(i["task_id"], i["sample_idx"]): i for i in iter_items(folder / "acts")}
        return items, read_manifest(folder / "acts")

    return compute


def test_whole_runs(computed, tmp_path):
    """`add` with alpha 0 is a run without, to the byte; a run patched from itself is itself; with
    a donor's states at all tokens of the first layer, what follows is the donor's."""
    plain, manifest = computed("plain")
    assert manifest["interventions"] == []
    vector = tmp_path / "vector.npy"
    np.save(vector, np.arange(32, dtype=np.float32))
    nothing = {"hook": "resid_mid.1", "op": "add", "vector": str(vector), "alpha": 0}
    same, manifest = computed("alpha 0", [nothing])
    assert manifest["interventions"][0].items() > nothing.items()
    assert len(manifest["interventions"][0]["sha256"]) == 64
    for key, item in plain.items():
        for name, states in item["activations"].items():
            assert states.tobytes() == same[key]["activations"][name].tobytes()
    itself = {"hook": "resid_post.0", "op": "patch", "from": str(tmp_path / "plain" / "acts")}
    patched, manifest = computed("itself", [itself])
    of_donor = sha256((tmp_path / "plain" / "acts" / "metadata.json").read_bytes())
    assert manifest["interventions"][0]["sha256"] == of_donor.hexdigest()
    shifted, _ = computed("shifted", [{**nothing, "hook": "resid_post.0", "alpha": 1}])
    donor = {**itself, "from": str(tmp_path / "shifted" / "acts")}
    taken, _ = computed("donor", [donor])
    for key, item in plain.items():
        assert (
            worst_error(
                patched[key]["activations"]["resid_post.1"], item["activations"]["resid_post.1"]
            )
            < 1e-5
        )
        np.testing.assert_allclose(
            taken[key]["output_logprobs"], shifted[key]["output_logprobs"], atol=1e-5
        )
        assert not np.allclose(taken[key]["output_logprobs"], item["output_logprobs"], atol=1e-3)


def test_a_run_that_answers_and_is_resumed_with_others(computed, tmp_path):
    """Captures of generated tokens see the value after the change; `--resume` compares the list."""
    zeroed = {"hook": "mlp_out.1", "op": "zero", "where": {"part": "answer"}}
    points = ["mlp_out", "k", "mlp_act"]
    flags = {"hook_points": points, "max_output_tokens": 5, "generates": True}
    found, manifest = computed("answers", [zeroed], **flags)
    widths = {"mlp_out.1": 32, "k.1": 16, "mlp_act.1": 64}
    assert {name: manifest["activations"][name]["width"] for name in widths} == widths
    for item in found.values():
        states, P = item["activations"]["mlp_out.1"], item["prompt_length"]
        shapes = {name: item["activations"][name].shape for name in widths}
        assert shapes == {name: (len(states), width) for name, width in widths.items()}
        assert states[:P].any(axis=1).all() and not states[P:].any() and len(states) > P
        assert item["activations"]["mlp_out.0"].any(axis=1).all()
    with pytest.raises(UserError, match="interventions"):
        computed("answers", [{**zeroed, "hook": "mlp_out.0"}], resume=True, **flags)


def test_entries_that_do_not_overwrite_may_meet(tiny_model, tasks_file, tmp_path, written):
    path = written([{**ZERO, "op": "scale", "factor": 2}] * 2 + [ZERO])
    flags = ["--interventions", path, "--max_output_tokens", 0, "--max_tasks", 1]
    assert len(planned(tiny_model, tasks_file, tmp_path, *flags).interventions) == 3


def test_entries_that_meet_nothing_or_contradict(computed):
    nobody = {**ZERO, "where": {"samples": [["no such task", 0]]}}
    with pytest.raises(UserError, match="entry 1 matches no token of any sample"):
        computed("nobody", [ZERO, nobody])
    with pytest.raises(UserError, match=r"entries 0 and 1 both overwrite resid_post\.1 at token 0"):
        computed("twice", [ZERO, PROMPTS])
    grids = [{**ZERO, "where": {"role": role}} for role in ("input", "output", "input")]
    with pytest.raises(UserError, match="entries 0 and 2 both overwrite"):
        computed("grids", grids)
    answers = [{**ZERO, "where": {"part": "answer"}}] * 2
    with pytest.raises(UserError, match="entries 0 and 1 both overwrite"):
        computed("answers", answers, generates=True, max_output_tokens=3)
