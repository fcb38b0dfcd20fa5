"""The benchmarks run; what they measure is for a quiet machine, not for a test."""

import pytest
from conftest import run_script


@pytest.mark.slow
def test_compare_transformers(tiny_model, tasks_file):
    pytest.importorskip("torch", reason="torch is not installed: requirements-torch.txt")
    flags = ["--tasks", 4, "--max_model_len", 700, "--new_tokens", 4, "--repeats", 1]
    result = run_script(
        *("benchmarks/compare_transformers.py", "--model_path", tiny_model),
        *("--dataset_path", tasks_file, *flags),
    )
    assert result.returncode == 0, result.stderr
    for words in ("teacher-forced", "batch 1", "batch 4", "cost of extraction", "no logits"):
        assert words in result.stdout


@pytest.mark.slow
def test_transform_rows():
    result = run_script("benchmarks/transform_rows.py", "--num_rows", 500)
    assert result.returncode == 0, result.stderr
    assert "rows/s" in result.stdout


@pytest.mark.slow
def test_overlap(tiny_model, tasks_file):
    result = run_script(
        *("benchmarks/overlap.py", "--model_path", tiny_model, "--dataset_path", tasks_file),
        *("--new_tokens", 4, "--repeats", 1, "--max_model_len", 700, "--batch_size", 1),
    )
    assert result.returncode == 0, result.stderr
    for words in ("cost of extraction", "device idle"):
        assert words in result.stdout


@pytest.mark.slow
def test_upload_overhead(tiny_model, tasks_file):
    result = run_script(
        *("benchmarks/upload_overhead.py", "--model_path", tiny_model),
        *("--dataset_path", tasks_file, "--layers", 0, "--repeats", 1),
    )
    assert result.returncode == 0, result.stderr
    for words in ("cost in time", "memory, 100 MB", "memory,   8 MB"):
        assert words in result.stdout


@pytest.mark.slow
def test_loader_speed():
    result = run_script(
        *("benchmarks/loader_speed.py", "--gigabytes", 0.05, "--width", 64, "--repeats", 1),
        *("--shuffle_buffer", 10_000),
    )
    assert result.returncode == 0, result.stderr
    for words in ("no more", "in order", "shuffled", "output cells alone"):
        assert words in result.stdout


@pytest.mark.slow
def test_arc_tiny_accuracy():
    flags = ["--num_tasks", 32, "--augmentations", 2]
    result = run_script("benchmarks/arc_tiny_accuracy.py", *flags)
    assert result.returncode == 0, result.stderr
    assert "| family | tasks | one attempt | two attempts | two voted of 2 views |" in result.stdout
    assert "| **all** | 32 |" in result.stdout
