"""The model's side of a run: what is launched before what is compiled."""

import json
import random
import threading
import time
from concurrent.futures import Future, wait
from types import SimpleNamespace

import pytest
from runs import planned
from tiny import random_task

from utils.model.engine import Engine
from utils.run.compute import Computation, _sample_key


def test_every_answer_draws_its_own():
    """For ever: a run may be resumed years later."""
    samples = [SimpleNamespace(key=key) for key in (("a", 0), ("a", 1), ("a", 0, 1), ("b", 0))]
    keys = [_sample_key(seed, s, k) for seed in (0, 1) for s in samples for k in (0, 1)]
    assert len(set(keys)) == 16 and keys[:2] == [2352026522, 4214629132]


@pytest.fixture
def plan(tiny_model, tmp_path):
    """Of two cache sizes: a large prompt, and four small ones that one batch holds."""
    rng = random.Random(0)
    sizes = {"large": 12, **{f"small{i}": 2 for i in range(4)}}
    tasks = {name: random_task(rng, 2, side=side)[0] for name, side in sizes.items()}
    (tmp_path / "tasks.json").write_text(json.dumps(tasks))
    flags = ["--max_output_tokens", 4, "--prompt_format", "compact", "--max_batch_tokens", 2048]
    return planned(tiny_model, tmp_path / "tasks.json", tmp_path, "--batch_size", 4, *flags)


def test_the_first_batch_waits_for_its_own_programs_alone(plan, monkeypatch):
    first, *_, last = plan.batches
    assert first.shape.slots > last.shape.slots
    compiled, may_go_on = [], threading.Event()
    lower = Engine.lower_decode

    def lower_decode(engine, shape):
        if shape == last.shape:
            assert may_go_on.wait(60)
        compiled.append(shape)
        return lower(engine, shape)

    monkeypatch.setattr(Engine, "lower_decode", lower_decode)
    computation = Computation(plan)
    computation.compile(plan.batches)
    waited = computation.compile_seconds
    assert compiled == [first.shape] and waited > 0
    jobs = computation.passes(plan.batches)
    results = []
    for job in jobs:
        if job.batch == last and job.first:
            assert [result.sample.key[0] for result in results] == ["large"]
            assert computation.compile_seconds - waited < 0.1
            threading.Timer(0.5, may_go_on.set).start()
        results += computation.fetch(computation.launch(job))
    assert compiled == [first.shape, last.shape]
    assert computation.compile_seconds - waited > 0.4  # what it waited counts as compiling
    assert len(results) == 5


@pytest.mark.parametrize("fetched", [True, False])
def test_what_is_compiled_while_the_devices_compute_takes_no_time(plan, fetched):
    """Of a wait for programs, what follows the end of the last pass counts as compiling alone."""
    computation = Computation(plan)
    computation.compile(plan.batches)
    passes = computation.passes(plan.batches)
    number = next(i for i, job in enumerate(passes) if i and job.first)
    launched = [computation.launch(job) for job in passes[:number]]
    for programs in computation._compiling.values():
        wait(programs)
    slow = Future()
    threading.Timer(0.5, slow.set_result, (None,)).start()
    computation._compiling[passes[number].batch.shape] = [slow]
    if fetched:
        threading.Timer(0.2, lambda: list(map(computation.fetch, launched))).start()
    before, start = computation.compile_seconds, time.perf_counter()
    computation.launch(passes[number])
    waited = time.perf_counter() - start
    assert waited > 0.4
    assert fetched is (0 < computation.compile_seconds - before < waited - 0.15)
    assert fetched or computation.compile_seconds == before


def test_what_cannot_be_compiled_ends_the_run(plan, monkeypatch):
    last = plan.batches[-1]
    lower = Engine.lower_prefill

    def lower_prefill(engine, shape):
        if shape == last.shape:
            raise ValueError("too large")
        return lower(engine, shape)

    monkeypatch.setattr(Engine, "lower_prefill", lower_prefill)
    computation = Computation(plan)
    computation.compile(plan.batches)
    jobs = computation.passes(plan.batches)
    with pytest.raises(ValueError, match="too large"):
        for job in jobs:
            computation.launch(job)
    assert job.batch.shape == last.shape
