"""Training: stopped and continued it gives the same weights; other settings are refused."""

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, run_script

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
