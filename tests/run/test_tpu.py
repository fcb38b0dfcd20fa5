"""`--plan`: the real programs, compiled for TPU slices that are not here."""

import importlib.util
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from subprocess import DEVNULL, PIPE

import pytest
from conftest import ROOT, TINY, random_task, run_script
from forks import run_forked
from runs import planned

import distributed_inference_with_activations as script
from utils.cli import COMPILER_ALONE
from utils.plan.plan import plan_meshes
from utils.plan.request import Request
from utils.run import prices, tpu
from utils.run.prices import costs
from utils.run.roofline import collectives_of
from utils.run.tpu import SLICES

MULTIPLE = "ALLOW_MULTIPLE_LIBTPU_LOAD"
SCRIPT = "distributed_inference_with_activations.py"
needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="the TPU compiler is not installed: requirements-tpu.txt",
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A model with Qwen2-0.5B's heads, one layer, and tasks that fill a few batches."""
    from checkpoints import outline
    from tokenizers_for_tests import character_tokenizer

    folder = tmp_path_factory.mktemp("model")
    tokenizer = character_tokenizer()
    fields = {
        **TINY,
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 1,
        "num_attention_heads": 14,
        "max_position_embeddings": 4096,
    }
    (folder / "config.json").write_text(json.dumps(fields))
    outline(folder)
    tokenizer.save_pretrained(folder)
    rng = random.Random(0)
    made = {f"t{i}": random_task(rng, 3)[0] for i in range(96)}
    (folder / "tasks.json").write_text(json.dumps(made))
    return folder


def plan(inputs, name, *flags, code=0, run=run_forked):
    file = inputs / "plan.json"
    file.unlink(missing_ok=True)
    result = run(
        *(SCRIPT, "--model_path", inputs, "--dataset_path", inputs / "tasks.json"),
        *("--extract_activations", "--max_output_tokens", 64, "--plan", name),
        *("--plan_json", file, *flags),
        cwd=inputs,
        timeout=600,
    )
    assert result.returncode == code, result.stderr
    return json.loads(file.read_text()), result


@needs_compiler
def test_a_mesh_that_repeats_no_work(inputs):
    """8 x 8 with 14 heads against 64 x 1, the same batches: FLOPs, memory, collectives."""
    before = sorted(path.name for path in inputs.iterdir())
    flags = ("--mesh_shape", 8, 8, 64, 1, "--batch_size", 2)
    best, result = plan(inputs, "v5e-64", *flags)
    assert sorted({path.name for path in inputs.iterdir()} - {"plan.json"}) == before
    wide, flat = best["compared"]
    assert (wide["mesh_shape"], flat["mesh_shape"]) == ([8, 8], [64, 1])
    for p in (wide, flat):
        assert p["devices"] == 64 and p["fits"] and p["hbm_limit_bytes"] == 16 * 2**30
        assert 0 < p["hbm_bytes_per_device"] < p["hbm_limit_bytes"]
        assert p["num_samples"] == 96 and p["shards"] >= 1
        assert p["activation_bytes_total"] > p["num_tokens_total"] * 896 * 2
        assert p["estimated_hours"] > 0 and p["estimated_tokens_per_second"] > 0
        assert p["prefill"] == max(p["buckets"], key=lambda b: b["hbm_bytes"])["prefill"]
        assert sum(b["batches"] * b["rows"] for b in p["buckets"]) >= 96

    def flops(p):  # per computed token
        (bucket,), data = p["buckets"], p["mesh_shape"][0]
        return bucket["prefill"]["flops_per_device"] * 64 / (data * bucket["chunk"])

    assert flops(wide) < 1.05 * flops(flat)
    # 8 x 8 holds an eighth of the model, but for the norms
    assert wide["decode"]["argument_bytes"] < 0.2 * flat["decode"]["argument_bytes"]
    assert not flat["prefill"]["collectives"]
    assert set(wide["prefill"]["collectives"]) <= {
        "all-gather", "all-reduce", "all-to-all", "reduce-scatter", "collective-permute",
    }  # fmt: skip
    # nothing as large as the logits of all positions is moved, nor those of the batch in decoding
    bucket = max(wide["buckets"], key=lambda b: b["hbm_bytes"])
    assert wide["prefill"]["collective_bytes"] < bucket["chunk"] * 151936
    assert wide["decode"]["collective_bytes"] < bucket["rows"] / 8 * 151936
    assert "8x8" in result.stdout and "64x1" in result.stdout


@needs_compiler
def test_what_is_known_before_compiling_and_what_it_costs(inputs):
    """Three tasks in one batch, of which one program fills the cache and one decodes."""
    prices = ("--usd_per_chip_hour", 2, "--usd_per_gb_month", 0.5)
    flags = ("--mesh_shape", 8, 1, "--max_tasks", 3, "--layers_to_extract", 0)
    p, result = plan(inputs, "v5e-8", *flags, *prices, run=run_script)
    seen = p["prompt_tokens"]
    assert 0 < seen["min"] <= seen["p10"] <= seen["median"] <= seen["p90"] <= seen["max"]
    assert seen["max"] <= p["buckets"][0]["length"] and seen["skipped"] == 0
    assert result.stdout.startswith(f"prompt tokens min {seen['min']}, ")  # as soon as it is known
    assert p["programs"] == 2 and p["compile_seconds"] > 0
    (bucket,) = p["buckets"]
    assert p["prefill_seconds"] == bucket["prefill_seconds"]
    assert p["decode_seconds"] == pytest.approx(64 * bucket["decode_step_seconds"])
    assert p["usd"] == pytest.approx((p["prefill_seconds"] + p["decode_seconds"]) / 3600 * 8 * 2)
    assert p["storage"]["bytes_per_layer"] == p["num_tokens_total"] * 896 * 2
    assert p["storage"]["bytes_total"] == p["activation_bytes_total"]
    assert p["storage"]["usd_per_month"] == pytest.approx(p["activation_bytes_total"] / 2e9)
    assert "TPU" not in result.stderr and "WARNING" not in result.stderr


def test_costs_of_a_pass_and_of_a_month():
    """A hundred terabytes, and an hour of 64 chips: two dollars a chip, two cents a gigabyte."""
    stored = {"bytes_per_layer": 1, "bytes_total": 10**14}
    estimated = {"slice": "v5e-64", "devices": 64, "estimated_hours": 1.0, "storage": stored}
    found = costs(estimated, 2.0, 0.02)
    assert found["usd"] == 128 and found["storage"]["usd_per_month"] == pytest.approx(2000)
    assert found["passes_per_month_at_which_storing_pays"] == pytest.approx(2000 / 128)
    assert costs(estimated, None, None)["usd"] == pytest.approx(64 * 1.2)
    assert costs(estimated, None, None)["storage"]["usd_per_month"] == pytest.approx(2000)
    unknown = costs({**estimated, "estimated_hours": None}, None, None)
    assert unknown["usd"] is unknown["passes_per_month_at_which_storing_pays"] is None
    nothing = costs({**estimated, "storage": {**stored, "bytes_total": 0}}, None, None)
    assert nothing["passes_per_month_at_which_storing_pays"] is None
    assert costs(estimated, 0.0, 0.0)["usd"] == 0  # of what is given


def test_there_is_a_price_for_every_chip():
    assert set(prices.CHIP_HOUR) == set(tpu.CHIPS)


@pytest.mark.parametrize("price", ["-1", "nan", "inf", "two"])
@pytest.mark.parametrize("flag", ["--usd_per_chip_hour", "--usd_per_gb_month"])
def test_a_price_that_is_none(in_shell, flag, price):
    given = ["--model_path", "m", "--dataset_path", "d", "--plan", "v5e-8", f"{flag}={price}"]
    code, _, error = in_shell(script, given)
    assert code == 2 and error.startswith(f"error: argument {flag}: ") and error.count("\n") == 1


@pytest.mark.parametrize("flag", ["--usd_per_chip_hour", "--usd_per_gb_month"])
def test_a_price_without_a_plan(in_shell, flag):
    given = ["--model_path", "m", "--dataset_path", "d", flag, "1"]
    assert in_shell(script, given)[::2] == (2, f"error: {flag} needs --plan SLICE\n")


def test_prompts_that_do_not_fit_are_counted(tiny_model, tasks_file, tmp_path, capsys):
    flags = ["--max_output_tokens", 0]
    whole = planned(tiny_model, tasks_file, tmp_path, *flags)
    lengths = sorted(sample.length.prompt for sample in whole.samples)
    found = tpu.prompt_tokens(whole)
    assert (found["min"], found["max"], found["skipped"]) == (lengths[0], lengths[-1], 0)
    assert found["median"] == round(statistics.median(lengths))
    shortest = min(len(whole.codec.encode(s.task, s.sample_idx, 1).ids) for s in whole.samples)
    few = planned(tiny_model, tasks_file, tmp_path, *flags, "--max_model_len", shortest + 20)
    lost = len(whole.samples) - len(few.samples)
    assert lost > 0 and tpu.prompt_tokens(few)["skipped"] == lost
    tpu.print_prompts(few)
    said = capsys.readouterr().out
    assert f"skipped       {lost}: {lost} does not fit in {shortest + 20} tokens" in said


def test_tokens_of_all_predictions_count(tiny_model, tasks_file, tmp_path):
    """As in the tokens_per_second of a run; but only the first answer is stored."""
    flags = ["--max_output_tokens", 24, "--predictions_per_task", 3]
    made = planned(tiny_model, tasks_file, tmp_path, *flags)
    prompts = sum(sample.length.prompt for sample in made.samples)
    assert tpu.tokens_computed(made) == prompts + 8 * 3 * 24
    assert tpu.plan_storage(made)[0] == prompts + 8 * 24


@pytest.mark.parametrize(("number", "said"), [(5, True), (3, False)])
def test_fewer_rows_are_advised_where_they_are_allowed(tiny_model, tasks_file, number, said):
    """Four groups of devices need a row each: of eight rows there can be half, of four not."""
    flags = ["--model_path", tiny_model, "--dataset_path", tasks_file, "--mesh_shape", 4, 2]
    flags += ["--batch_size", 1, "--max_tasks", number, "--max_output_tokens", 8]
    request = Request.from_flags(script.build_parser().parse_args(list(map(str, flags))))
    (made,) = plan_meshes(request, [(4, 2)], writes=False)
    rows, length = len(made.batches[0].rows), max(s.length.total for s in made.samples)
    assert rows == (8 if said else 4)
    advice = " ".join(tpu._advice(made, {"rows": rows, "length": length}, 10**12))
    assert ("--max_batch_tokens" in advice) is said
    if said:
        tokens = int(advice.partition("--max_batch_tokens ")[2].partition(":")[0])
        lower = replace(request, max_batch_tokens=tokens)
        (fewer,) = plan_meshes(lower, [(4, 2)], writes=False)
        assert len(fewer.batches[0].rows) == 4


@needs_compiler
def test_a_slice_of_chips_with_two_cores(inputs):
    """v4-64 has 32 devices, and says so when asked for 64."""
    p, _ = plan(inputs, "v4-64", "--mesh_shape", 8, 4, "--max_output_tokens", 0)
    assert (p["devices"], p["mesh_shape"]) == (32, [8, 4])
    result = run_script(
        *(SCRIPT, "--model_path", inputs, "--dataset_path", inputs / "tasks.json"),
        *("--extract_activations", "--plan", "v4-64", "--mesh_shape", 8, 8),
    )
    assert result.returncode == 2
    error = result.stderr.strip().splitlines()[-1]
    assert "takes 64 devices, and JAX sees 32" in error and "two" in error and "8 4" in error


@needs_compiler
def test_planning_while_another_process_holds_the_tpu_library():
    """The library locks a file of the machine, which a training on its TPU would hold too."""
    hold = """
from jax.experimental import topologies
topologies.get_topology_desc("v5e:2x2", "tpu")
print("held", flush=True)
input()
"""
    ask = "from utils.run.tpu import slice_devices; print(len(slice_devices('v5e-4')))"
    lone = {**os.environ, **COMPILER_ALONE}
    lone.pop(MULTIPLE, None)
    with subprocess.Popen(
        [sys.executable, "-c", hold], env=lone, text=True, stdin=PIPE, stdout=PIPE, stderr=DEVNULL
    ) as holder:
        holder.stdout.readline()  # empty where one outside of this test holds it already
        found = subprocess.run(
            [sys.executable, "-c", ask], cwd=ROOT, capture_output=True, text=True
        )
        holder.communicate("\n")
    assert found.stdout == "4\n", found.stderr


@needs_compiler
@pytest.mark.parametrize(
    ("stop", "code"),
    [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)],
)
def test_a_signal_ends_a_plan_that_compiles(inputs, stop, code):
    """Within 20 seconds, in the compiler's C++ code, and whatever handlers libtpu installs."""
    compiling = """
import sys
import jax
from utils import cli
from distributed_inference_with_activations import build_parser, main

def said(event, seconds, **facts):
    if facts.get("fun_name") == "jit(prefill)" and event.endswith("to_mlir_module_duration"):
        print("lowered", flush=True)  # what follows is the compiler's

jax.monitoring.register_event_duration_secs_listener(said)
cli.run(main, build_parser())
"""
    flags = ("--model_path", inputs, "--dataset_path", inputs / "tasks.json", "--max_tasks", "2")
    with subprocess.Popen(
        [sys.executable, "-c", compiling, *flags, "--extract_activations", "--plan", "v5e-8"],
        **{"cwd": ROOT, "text": True, "stdout": PIPE, "stderr": PIPE},
    ) as planning:
        assert "lowered\n" in iter(planning.stdout.readline, "")
        time.sleep(2)
        planning.send_signal(stop)
        start = time.monotonic()
        _, error = planning.communicate()
        assert time.monotonic() - start < 20
    assert planning.returncode == code, error
    assert error.splitlines()[-1] == f"stopped by {stop.name}; what was written is intact"
    assert "stack trace" not in error


@needs_compiler
def test_no_program_is_kept_that_cannot_be_read_back(tmp_path):
    """A second plan of the same run would warn that its program is unreadable."""
    compile_one = """
import jax
from utils.run.tpu import slice_devices
on = jax.sharding.SingleDeviceSharding(slice_devices("v5e-4")[0])
jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((8,), "float32", sharding=on)).compile()
"""
    kept = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "programs")}
    done = subprocess.run(
        [sys.executable, "-c", compile_one],
        cwd=ROOT,
        env={**os.environ, **kept},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())


def test_names_of_slices():
    assert {"v4-8", "v4-16", "v4-32", "v4-64", "v5e-8", "v5e-64", "v5e-256"} < set(SLICES)
    assert SLICES["v4-64"] == "v4:2x4x4" and SLICES["v5e-64"] == "v5e:8x8"


def test_without_the_compiler_one_line_says_so(inputs):
    if importlib.util.find_spec("libtpu") is not None:
        pytest.skip("the TPU compiler is installed")
    result = run_script(
        *(SCRIPT, "--model_path", inputs, "--dataset_path", inputs / "tasks.json"),
        *("--extract_activations", "--plan", "v4-64"),
    )
    line = 'error: --plan needs the TPU compiler: pip install "jax[tpu]" (no TPU is needed)\n'
    assert (result.returncode, result.stderr) == (2, line)


def test_collectives_are_counted_once():
    """An overlapped one stands in several computations, under one channel."""
    hlo = """
      a = bf16[8,2]{1,0} all-gather(b), channel_id=1, dimensions={0}
      c = bf16[8,2]{1,0} all-gather(d), channel_id=1, dimensions={0}
      e = (f32[4], s32[]) all-reduce-start(f), channel_id=2
      g = f32[4] all-reduce-done(e)
    """
    assert collectives_of(hlo) == ({"all-gather": 1, "all-reduce": 1}, 32 + 16 + 4)
