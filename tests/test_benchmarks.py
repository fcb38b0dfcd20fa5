"""Every benchmark runs from its first line to its last; what it measures is for a quiet machine."""

import importlib.util

import pytest
from conftest import ROOT, run_script
from forks import run_forked
from tiny import write_model

from benchmarks import bench, compare_transformers

SAID = {  # by each benchmark, so that a run which measures nothing does not pass
    "arc_tiny_accuracy": (
        "| family | tasks | one attempt | two attempts | two voted of 2 views |",
    ),
    "causal_hits": ("| family | tasks | cells | chance | layer 0 |", "| **all** | 2 |"),
    "compare_sae_training": ("| topk |", "| batchtopk |", "| jumprelu |", "SAELens"),
    "compare_saelens": ("ours:", "SAELens"),
    "compare_transformers": (
        *("GFLOP/s", "teacher-forced", "batch 1", "batch 4", "cost of extraction"),
        "of the memory rate",
    ),
    "first_sample": ("| this checkout | compiled |", "| this checkout | from the cache |"),
    "loader_speed": ("no more", "in order", "shuffled", "output cells alone"),
    "loading": ("| bfloat16 | ", "an adapter | ", "nf4, nested | ", "fp8, blocks | "),
    "overlap": ("cost of extraction", "device idle"),
    "plan_table": ("| Qwen2-0.5B | v5e-4 | ",),
    "transform_rows": ("rows/s",),
    "upload_overhead": ("cost in time", "memory, 100 MB", "memory,   8 MB"),
}
NEEDS = {  # and where it is absent
    "compare_transformers": ("torch", "requirements-torch.txt"),
    "plan_table": ("libtpu", "requirements-tpu.txt"),
}


def test_every_benchmark_is_run():
    scripts = {
        path.stem for path in (ROOT / "benchmarks").glob("*.py") if "__main__" in path.read_text()
    }
    assert scripts == set(SAID)


@pytest.mark.parametrize("name", SAID)
def test_it_starts_from_anywhere_and_explains_itself(name, tmp_path):
    """As a script of its own, which finds the project by itself."""
    result = run_script(f"benchmarks/{name}.py", "--help", cwd=tmp_path)
    assert result.returncode == 0 and "--smoke" in result.stdout, result.stderr


@pytest.mark.parametrize("name", SAID)
def test_it_runs_on_inputs_of_its_own(name, tmp_path):
    package, requirements = NEEDS.get(name, ("pytest", ""))
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: {requirements}")
    # Elsewhere than in the checkout: it needs no file of the folder that it is called from.
    result = run_forked(
        f"benchmarks/{name}.py", "--smoke", cwd=tmp_path, timeout=240, in_haste=True
    )
    assert result.returncode == 0, result.stderr
    for words in SAID[name]:
        assert words in result.stdout
    assert not list(tmp_path.iterdir())


def test_answers_that_are_timed_beside_transformers_have_all_their_tokens(tmp_path):
    args = compare_transformers.build_parser().parse_args(["--new_tokens", "4"])
    tasks = bench.write_tasks(tmp_path / "tasks", [100])
    plan = compare_transformers.requests(args, write_model(tmp_path / "model"), tasks)
    assert plan.codec.stop_ids == () and plan.request.max_output_tokens == 4


def test_a_wrong_model_beside_transformers_is_one_line(tmp_path, in_shell):
    code, _, err = in_shell(compare_transformers, ["--model_path", tmp_path / "none"])
    assert code == 2 and "none is not a folder" in err and err.count("\n") == 1


def test_what_is_compared_takes_turns():
    called = []
    functions = [lambda name=name: called.append(name) for name in "abc"]
    assert len(compare_transformers.alternate(2, *functions)) == 3
    assert called == [*"abcabcabc"]  # the first turn is not counted
