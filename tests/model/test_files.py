"""Which files hold the weights, and under which names, as transformers decides."""

import json
import re

import numpy as np
import pytest
from checkpoints import write_random_checkpoint
from conftest import TINY
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from utils.errors import UserError
from utils.model.config import ModelConfig
from utils.model.files import INDEX, ONE_FILE, model_folder, weight_files
from utils.model.layout import Layout, single_device_mesh
from utils.model.weights import Checkpoint

PARTS = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
BESIDE = ["._model.safetensors", "consolidated.safetensors", "optimizer.safetensors"]
BESIDE += ["model.fp16.safetensors", "model.fp16-00001-of-00002.safetensors", "rng_state.pth"]


@pytest.mark.parametrize(
    ("files", "index", "read", "said"),
    [
        ([ONE_FILE, *BESIDE], None, [ONE_FILE], None),
        ([*PARTS, *BESIDE], PARTS, PARTS, None),
        # saved anew in one file, beside what an earlier save left
        ([ONE_FILE, *PARTS], PARTS, [ONE_FILE], rf"{ONE_FILE} is read.* {PARTS[0]}, .*{INDEX} bes"),
        ([ONE_FILE], PARTS, [ONE_FILE], rf"{ONE_FILE} is read.* {INDEX} beside it are not"),
        ([ONE_FILE, *PARTS], None, [ONE_FILE], PARTS[0]),
        # the shards of an earlier save in more files
        (["model-00001-of-00003.safetensors", *PARTS], PARTS, PARTS, None),
        # the index was lost
        (PARTS, None, PARTS, rf"{INDEX} is missing: the 2 files that"),
    ],
)
def test_the_files_that_are_read(files, index, read, said, tmp_path, caplog):
    for name in files:
        (tmp_path / name).touch()
    if index:
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": dict(enumerate(index))}))
    assert [path.name for path in weight_files(tmp_path)] == read
    assert [bool(re.search(said or "", line)) for line in caplog.messages] == [True] * bool(said)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], r"no \.safetensors weights"),
        (["._model.safetensors"], r"no \.safetensors weights"),
        (["pytorch_model.bin"], r"only \.bin weights"),
        (["model.fp16.safetensors"], r"but model\.fp16\.safetensors: rename the model's file"),
        (BESIDE, "but consolidated.safetensors, model.fp16-.*: rename"),
        (PARTS[:1], "but model-00001-of-00002.safetensors: .* copy the index"),
        ([*PARTS, "model-00001-of-00001.safetensors"], "copy the index"),
    ],
)
def test_nothing_is_guessed(files, message, tmp_path):
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=message):
        weight_files(tmp_path)


def saved_twice(folder):
    tensors = load_file(folder / ONE_FILE)
    old = {name: value + np.ones_like(value) for name, value in tensors.items()}
    save_file(old, folder / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
    weight_map = dict.fromkeys(old, "model-00001-of-00001.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def renamed(change):
    def damage(folder):
        tensors = load_file(folder / ONE_FILE)
        tensors = {change(name): value for name, value in tensors.items()}
        save_file(tensors, folder / ONE_FILE, metadata={"format": "pt"})

    return damage


SAVED = {
    "twice": saved_twice,
    "with the head alone": renamed(lambda name: name.replace("model.embed_tokens", "lm_head")),
    "without a head": renamed(lambda name: name.removeprefix("model.")),
}


@pytest.mark.parametrize("kind", SAVED)
def test_the_parameters_are_those_that_transformers_loads(kind, tmp_path):
    pytest.importorskip("torch", reason="torch is not installed: requirements-torch.txt")
    import torch
    import transformers

    write_random_checkpoint(tmp_path, TINY)
    SAVED[kind](tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    config = ModelConfig.from_hf(tmp_path)
    checkpoint = Checkpoint(tmp_path, config)
    params = checkpoint.load(Layout.of(config, single_device_mesh()), np.float32)
    expected = model.state_dict()
    for path, found in flatten_dict(params, sep="/").items():
        (name,) = checkpoint.parameters[path].names
        value = expected[name].numpy()
        np.testing.assert_array_equal(np.asarray(found).reshape(value.shape), value)


def test_a_folder_of_the_hub_s_cache(tmp_path):
    snapshots = [tmp_path / "snapshots" / name for name in ("abc", "def")]
    for folder in snapshots[:1]:
        folder.mkdir(parents=True)
        assert model_folder(tmp_path) == folder
        assert model_folder(folder) == folder
    snapshots[1].mkdir()
    with pytest.raises(UserError, match=r"several snapshots of a model: give one, such as .*/def"):
        model_folder(tmp_path)
    (tmp_path / "refs").mkdir()
    (tmp_path / "refs" / "main").write_text("abc\n")
    assert model_folder(tmp_path) == snapshots[0]


def test_broken_links(tmp_path):
    """Those of the files that are read are named, and the others do no harm."""
    for name in ("consolidated.safetensors", ".hidden.json", "README.md"):
        (tmp_path / name).symlink_to("../blobs/gone")
    (tmp_path / ONE_FILE).touch()
    assert weight_files(model_folder(tmp_path)) == [tmp_path / ONE_FILE]
    for name in (ONE_FILE, INDEX):
        (tmp_path / ONE_FILE).unlink(missing_ok=True)
        (tmp_path / name).symlink_to("../blobs/gone")
        said = rf"{name} is a link to \.\./blobs/gone, which is gone: download"
        with pytest.raises(UserError, match=said):
            weight_files(tmp_path)
    (tmp_path / "generation_config.json").symlink_to("../blobs/gone")
    with pytest.raises(UserError, match=r"generation_config\.json is a link"):
        model_folder(tmp_path)
