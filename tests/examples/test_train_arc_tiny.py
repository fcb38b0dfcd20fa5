"""Training: stopped and continued it gives the same weights; other settings are refused."""

import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from checkpoints import write_random_checkpoint
from conftest import ROOT, TINY, run_script

from utils.errors import UserError

FLAGS = ("--batch_tokens", 512, "--check_every", 2)


def command(folder, name, *flags, steps=8):
    places = ("--work_dir", folder / name, "--output_dir", folder / f"{name}_model")
    return ("examples/train_arc_tiny.py", *places, *FLAGS, "--steps", steps, *flags)


@pytest.mark.slow
def test_a_training_that_is_stopped_and_continued_gives_the_same_bytes(tmp_path):
    whole = run_script(*command(tmp_path, "a"))
    assert whole.returncode == 0, whole.stderr
    script, *flags = map(str, command(tmp_path, "b"))
    with subprocess.Popen([sys.executable, ROOT / script, *flags]) as stopped:
        while not (tmp_path / "b" / "state.msgpack").exists():
            assert stopped.poll() is None
            time.sleep(0.02)
        stopped.send_signal(signal.SIGTERM)
    assert stopped.returncode == 143 and not (tmp_path / "b_model").exists()
    continued = run_script(*command(tmp_path, "b"))
    assert "going on from step" in continued.stdout, continued.stderr
    made = [sorted(p.name for p in (tmp_path / f"{n}_model").iterdir()) for n in "ab"]
    assert made[0] == made[1] and {"config.json", "model.safetensors", "tokenizer.json"} < {
        *made[0]
    }
    for name in made[0]:
        ours, theirs = ((tmp_path / f"{n}_model" / name).read_bytes() for n in "ab")
        assert ours == theirs
    log = [json.loads(line) for line in (tmp_path / "b" / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == [2, 4, 6, 8]

    taken = run_script(*command(tmp_path, "a"))
    assert taken.returncode == 2 and "a_model exists: give another" in taken.stderr
    shutil.rmtree(tmp_path / "b_model")
    other = run_script(*command(tmp_path, "b", "--seed", 7))
    assert other.returncode == 2 and "other settings: seed was 0, is 7" in other.stderr
    (tmp_path / "b" / "state.msgpack").write_bytes(b"torn")
    torn = run_script(*command(tmp_path, "b"))
    assert torn.returncode == 2 and "state.msgpack is damaged" in torn.stderr


def test_settings_that_are_damaged_are_one_line(tmp_path):
    from examples.train_arc_tiny import build_parser, check_settings

    args = build_parser().parse_args(list(map(str, command(tmp_path, "a")[1:])))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "settings.json").write_text('{"seed": ')
    with pytest.raises(UserError, match=r"settings.json cannot be read as JSON"):
        check_settings(args)


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_written_is_what_was_loaded(tmp_path, tied):
    from examples.train_arc_tiny import write_checkpoint
    from utils.model.config import ModelConfig
    from utils.model.layout import Layout, single_device_mesh
    from utils.model.weights import Checkpoint

    fields = {**TINY, "tie_word_embeddings": tied, "head_dim": 8}
    write_random_checkpoint(tmp_path / "a", fields)
    config = ModelConfig.from_hf(tmp_path / "a")
    layout = Layout.of(config, single_device_mesh())
    params = Checkpoint(tmp_path / "a", config).load(layout, np.float32)
    write_checkpoint(tmp_path / "b", fields, params)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
