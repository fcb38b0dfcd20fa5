"""Training: stopped and continued it gives the same weights; other settings are refused."""

import json

import pytest
from conftest import run_script

FLAGS = ("--batch_tokens", 512, "--check_every", 2)


@pytest.mark.slow
def test_a_training_that_is_continued_gives_the_same_bytes(tmp_path):
    def train(name, steps, *flags):
        work, output = tmp_path / name, tmp_path / f"{name}_{steps}"
        places = ("--work_dir", work, "--output_dir", output, "--steps", steps)
        return run_script("examples/train_arc_tiny.py", *places, *FLAGS, *flags), output

    (one, whole), (_, first) = train("a", 4), train("b", 2)
    assert one.returncode == 0, one.stderr
    assert [path.name for path in sorted(first.iterdir())] == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    two, continued = train("b", 4)
    assert "going on from step 2" in two.stdout
    # Of few steps the learning rate's course depends on their number, but not on a stop.
    three, again = train("c", 4)
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (whole / name).read_bytes() == (again / name).read_bytes()
    assert continued.exists() and three.returncode == 0
    log = [json.loads(line) for line in (tmp_path / "b" / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == [2, 4]

    other, _ = train("b", 6, "--seed", 7)
    assert other.returncode == 2 and "other settings: seed was 0, is 7" in other.stderr
    taken, _ = train("a", 4)
    assert taken.returncode == 2 and "a_4 exists: give another" in taken.stderr
    (tmp_path / "b" / "state.msgpack").write_bytes(b"torn")
    torn, _ = train("b", 6)
    assert torn.returncode == 2 and "state.msgpack is damaged" in torn.stderr
