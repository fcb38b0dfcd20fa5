"""What the user, the disk or a signal does wrong: one line that says what to do, and nothing lost.

Most cases run the script inside this process, its exit included (`shell`); what has to be killed
or needs a device of its own is a process of its own.
"""

import contextlib
import errno
import gzip
import itertools
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TINY, random_task, run_script
from forks import Script, run_forked

import simple_extraction_inference as script
from utils.errors import UserError
from utils.model.capture import HOOK_POINTS
from utils.model.config import FAMILIES, MODEL_TYPES, ModelConfig
from utils.shards import iter_items, load_shard
from utils.shards.manifest import read_answers, read_manifest

# Runs of this process and of others, whose predictions are compared byte for byte.
pytestmark = pytest.mark.usefixtures("optimised")
SCRIPT = "simple_extraction_inference.py"
SCRIPTS = sorted(path.name for path in ROOT.glob("*.py"))
HEAVY = {"jax", "flax", "transformers", "tokenizers", "datasets", "torch", "matplotlib", "pyarrow"}


@pytest.fixture
def shell(in_shell):
    """Call it with flags: runs the script in this process; gives exit code, stdout and stderr."""
    return lambda *flags: in_shell(script, flags)


@pytest.fixture
def flags(tiny_model, tasks_file, tmp_path) -> dict[str, object]:
    """Flags of a run that is in order; its output would go to tmp_path/out."""
    return {
        "model_path": tiny_model,
        "dataset_path": tasks_file,
        "output_path": tmp_path / "out" / "predictions.json",
        "activations_dir": tmp_path / "out" / "activations",
        "max_output_tokens": 8,
    }


def line(flags: dict[str, object]) -> list[object]:
    """{"a": 1, "b": [2, 3], "c": True} -> --a 1 --b 2 3 --c; None is left out."""
    words = []
    for name, value in flags.items():
        values = value if isinstance(value, list) else [] if value is True else [value]
        words += [] if value is None else [f"--{name}", *values]
    return words


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
    }


def one_line(stderr: str) -> str:
    assert re.fullmatch(r"error: \S.+\n", stderr), stderr
    return stderr.rstrip()


@pytest.fixture
def refused(shell, flags, tmp_path):
    """Call it with flags to change: the run must be refused and leave nothing; gives the line."""

    def call(**changed):
        before = snapshot(tmp_path)
        code, stdout, stderr = shell(*line(flags | changed))
        assert (code, stdout) == (2, ""), stderr
        assert snapshot(tmp_path) == before
        return one_line(stderr)

    return call


# ------------------------------------------------------------------------------------ flags

BAD_VALUES = [
    ({"model_path": ""}, "--model_path is empty"),
    ({"model_path": "Qwen/Qwen2-0.5B"}, r"is not a folder: give .* \(hf download"),
    ({"model_path": None}, "required: --model_path"),
    ({"dataset_path": ""}, "--dataset_path is empty"),
    ({"dataset_path": None}, "required: --dataset_path"),
    ({"dataset_path": "nowhere.json"}, r"nowhere\.json does not exist; check the path"),
    ({"adapter": "nowhere"}, r"nowhere has no adapter_config\.json"),
    ({"interventions": "nowhere.json"}, r"nowhere\.json"),
    ({"solutions_path": "nowhere.json"}, r"nowhere\.json does not exist"),
    ({"output_path": ""}, "--output_path is empty"),
    ({"output_path": "."}, "is a folder: give --output_path the path of a file"),
    ({"output_path": "x" * 300}, "name too long"),
    ({"activations_dir": ""}, "--activations_dir is empty"),
    ({"activations_dir": "x" * 300}, "name too long"),
    ({"max_batch_tokens": 0}, "--max_batch_tokens: 0 is below 1"),
    ({"max_batch_tokens": 5}, r"the longest sample, \d+ tokens, .* --max_batch_tokens 5"),
    ({"save_every_n_batches": "x"}, "--save_every_n_batches: 'x' is not a whole number"),
    ({"max_tasks": "x"}, "--max_tasks: 'x' is not a whole number"),
    ({"max_tasks": 0}, "--max_tasks: 0 is below 1"),
    ({"batch_size": 0}, "--batch_size: 0 is below 1"),
    ({"batch_size": "two"}, "not a whole number"),
    ({"dtype": "float64"}, r"--dtype: invalid choice: 'float64' \(choose from"),
    ({"prompt_format": "prose"}, "'prose': neither chat, turns, compact, plain, nvarc"),
    ({"prompt_format": ""}, "nor a Jinja file"),
    ({"grid_encoding": "hex"}, "--grid_encoding: invalid choice"),
    ({"max_tasks": 10**20}, "--max_tasks: 100000000000000000000 is above"),
    ({"max_train_pairs": 0}, "--max_train_pairs: 0 is below 1"),
    ({"augmentations": 0}, "--augmentations: 0 is below 1"),
    ({"augmentations": "all"}, "--augmentations: 'all' is not a whole number"),
    (
        {"augmentations": 3_000_000},
        "--augmentations 3000000 is more than the 2903040 views that a task with one train pair",
    ),
    ({"max_model_len": 0}, "--max_model_len: 0 is below 1"),
    ({"max_model_len": 2000}, "--max_model_len 2000 is more than the model's 1024 positions"),
    (
        {"max_model_len": 40},
        r"none of the 8 samples can be run: does not fit in 40 tokens .8.: lower --max_outp",
    ),
    ({"max_output_tokens": -1}, "--max_output_tokens: -1 is below 0"),
    ({"max_output_tokens": "1e3"}, "'1e3' is not a whole number"),
    ({"max_output_tokens": 1024}, "--max_output_tokens 1024 leaves no room .*: lower it"),
    ({"max_output_tokens": 1000}, "none of the 8 samples can be run: .*: lower --max_output_tok"),
    ({"predictions_per_task": 0}, "--predictions_per_task: 0 is below 1"),
    ({"temperature": "nan"}, "--temperature: nan is not a finite number of at least 0"),
    ({"temperature": "inf"}, "--temperature: inf is not a finite number"),
    ({"temperature": -0.5}, "--temperature: -0.5 is not a finite number of at least 0"),
    ({"temperature": "hot"}, "'hot' is not a number"),
    ({"seed": 1.5}, "--seed: invalid int value: '1.5'"),
    ({"layers_to_extract": 2}, "layer 2 does not exist: the model has 2 layers, 0..1"),
    ({"layers_to_extract": -3}, "layer -3 does not exist"),
    ({"layers_to_extract": "0,3"}, "layer '0,3' is neither a whole number"),
    ({"layers_to_extract": ["all", 1]}, "layer 'all' is neither .* on its own"),
    ({"layers_to_extract": True}, "--layers_to_extract: expected at least one argument"),
    ({"hook_points": "resid"}, "--hook_points: invalid choice: 'resid'"),
    ({"token_positions": "first"}, "--token_positions: invalid choice"),
    ({"activation_dtype": "int4"}, "--activation_dtype: invalid choice"),
    ({"max_rows_per_sample": 0}, "--max_rows_per_sample: 0 is below 1"),
    ({"save_every_n_samples": 0}, "--save_every_n_samples: 0 is below 1"),
    ({"max_shard_mb": 0}, "--max_shard_mb: 0 is not a finite number of at least 1"),
    ({"max_shard_mb": "1GB"}, "'1GB' is not a number"),
    ({"cloud_bucket": "b/x", "upload_to_cloud": True}, "--cloud_bucket b/x is not gs://BUCKET"),
    ({"upload_timeout": 0}, "--upload_timeout: 0 is not a finite number of at least 1"),
    ({"upload_timeout": "soon"}, "--upload_timeout: 'soon' is not a number"),
    ({"max_pending_gb": 0}, "--max_pending_gb: 0 is not a finite number"),
]
SWITCHES = {
    *("help", "verbose", "no_extraction", "teacher_forcing", "no_logits"),
    *("resume", "overwrite", "dry_run", "upload_to_cloud", "delete_after_upload"),
}


@pytest.mark.parametrize(("changed", "message"), BAD_VALUES, ids=lambda value: str(value)[:40])
def test_a_bad_value_is_refused(refused, changed, message):
    assert re.search(message, refused(**changed))


def test_every_flag_has_a_bad_value_above():
    tried = {name for changed, _ in BAD_VALUES for name in changed}
    names = {action.dest for action in script.build_parser()._actions}
    assert names == tried | SWITCHES


@pytest.mark.parametrize("wrong", ["--max_task", "--max-tasks", "--extract", "stray"])
def test_an_unknown_flag_is_refused(shell, flags, wrong):
    code, _, stderr = shell(*line(flags), wrong)
    assert code == 2 and wrong in one_line(stderr) and "--help" in stderr


CONTRADICTIONS = [
    (
        {"resume": True, "overwrite": True},
        "--resume continues a run, --overwrite replaces it: give one of them",
    ),
    ({"resume": True, "overwrite": True, "dry_run": True}, "give one of them"),
    (
        {"max_output_tokens": 0, "predictions_per_task": 2},
        "--predictions_per_task needs answers that are generated",
    ),
    (
        {"teacher_forcing": True, "max_output_tokens": None, "predictions_per_task": 2},
        "--predictions_per_task needs answers that are generated",
    ),
    (
        {"predictions_per_task": 2, "temperature": 0},
        "--predictions_per_task above 1 needs a --temperature above 0",
    ),
    (
        {"teacher_forcing": True, "max_output_tokens": None, "temperature": 1},
        "--temperature needs answers that are generated",
    ),
    (
        {"max_output_tokens": 0, "temperature": 1},
        "--temperature needs answers that are generated",
    ),
    (
        {"max_output_tokens": 0, "no_extraction": True},
        "--no_extraction with no answer to generate leaves nothing to do",
    ),
    (
        {"teacher_forcing": True, "no_extraction": True, "max_output_tokens": None},
        "--no_extraction with no answer to generate leaves nothing to do",
    ),
    (
        {"teacher_forcing": True, "max_output_tokens": 0},
        "--teacher_forcing runs the ground truth, and --max_output_tokens 0 .*: give one of them",
    ),
    (
        {"token_positions": "answer", "max_output_tokens": 0},
        "--token_positions answer, but --max_output_tokens 0 makes no answer",
    ),
    (
        {"no_extraction": True, "layers_to_extract": 0},
        "--no_extraction extracts nothing: leave out --layers_to_extract$",
    ),
    (
        {"no_extraction": True, "hook_points": "attn_out", "no_logits": True},
        "leave out --hook_points, --no_logits",
    ),
    ({"no_extraction": True, "activation_dtype": "int8"}, "leave out --activation_dtype"),
    ({"no_extraction": True, "token_positions": "last"}, "leave out --token_positions"),
    ({"no_extraction": True, "max_rows_per_sample": 5}, "leave out --max_rows_per_sample"),
]


@pytest.mark.parametrize(("changed", "message"), CONTRADICTIONS, ids=lambda value: str(value)[:60])
def test_flags_that_contradict_each_other(refused, changed, message):
    assert re.search(message, refused(**changed))


def test_verbose_adds_the_traceback_to_the_same_line(refused, shell, flags):
    changed = {"layers_to_extract": 9}
    quiet = refused(**changed)
    code, _, stderr = shell("--verbose", *line(flags | changed))
    assert code == 2 and "Traceback (most recent call last)" in stderr
    assert "capture.py" in stderr and stderr.rstrip().split("\n")[-1] == quiet


def test_as_a_process_of_its_own(flags, tmp_path):
    for changed, message in (
        ({"model_path": tmp_path / "none"}, "is not a folder"),
        ({"layers_to_extract": 9}, "layer 9 does not exist"),
        ({"temperature": "nan"}, "not a finite number"),
    ):
        run = run_script(SCRIPT, *line(flags | changed), cwd=tmp_path)
        assert (run.returncode, run.stdout) == (2, "") and message in one_line(run.stderr)
    assert snapshot(tmp_path) == {}


# ------------------------------------------------------------------------------------- help

RUN_AND_LIST_MODULES = """
import contextlib, io, runpy, sys
sys.path.insert(0, {root!r})
sys.argv = [{script!r}, {flag!r}]
code = None
with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
    try:
        runpy.run_path({path!r}, run_name="__main__")
    except SystemExit as stop:
        code = stop.code
print(code, len(out.getvalue()) > 20, *({heavy!r} & set(sys.modules)))
"""


@pytest.mark.parametrize(("flag", "code"), [("--help", 0), ("--no_such_flag", 2)])
@pytest.mark.parametrize("name", SCRIPTS)
def test_help_and_flag_errors_import_nothing_heavy(name, flag, code):
    path = str(ROOT / name)
    program = RUN_AND_LIST_MODULES.format(
        root=str(ROOT), script=name, path=path, flag=flag, heavy=HEAVY
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout.split() == [str(code), "True"], run.stdout + run.stderr


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_gives_the_default_of_every_flag_that_takes_a_value(name):
    text = run_forked(name, "--help", env={"COLUMNS": "400"}).stdout
    usage, _, options = text.partition("\n\n")
    flags = re.findall(r"^  (--\w+) \S", options, re.M)
    assert flags, text
    for flag in flags:
        described = re.search(rf"^  {flag} .*(\n {{10,}}.*)?", options, re.M)[0]
        required = f"[{flag} " not in usage
        assert required or "(default: " in described, described
        assert "None" not in described


def test_help_shows_choices_in_braces_also_beside_a_file():
    text = run_forked(SCRIPT, "--help", env={"COLUMNS": "400"}).stdout
    for choices in (
        "--prompt_format {chat,turns,compact,plain,nvarc,architects,arc24}|FILE",
        "--grid_encoding {digits,spaced,numbered,words}",
        "--dtype {float32,bfloat16}",
        "--token_positions {all,prompt,answer,last,cells}",
        "--activation_dtype {float16,float32,int8}",
        f"--hook_points {{{','.join(HOOK_POINTS)}}}",
    ):
        assert f"\n  {choices}" in text


def test_a_dry_run_writes_nothing(shell, flags, tmp_path):
    code, stdout, stderr = shell(*line(flags), "--dry_run")
    assert code == 0 and stdout.endswith("dry run: nothing was written\n"), stderr
    assert snapshot(tmp_path) == {}


@pytest.mark.parametrize("text", [None, '{"examples": 1}\n', '{"examples": [[[[1]], [[2]]]'])
def test_a_refused_transformation_leaves_no_folder(tmp_path, text):
    rows = tmp_path / "rows.jsonl"
    if text is not None:
        rows.write_text(text)
    before = snapshot(tmp_path)
    wrong = ["--split", "test"] if text else []
    run = run_forked(
        "transform_hf_to_arc.py", "--dataset", rows, "--output_dir", tmp_path / "a" / "b", *wrong
    )
    assert run.returncode == 2 and "error: " in run.stderr
    assert snapshot(tmp_path) == before


# ----------------------------------------------------------------------------------- dataset

PAIR = {"input": [[1]], "output": [[2]]}


def tasks_with(**changed: object) -> str:
    return json.dumps({"a": {"train": [PAIR], "test": [{"input": [[1]]}]} | changed})


def grid_of(grid: object) -> str:
    return tasks_with(test=[{"input": grid}])


DATASETS = [
    ("x.json", b"", "x.json is empty"),
    ("x.json", '{"a": ', "x.json is not JSON .*; repair it"),
    ("x.json", "\x00\xff\x80", r"x\.json is not a JSON object"),
    ("x.json", "[1, 2]", r'x\.json: item 0 must be an object with a "task_id"'),
    ("x.json", tasks_with().encode("utf-16"), r"x\.json is UTF-16: save it as UTF-8"),
    ("x.json", '"text"', "is not a JSON object"),
    ("x.json", "{}", "holds no tasks; expected"),
    ("x.json", '{"a": [[[1]]]}', 'task a is not an object with "train" .* a solutions file'),
    ("x.json", '{"a": {"examples": []}}', 'needs the keys "train" and "test", found: examples'),
    ("x.json", '{"a": {"train": []}}', 'needs the keys "train" and "test", found: train'),
    ("x.json", '{"train": [], "tests": []}', 'needs the keys "train" and "test", found: train, te'),
    ("x.json", tasks_with(train=[]), 'task a: "train" must be a list of at least one pair'),
    ("x.json", tasks_with(train={}), '"train" must be a list'),
    ("x.json", tasks_with(train=[{"input": [[1]]}]), 'train pair 0 must be .*"output"'),
    ("x.json", tasks_with(test=[[1]]), 'test pair 0 must be an object with "input"'),
    ("x.json", grid_of([[10]]), r"test pair 0, input: cell out of range 0\.\.9; a grid is"),
    ("x.json", grid_of([[-1]]), "cell out of range"),
    ("x.json", grid_of([[0.5]]), "cell is not an integer"),
    ("x.json", grid_of([["1"]]), "cell is not an integer"),
    ("x.json", grid_of([[True]]), "cell is not an integer"),
    ("x.json", grid_of([[0] * 31]), "grid larger than 30x30"),
    ("x.json", grid_of([[1, 2], [3]]), "rows of unequal length"),
    ("x.json", grid_of([[]]), "empty grid; .* or let transform_hf_to_arc.py leave out"),
    ("x.json", grid_of("111"), "not a grid"),
    ("x.json", grid_of([[1]])[:-1] + "," + grid_of([[1]])[1:], "task a comes twice"),
    ("x.jsonl", '{"task_id": "a"', "line 1 is not JSON"),
    ("x.jsonl", "{}\n", 'line 1 must be an object with a "task_id"'),
    ("x.json.gz", gzip.compress(b'{"a": {}}', mtime=0)[:-6], "is not a whole gzip file"),
    ("x.json.gz", b"{}", "is not a whole gzip file"),
    ("x.txt", "{}", r"unknown kind of file; expected \.json, "),
    ("x.jsonl", tasks_with(), 'must be an object with a "task_id"'),
]


@pytest.mark.parametrize(("name", "text", "message"), DATASETS, ids=lambda v: str(v)[-40:])
def test_a_dataset_that_is_wrong(refused, tmp_path, name, text, message):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode("latin-1"))
    assert re.search(message, refused(dataset_path=path))


def test_a_folder_without_tasks(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "holds no tasks" in refused(dataset_path=tmp_path / "empty")


def test_the_solutions_are_not_the_dataset(refused, tasks_file):
    solutions = tasks_file.with_name("test_outputs_train.json")
    assert "is it a solutions file?" in refused(dataset_path=solutions)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"task0": [[[1]], [[2]]]}', "has 2 grids for task task0, which has 1 test inputs"),
        ('{"task0": [[[11]]]}', "cell out of range"),
        ('{"task0": 1}', "task task0 has no grids"),
        ("[]", "is not a JSON object"),
        ("", "is empty"),
    ],
)
def test_solutions_that_are_wrong(refused, tmp_path, text, message):
    path = tmp_path / "solutions.json"
    path.write_text(text)
    assert message in refused(solutions_path=path)


def test_teacher_forcing_without_ground_truth(refused, tmp_path, tasks_file):
    changed = {"teacher_forcing": True, "max_output_tokens": None}
    alone = tmp_path / "alone.json"
    alone.write_bytes(tasks_file.read_bytes())
    assert re.search(
        r"needs ground truth, and neither .*alone\.json nor a file beside it .*: give its --solut",
        refused(dataset_path=alone, **changed),
    )
    others = tmp_path / "others.json"
    others.write_text('{"unheard_of": [[[1]]]}')
    assert "others.json has none of the 7 tasks" in refused(
        dataset_path=alone, solutions_path=others, **changed
    )


# ------------------------------------------------------------------------------------- model


def config(**changed: object):
    """Changes config.json; None removes a field."""

    def damage(folder: Path) -> None:
        path = folder / "config.json"
        fields = json.loads(path.read_text()) | changed
        path.write_text(json.dumps({k: v for k, v in fields.items() if v is not None}))

    return damage


def remove(*names: str):
    return lambda folder: [(folder / name).unlink() for name in names]


def write(name: str, text: str):
    return lambda folder: (folder / name).write_text(text)


def both(*damages):
    return lambda folder: [damage(folder) for damage in damages]


def tensors(folder: Path) -> None:
    from safetensors.numpy import load_file, save_file

    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.9.mlp.up_proj.weight"] = weights.pop("model.layers.1.mlp.up_proj.weight")
    weights["model.norm.weight"] = np.zeros(7, np.float32)
    weights["model.layers.0.self_attn.q_proj.bias"] = np.zeros(32, np.int8)
    save_file(weights, path)


def tokenizer_config(**changed: object):
    def damage(folder: Path) -> None:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changed))

    return damage


WEIGHTS, CHAT = "model.safetensors", "chat_template.jinja"
MODELS = {
    "no config": (remove("config.json"), r"has no config\.json: give the folder of"),
    "config is not JSON": (write("config.json", "{"), r"config\.json cannot be read as JSON"),
    "config is a list": (write("config.json", "[]"), r"config\.json does not hold a JSON object"),
    "no weights": (remove(WEIGHTS), r"has no \.safetensors weights: copy them"),
    "no tokenizer": (remove("tokenizer.json"), r"has no tokenizer; copy tokenizer\.json"),
    "slow tokenizer": (
        both(remove("tokenizer.json"), write("vocab.json", "{}")),
        r"only a slow tokenizer; write tokenizer\.json with transformers",
    ),
    "no tokenizer config": (
        remove("tokenizer_config.json"),
        r"has no tokenizer_config\.json, which says how texts begin and end: copy it there too",
    ),
    "broken tokenizer": (write("tokenizer.json", '{"model": 1}'), "cannot read the tokenizer in"),
    "bin only": (
        both(remove(WEIGHTS), write("pytorch_model.bin", "")),
        r"only \.bin weights; convert them with transformers",
    ),
    "adapter": (
        write("adapter_config.json", "{}"),
        r"a whole model and adapter_config\.json: move",
    ),
    "misfits": (
        tensors,
        r"unexpected model\.layers\.9\.mlp\.up_proj\.weight"
        r".*missing model\.layers\.1\.mlp\.up_proj\.weight",
    ),
    "mis-shaped": (tensors, r"model\.norm\.weight has shape \[7\], not \[32\]"),
    "integers": (tensors, r"q_proj\.bias has dtype I8, not one of F32, BF16, F16"),
    "git-lfs pointer": (
        write(WEIGHTS, "version https://git-lfs.github.com/spec/v1\n"),
        r"model\.safetensors is a pointer of Git LFS, not the file itself: run git lfs pull",
    ),
    "tokenizer is a git-lfs pointer": (
        write("tokenizer.json", "version https://git-lfs.github.com/spec/v1\n"),
        r"tokenizer\.json is a pointer of Git LFS",
    ),
    "damaged": (
        write(WEIGHTS, "nonsense"),
        r"model\.safetensors is damaged or not a safetensors file .*fetch it again",
    ),
    "weights are a folder": (
        both(remove(WEIGHTS), lambda folder: (folder / WEIGHTS).mkdir()),
        "damaged or not a safetensors file",
    ),
    "index of nothing": (
        both(
            remove(WEIGHTS),
            write(f"{WEIGHTS}.index.json", '{"weight_map": {"a": "b.safetensors"}}'),
        ),
        r"names b\.safetensors, which is not there: copy it too",
    ),
    "broken index": (
        both(remove(WEIGHTS), write(f"{WEIGHTS}.index.json", '{"weight_map": {"a": 1}}')),
        "is not a safetensors index",
    ),
    "model type": (config(model_type="mamba"), "'mamba' is not supported; supported: llama, mis"),
    "no model type": (config(model_type=None), "model_type None is not supported"),
    "quantized": (
        config(quantization={"bits": 4}),
        "quantization is not supported: .*MLX: take the checkpoint that is not",
    ),
    "rope type": (
        config(rope_scaling={"rope_type": "longrope", "factor": 2}),
        "rope_type 'longrope' is not supported; supported: default, linear, llama3, yarn",
    ),
    "no rope theta": (config(rope_theta=None), r"rope_theta is missing; add to config\.json"),
    "rope theta": (config(rope_theta="large"), "rope_theta must be a positive number, not 'large'"),
    "too small a vocabulary": (
        config(vocab_size=100, eos_token_id=5),
        r"embed_tokens\.weight has shape \[\d+, 32\], not \[100, 32\]",
    ),
    "broken chat template": (write(CHAT, "{{ oops("), "the tokenizer's chat template fails"),
    "no chat template": (
        remove(CHAT),
        r"has no chat template: copy chat_template\.jinja, .* compact and plain need none",
    ),
    "generation config": (
        write("generation_config.json", "nonsense"),
        r"generation_config\.json cannot be read as JSON",
    ),
    "end of turn": (
        write("generation_config.json", '{"eos_token_id": "</s>"}'),
        "eos_token_id in .* must be a token id or a list of them, not '</s>'",
    ),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_folder_that_is_wrong(refused, tiny_model, tmp_path, kind):
    damage, message = MODELS[kind]
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    damage(folder)
    assert re.search(message, refused(model_path=folder))


def test_a_tokenizer_with_more_ids_than_embeddings(refused, tiny_model, tmp_path):
    from checkpoints import write_random_checkpoint

    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    write_random_checkpoint(folder, {**TINY, "vocab_size": 200})
    message = r"token ids up to \d+, but the model's vocab_size is 200; use the tokenizer that"
    assert re.search(message, refused(model_path=folder))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_config_field_of_the_wrong_type_never_crashes(model_type):
    wrong = (-1, 0, 1.5, True, "x", [], [[]], {}, {"rope_type": []}, float("nan"), [{}] * 4)
    for field, value in itertools.product(FAMILIES[model_type], wrong):
        fields = {**TINY, "model_type": model_type, field: value}
        with contextlib.suppress(UserError):  # or it is a field that this type does not look at
            assert isinstance(ModelConfig.from_dict(fields), ModelConfig), (field, value)


@pytest.mark.parametrize(
    ("kind", "field"), [("linear", "factor"), ("llama3", "low_freq_factor"), ("yarn", "truncate")]
)
def test_a_rope_field_of_the_wrong_type_never_crashes(kind, field):
    rope = {"rope_type": kind, "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    wrong = (-1, "x", [], {}, float("nan"))
    for name, value in itertools.product(("factor", "rope_theta", "type", field), wrong):
        with pytest.raises(UserError):
            ModelConfig.from_dict({**TINY, "rope_scaling": {**rope, name: value}})


# ------------------------------------------------------------------------------- Jinja files

GRIDS = "{% for p in train %}{{ p.input }}\n{{ p.output }}\n{% endfor %}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GRIDS + "{{ test_input }", "fails in line 3"),
        (GRIDS + "{{ nobody }}", "'nobody' is undefined"),
        (GRIDS, "holds the test input 0 times; use it once"),
        (GRIDS + "{{ test_input }}{{ test_input }}", "holds the test input 2 times"),
        ("{{ test_input }}", "holds the input of train pair 1 0 times"),
        (GRIDS + "{{ test_input }}{{ ''.__class__.__mro__ }}", "fails in line 3.*unsafe"),
        (GRIDS + "{{ test_input }}{{ 1 // 0 }}", "fails in line 3"),
        (GRIDS + "{{ test_input }}{{ chat(1) }}", "chat template fails"),
        ("\xff", "is not UTF-8: if it is Latin-1"),
    ],
)
def test_a_broken_jinja_file(refused, tmp_path, text, message):
    path = tmp_path / "prompt.jinja"
    path.write_bytes(text.encode("latin-1"))
    assert re.search(message, refused(prompt_format=path))


# ------------------------------------------------------------------------------------ output


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"activations_dir": "file"}, "file is a file: choose a folder"),
        ({"activations_dir": "file/below"}, "cannot write to .*Not a directory; choose another"),
        ({"activations_dir": "/proc/activations"}, "cannot write to /proc/activations: "),
        ({"output_path": "file/p.json"}, "Not a directory|is a file: choose a folder"),
        ({"output_path": "file/below/p.json"}, "Not a directory; choose another folder"),
        ({"output_path": "/proc/p.json"}, "cannot write to /proc: .*choose another folder"),
        ({"output_path": "file/p.json", "no_extraction": True}, "is a file: choose a folder"),
        ({"output_path": "a", "activations_dir": "a/b"}, "a is on the way to .*a/b: choose"),
        ({"output_path": "a", "activations_dir": "a"}, "choose another --output_path"),
        ({"output_path": "a/metadata.json", "activations_dir": "a"}, "is a file of the run itself"),
        ({"activations_dir": "/proc/activations", "dry_run": True}, "cannot write to /proc"),
        ({"output_path": "tasks.json", "overwrite": True}, "is read by this run: choose another"),
    ],
    ids=str,
)
def test_a_place_that_cannot_be_written_to(
    refused, monkeypatch, tmp_path, tasks_file, changed, message
):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    Path("tasks.json").write_bytes(tasks_file.read_bytes())
    assert re.search(message, refused(dataset_path="tasks.json", **changed))


@contextlib.contextmanager
def small_disk(folder: Path, size: str, *options: str):
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", ",".join([f"size={size}", *options]), "tmpfs", folder]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk can only be mounted by root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_read_only_disk(refused, tmp_path):
    with small_disk(tmp_path / "disk", "1m", "ro") as disk:
        for changed in ({"activations_dir": disk / "a"}, {"output_path": disk / "p.json"}):
            assert "Read-only file system; choose another folder" in refused(**changed)


def test_too_small_a_disk_is_refused_before_the_run(refused, tmp_path):
    with small_disk(tmp_path / "disk", "200k") as disk:
        message = r"needs at least [\d.]+ MB and has 0\.\d\d MB free: free space, or take"
        assert re.search(message, refused(activations_dir=disk / "a"))
        assert not list(disk.iterdir())


# --------------------------------------------------------------------- runs that were started


def places(folder: Path) -> dict[str, Path]:
    return {"output_path": folder / "predictions.json", "activations_dir": folder / "activations"}


@pytest.fixture(scope="module")
def finished(tiny_model, tasks_file, tmp_path_factory) -> tuple[Path, dict]:
    """A folder with a complete run of four shards, begun by --resume in an empty folder, and the
    flags that it was made with but for the places."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "activations").mkdir()
    made_with = {
        "model_path": tiny_model,
        "dataset_path": tasks_file,
        "max_output_tokens": 100,
        "save_every_n_samples": 2,
        "max_train_pairs": 1,
    }
    run = run_forked(SCRIPT, *line(made_with | places(folder)), "--resume")
    assert run.returncode == 0, run.stderr
    assert read_manifest(folder / "activations")["status"] == "complete"
    return folder, made_with


@pytest.fixture
def run(finished, tmp_path, flags) -> Path:
    """A copy of the finished run in tmp_path/out, which `flags` and so `refused` then continue."""
    folder, made_with = finished
    shutil.copytree(folder, tmp_path / "out")
    flags.update(made_with)
    return tmp_path / "out"


def test_a_folder_that_holds_a_run_is_refused_naming_both_ways_out(refused, run):
    text = refused()
    assert "predictions.json exists" in text and "--resume" in text and "--overwrite" in text
    (run / "predictions.json").unlink()
    text = refused()
    assert "holds a run (complete, 8 samples)" in text
    assert "--resume" in text and "--overwrite" in text


def test_resume_on_a_complete_run_does_nothing(flags, run):
    before = snapshot(run)
    times = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    ended = run_forked(SCRIPT, *line(flags), "--resume")
    assert (ended.returncode, ended.stdout) == (0, "")
    assert ended.stderr == f"the run in {run / 'activations'} is complete; there is nothing to do\n"
    assert snapshot(run) == before
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == times


def test_resume_writes_lost_predictions_again(shell, flags, run):
    before = snapshot(run)
    (run / "predictions.json").unlink()
    assert shell(*line(flags), "--resume")[0] == 0
    after = snapshot(run)
    assert after["predictions.json"] == before["predictions.json"]
    shards = [name for name in before if name.endswith(".pkl")]
    assert len(shards) == 4 and all(after[name] == before[name] for name in shards)


def test_resume_names_what_differs(refused, run, tiny_model, tasks_file, tmp_path):
    other_model, other_tasks = tmp_path / "model", tmp_path / "tasks.json"
    shutil.copytree(tiny_model, other_model)
    weights = other_model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    tasks = json.loads(tasks_file.read_text())
    other_tasks.write_text(json.dumps(tasks | {"task0": tasks["task1"]}))
    for changed, named in (
        ({"model_path": other_model}, "model.hash was "),
        ({"dataset_path": other_tasks}, "dataset.hash was "),
        ({"max_tasks": 3}, "dataset.tasks was 7, is 3"),
        ({"prompt_format": "compact"}, "prompt.format was 'chat', is 'compact'"),
        ({"grid_encoding": "words"}, "prompt.encoding was 'digits', is 'words'"),
        ({"max_train_pairs": None}, "prompt.max_train_pairs was 1, is None"),
        ({"augmentations": 2}, "prompt.augmentations was None, is 2"),
        ({"layers_to_extract": 0}, "activations.resid_post.1 was {"),
        ({"hook_points": "attn_out"}, "activations.attn_out.0 was None"),
        ({"token_positions": "last"}, "capture.token_positions was 'all', is 'last'"),
        ({"max_rows_per_sample": 5}, "capture.max_rows_per_sample was None, is 5"),
        ({"no_logits": True}, "capture.logits was True, is False"),
        ({"activation_dtype": "float32"}, "dtype was 'float16', is 'float32'"),
        ({"activation_dtype": "int8"}, "dtype was 'float16', is 'int8'"),
        ({"dtype": "bfloat16"}, "model.dtype was 'float32', is 'bfloat16'"),
        ({"max_output_tokens": 9}, "generation.max_output_tokens was 100, is 9"),
        ({"temperature": 1}, "generation.temperatures was [0.0], is [1.0]"),
        ({"seed": 1}, "generation.seed was 0, is 1"),
        ({"teacher_forcing": True}, "generation.teacher_forcing was False, is True"),
        ({"max_model_len": 900}, "prompt.max_model_len was 1024, is 900"),
    ):
        text = refused(resume=True, **changed)
        assert f"cannot resume {run / 'activations'} with other settings: " in text
        assert named in text and "--overwrite" in text


def test_resume_does_not_replace_the_predictions_of_another_run(refused, run, tmp_path):
    text = refused(resume=True, activations_dir=tmp_path / "new")
    assert "there is no run to resume in" in text and "choose another --output_path" in text


@pytest.mark.parametrize("damage", ["cut short", "gone", "answers gone"])
def test_resume_computes_a_damaged_shard_again(shell, flags, run, damage, caplog):
    """It says which, and the predictions are those of before."""
    shard = run / "activations" / "activations_batch_000002.pkl"
    before = (run / "predictions.json").read_bytes()
    if damage == "gone":
        shard.unlink()
    elif damage == "answers gone":
        (shard.parent / "answers.jsonl").unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-100])
    code, _, stderr = shell(*line(flags), "--resume")
    assert code == 0, stderr
    assert "missing or damaged" in caplog.text and "activations_batch_000002.pkl" in caplog.text
    assert (run / "predictions.json").read_bytes() == before
    manifest = json.loads((run / "activations" / "metadata.json").read_text())
    assert (manifest["status"], manifest["total_samples"]) == ("complete", 8)
    assert "activations_batch_000002.pkl" not in {e["filename"] for e in manifest["files"]}


def test_a_damaged_manifest(refused, run):
    (run / "activations" / "metadata.json").write_text('{"status": "comp')
    for changed in ({"resume": True}, {"output_path": run / "new.json"}):
        assert "metadata.json is not the manifest of a run, or damaged" in refused(**changed)


def test_once_the_run_has_begun_the_exit_code_is_1(shell, flags, run, monkeypatch):
    def refuse(plan, answers):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), plan.request.output_path)

    monkeypatch.setattr("utils.run.conclude.write_output", refuse)
    (run / "predictions.json").unlink()
    before = snapshot(run)
    code, stdout, stderr = shell(*line(flags), "--resume")
    assert (code, stdout) == (1, "") and "Traceback" not in stderr
    assert re.search(r"error: Permission denied: .*json; what was written is intact", stderr)
    assert all(snapshot(run)[name] == before[name] for name in before if name.endswith(".pkl"))


class Hostile:
    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def test_a_shard_that_was_altered_is_refused_by_name(run, tmp_path):
    shard = run / "activations" / "activations_batch_000001.pkl"
    whole = shard.read_bytes()
    assert len(load_shard(shard)) == 2
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    hostile = pickle.dumps([Hostile(tmp_path / "pwned")])
    for altered, cause, listed in (
        (whole[:-1], "bytes, not the", False),
        (flipped, "damaged: its crc32c is", False),
        (hostile, "bytes, not the", False),
        (hostile, "it asks for ", True),
    ):
        shard.write_bytes(altered)
        if listed:  # as if the attacker had written the manifest too
            _list_as_is(shard)
        for read in (lambda: load_shard(shard), lambda: list(iter_items(shard.parent))):
            with pytest.raises(UserError) as error:
                read()
            assert str(error.value).startswith(f"{shard} is refused: ") and cause in str(
                error.value
            )
    assert not (tmp_path / "pwned").exists()
    pickle.loads(hostile)  # the attack is a real one
    assert (tmp_path / "pwned").exists()


def _list_as_is(shard: Path) -> None:
    from utils.store.local import checksum

    path = shard.with_name("metadata.json")
    manifest = json.loads(path.read_text())
    entry = next(e for e in manifest["files"] if e["filename"] == shard.name)
    with shard.open("rb") as file:
        entry.update(size_bytes=shard.stat().st_size, crc32c=checksum(file))
    path.write_text(json.dumps(manifest))


def test_overwrite_replaces_the_run_and_nothing_else(run, flags):
    (run / "activations" / "mine.txt").write_text("mine")
    changed = flags | {"max_tasks": 2, "no_logits": True}
    ended = run_forked(SCRIPT, *line(changed), "--overwrite")
    assert ended.returncode == 0, ended.stderr
    names = {path.name for path in (run / "activations").iterdir()}
    assert names == {"metadata.json", "answers.jsonl", "activations_batch_000001.pkl", "mine.txt"}
    assert list(json.loads((run / "predictions.json").read_text())) == ["task0", "task1"]
    assert all("output_logits" not in item for item in iter_items(run / "activations"))


def test_without_extraction_the_predictions_are_guarded_alike(shell, flags, tmp_path):
    flags |= {"no_extraction": True, "max_tasks": 1, "activations_dir": tmp_path / "untouched"}
    ended = run_forked(SCRIPT, *line(flags))
    assert ended.returncode == 0, ended.stderr
    before = snapshot(tmp_path)
    files = {"out/predictions.json", "out/predictions.json.run/metadata.json"}
    assert set(before) == {"out", "out/predictions.json.run", *files}
    code, _, stderr = shell(*line(flags))
    assert code == 2 and "--resume" in one_line(stderr) and "--overwrite" in stderr
    ended = run_forked(SCRIPT, *line(flags), "--resume")
    assert (ended.returncode, ended.stdout) == (0, "")
    assert "is complete; there is nothing to do" in ended.stderr
    assert snapshot(tmp_path) == before


def test_a_disk_that_fills_up_before_the_predictions(shell, flags, run, tmp_path):
    predictions = (run / "predictions.json").read_bytes()
    (run / "predictions.json").unlink()
    page = os.sysconf("SC_PAGE_SIZE")
    assert len(predictions) > page
    with small_disk(tmp_path / "disk", str(64 * page)) as disk:
        flags["output_path"] = disk / "predictions.json"
        (disk / "ballast").write_bytes(bytes(63 * page))
        code, stdout, stderr = shell(*line(flags), "--resume")
        assert (code, stdout) == (1, ""), stderr
        assert re.search(
            r"error: cannot write .*predictions\.json: No space left.*--resume\n$", stderr
        )
        assert [path.name for path in disk.iterdir()] == ["ballast"]
        assert len(list(iter_items(run / "activations"))) == 8
        (disk / "ballast").unlink()
        assert shell(*line(flags), "--resume")[0] == 0
        assert flags["output_path"].read_bytes() == predictions


def test_a_disk_that_fills_up_during_the_run(flags, tmp_path):
    flags |= {"max_output_tokens": 300, "save_every_n_samples": 1, "max_train_pairs": 1}
    with small_disk(tmp_path / "disk", "700k") as disk:
        folder = flags["activations_dir"] = disk / "activations"
        ended = run_forked(SCRIPT, *line(flags))
        assert (ended.returncode, ended.stdout) == (1, ""), ended.stderr
        assert "Traceback" not in ended.stderr
        assert re.search(
            r"\nerror: cannot write to .*: No space left on device; the shard takes .* MB, .*"
            r"What was written before is intact: free space and --resume\n$",
            ended.stderr,
        )
        assert not flags["output_path"].exists()
        kept = samples_of(folder)
        assert 0 < len(kept) < 8
        subprocess.run(["mount", "-o", "remount,size=8m", disk], check=True)
        ended = run_forked(SCRIPT, *line(flags), "--resume")
        assert ended.returncode == 0, ended.stderr
        assert samples_of(folder)[: len(kept)] == kept and len(samples_of(folder)) == 8
        scored = json.loads(flags["output_path"].read_text())
        assert sum(map(len, scored.values())) == 8


# -------------------------------------------------------------------------- signals and kills


def samples_of(folder: Path) -> list[tuple[str, int]]:
    """The samples that the manifest lists, in order; every shard loads, each has its answer."""
    manifest = read_manifest(folder)
    listed = [tuple(key) for entry in manifest["files"] for key in entry["samples"]]
    assert len(set(listed)) == len(listed) == manifest["total_samples"]
    shards = [load_shard(folder / entry["filename"]) for entry in manifest["files"]]
    assert [(i["task_id"], i["sample_idx"]) for shard in shards for i in shard] == listed
    assert list(read_answers(folder)) == listed
    return listed


@pytest.fixture(scope="module")
def long_flags(tiny_model, tmp_path_factory) -> dict[str, object]:
    """Flags of a run of some seconds: 60 samples in 15 shards."""
    rng = random.Random(1)
    tasks = {f"task{i}": random_task(rng, 2)[0] for i in range(60)}
    path = tmp_path_factory.mktemp("long") / "tasks.json"
    path.write_text(json.dumps(tasks))
    return {
        "model_path": tiny_model,
        "dataset_path": path,
        "max_train_pairs": 1,
        "max_output_tokens": 300,
        "save_every_n_samples": 4,
    }


@pytest.fixture(scope="module")
def undisturbed(long_flags, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    run = run_forked(SCRIPT, *line(long_flags | places(folder)))
    assert run.returncode == 0, run.stderr
    assert len(samples_of(folder / "activations")) == 60
    return folder


@contextlib.contextmanager
def started(*words: object, env: dict[str, str] | None = None):
    """The script as its users start it; killed at the end if it still runs."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / SCRIPT), *map(str, words)],
        env={**os.environ, **(env or {})},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def wait_for(condition, process: Script, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.005)


def stored(folder: Path) -> int:
    return len(list(folder.glob("activations_batch_*.pkl")))


def test_stopped_twice_and_resumed(long_flags, undisturbed, tmp_path):
    words = [*line(long_flags | places(tmp_path)), "--resume"]
    folder, before = tmp_path / "activations", 0
    for signum, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        shards = stored(folder)
        with Script(SCRIPT, *words) as process:
            wait_for(lambda shards=shards: stored(folder) > shards + 1, process)
            process.send_signal(signum)
            sent = time.monotonic()
            while signum == signal.SIGINT and process.poll() is None:  # an impatient user
                process.send_signal(signum)
                time.sleep(0.003)
            _, stderr = process.communicate(timeout=60)
            assert time.monotonic() - sent < 20
        assert process.returncode == code, stderr
        last = re.split(r"[\r\n]+", stderr.strip())[-1]
        assert last.endswith(f"stopped by {signum.name}; what was written is intact")
        assert "Traceback" not in stderr
        manifest = read_manifest(folder)
        assert manifest["status"] == "running"
        assert before < len(samples_of(folder)) < 60
        before = len(samples_of(folder))
        assert not list(folder.glob("*.partial"))
        assert not (tmp_path / "predictions.json").exists()
    run = run_forked(SCRIPT, *words)
    assert run.returncode == 0, run.stderr
    assert sorted(samples_of(folder)) == sorted(samples_of(undisturbed / "activations"))
    predictions = (tmp_path / "predictions.json").read_bytes()
    assert predictions == (undisturbed / "predictions.json").read_bytes()
    assert read_manifest(folder)["status"] == "complete"


def read_until_sample(process: subprocess.Popen, number: int, of: int = 60) -> None:
    """Read stderr until the progress bar says that so many samples are there."""
    text = ""
    while character := process.stderr.read(1):
        text += character
        if (found := re.search(rf"\| (\d+)/{of} ", text[-30:])) and int(found[1]) >= number:
            return
    raise AssertionError(text)


def test_stopped_and_resumed_without_extraction(long_flags, tmp_path):
    output = tmp_path / "predictions.json"
    words = [*line(long_flags | {"output_path": output, "save_every_n_samples": 1000})]
    words.append("--no_extraction")
    folder = tmp_path / "predictions.json.run"
    with started(*words, env={"TQDM_MININTERVAL": "0"}) as process:
        read_until_sample(process, 7)
        assert stored(folder) == 0
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)
    assert process.returncode == 143
    kept = samples_of(folder)
    assert 7 <= len(kept) < 60 and stored(folder) == 1  # the open shard was closed
    answers = read_answers(folder)
    assert run_forked(SCRIPT, *words).returncode == 2
    run = run_forked(SCRIPT, *words, "--resume")
    assert run.returncode == 0, run.stderr
    assert [path.name for path in folder.iterdir()] == ["metadata.json"]
    before = output.read_bytes()
    again = run_forked(SCRIPT, *words, "--resume")
    assert again.returncode == 0 and "nothing to do" in again.stderr
    other = run_forked(SCRIPT, *words, "--resume", "--seed", 1)
    assert other.returncode == 2 and "generation.seed was 0, is 1" in other.stderr
    assert output.read_bytes() == before
    scored = json.loads(output.read_text())
    assert len(scored) == 60
    for task_id, _ in kept:
        assert scored[task_id][0]["attempts"] == answers[task_id, 0]["attempts"]


def test_a_signal_while_the_model_compiles(long_flags, tmp_path):
    """Without the cache the programs take seconds; the signal is not kept waiting for them."""
    empty = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
    with started("--verbose", *line(long_flags | places(tmp_path)), env=empty) as process:
        for said in process.stderr:  # the debug log
            if "Compiling" in said and "prefill" in said:
                break
        process.send_signal(signal.SIGTERM)
        sent = time.monotonic()
        _, stderr = process.communicate(timeout=60)
        assert time.monotonic() - sent < 20
    assert process.returncode == 143, stderr
    assert not list(tmp_path.rglob("*.pkl"))


def test_a_signal_before_the_run_leaves_nothing(long_flags, tmp_path):
    with started("--verbose", *line(long_flags | places(tmp_path))) as process:
        process.stderr.read(1)  # of the debug log: the imports have begun
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert snapshot(tmp_path) == {}


# and the shares of slots that were useful since the last start
TIMES = ("seconds", "compile_seconds", "tokens_per_second", "useful_slots")


def assert_equal_runs(folder: Path, other: Path) -> None:
    """To the byte, but for timings and the flags that say where and how often."""
    contents = []
    for root in (folder, other):
        files = snapshot(root)
        manifest = json.loads(files.pop("activations/metadata.json"))
        answers = read_answers(root / "activations")
        files.pop("activations/answers.jsonl")  # a kill can leave a line twice
        for key in TIMES:
            manifest.pop(key)
        for key in ("output_path", "activations_dir", "resume"):
            manifest["arguments"].pop(key)
        contents.append((files, manifest, answers))
    assert contents[0][0].keys() == contents[1][0].keys()
    assert contents[0] == contents[1]


def kill_until(folder: Path, words: list[object], kills: int, seed: int) -> list[int]:
    """kill -9 at random moments of the run, `kills` times at most, then let it end.

    Gives how many samples were stored at each kill.
    """
    rng, kept = random.Random(seed), []
    activations = folder / "activations"

    def listed() -> int:
        manifest = activations / "metadata.json"
        return read_manifest(activations)["total_batches"] if manifest.exists() else 0

    for _ in range(kills):
        aim = listed() + rng.randint(1, 3)
        with Script(SCRIPT, *words) as process:
            if rng.random() < 0.25:  # while it is getting ready
                time.sleep(rng.uniform(0, 3))
            else:
                while process.poll() is None and listed() < aim:
                    time.sleep(0.002)
                time.sleep(rng.uniform(0, 0.25))
            process.kill()
            process.wait()
        if process.returncode != -signal.SIGKILL:
            break
        kept.append(len(samples_of(activations)) if listed() else 0)
    run = run_forked(SCRIPT, *words)
    assert run.returncode == 0, run.stderr
    return kept


def test_killed_at_random_moments(long_flags, undisturbed, tmp_path):
    words = [*line(long_flags | places(tmp_path)), "--resume"]
    kept = kill_until(tmp_path, words, kills=6, seed=0)
    assert len(kept) >= 4 and len(set(kept) - {0, 60}) >= 3  # else it was not tried
    assert kept == sorted(kept)
    assert_equal_runs(tmp_path, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_killed_at_more_random_moments(long_flags, undisturbed, tmp_path, seed):
    words = [*line(long_flags | places(tmp_path)), "--resume"]
    kill_until(tmp_path, words, kills=10, seed=seed)
    assert_equal_runs(tmp_path, undisturbed)
