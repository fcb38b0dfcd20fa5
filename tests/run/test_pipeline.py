"""Launch and fetch beside storing: order, bounds, failures, stopping."""

import threading
import time

import numpy as np
import pytest

from utils.run import pipeline as module
from utils.run.pipeline import MAX_ON_DEVICES, pipelined


def pipeline_of(jobs, launch=int, fetch=lambda job: [job], check=int):
    return pipelined(range(jobs), launch, lambda job: list(np.int64(fetch(job))), check)


def test_every_job_is_given_in_order():
    pipeline = pipeline_of(20, lambda job: job * 10, lambda x: [x, x + 1])
    assert list(pipeline) == [[job * 10, job * 10 + 1] for job in range(20)]


def test_two_batches_are_on_the_devices_at_most():
    """The next one is launched before the last is fetched, and no third."""
    launched, fetching, most = [], threading.Event(), []

    def fetch(job):
        most.append(len(launched) - len(most))
        assert fetching.wait(10)
        return [job]

    def check():
        if len(launched) == MAX_ON_DEVICES and not fetching.is_set():
            time.sleep(0.2)
            assert launched == [0, 1]
            fetching.set()

    pipeline = pipeline_of(6, lambda job: launched.append(job) or job, fetch, check=check)
    assert list(pipeline) == [[job] for job in range(6)]
    assert launched == list(range(6)) and max(most) <= MAX_ON_DEVICES


def test_a_slow_disk_holds_the_devices_back_and_is_named(monkeypatch):
    """What waits is bounded in bytes; the time that the devices waited is counted."""
    waiting, most = 0, 0
    lock = threading.Lock()

    def fetch(job):
        nonlocal waiting, most
        with lock:
            waiting += 1
            most = max(most, waiting)
        return [100]

    monkeypatch.setattr(module, "MAX_WAITING_BYTES", 20)
    pipeline = pipeline_of(10, int, fetch)  # of 8 bytes each
    for _ in pipeline:
        time.sleep(0.05)
        with lock:
            waiting -= 1
    assert most <= 3 and pipeline.waited > 0.1


@pytest.mark.parametrize("stage", ["launch", "fetch", "check"])
def test_a_failure_anywhere_ends_the_iteration_with_its_cause(stage):
    given = []

    def maybe(name, value):
        if name == stage and value == 3:
            raise RuntimeError(f"{name} broke")
        return value

    pipeline = pipeline_of(
        10,
        lambda job: maybe("launch", job),
        lambda job: [maybe("fetch", job)],
        check=lambda: maybe("check", len(given)),
    )
    with pytest.raises(RuntimeError, match=f"{stage} broke"):
        for results in pipeline:
            given += results
    assert given == [0, 1, 2]


def test_a_caller_that_leaves_ends_the_threads():
    threads, launched = threading.active_count(), []
    pipeline = pipeline_of(1000, lambda job: launched.append(job) or job)
    for results in pipeline:
        if results == [3]:
            break
    deadline = time.monotonic() + 10
    while threading.active_count() > threads:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert len(launched) < 1000
