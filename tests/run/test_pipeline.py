"""Launch, fetch and store side by side: order, bounds, failures, stopping."""

import threading
import time

import pytest

from utils.run.pipeline import MAX_ON_DEVICES, Pipeline


def finish(pipeline, seconds=10):
    deadline = time.monotonic() + seconds
    while not pipeline.wait(0.05):
        assert time.monotonic() < deadline


def test_every_job_is_stored_in_order():
    stored = []
    pipeline = Pipeline(
        range(20), lambda job: job * 10, lambda x: [x, x + 1], stored.extend, lambda result: 1
    )
    pipeline.start()
    finish(pipeline)
    assert stored == [x for job in range(20) for x in (job * 10, job * 10 + 1)]


def test_two_batches_are_on_the_devices_at_most():
    """The next one is launched before the last is fetched, and no third."""
    launched, fetching, most = [], threading.Event(), []

    def fetch(job):
        most.append(len(launched) - len(most))
        assert fetching.wait(10)
        return [job]

    pipeline = Pipeline(range(6), lambda job: launched.append(job) or job, fetch, list, int)
    pipeline.start()
    deadline = time.monotonic() + 10
    while len(launched) < MAX_ON_DEVICES:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.2)
    assert launched == [0, 1]
    fetching.set()
    finish(pipeline)
    assert launched == list(range(6)) and max(most) <= MAX_ON_DEVICES


def test_a_slow_disk_holds_the_devices_back_and_is_named():
    """What waits is bounded in bytes; the time that the devices waited is counted."""
    waiting, most = 0, 0
    lock = threading.Lock()

    def fetch(job):
        nonlocal waiting, most
        with lock:
            waiting += 1
            most = max(most, waiting)
        return [100]

    def store(results):
        nonlocal waiting
        time.sleep(0.05)
        with lock:
            waiting -= 1

    pipeline = Pipeline(range(10), int, fetch, store, lambda size: size, max_waiting_bytes=250)
    pipeline.start()
    finish(pipeline)
    assert most <= 3 and pipeline.disk_wait > 0.1


@pytest.mark.parametrize("stage", ["launch", "fetch", "store"])
def test_a_failure_in_a_thread_ends_the_run_with_its_cause(stage):
    def maybe(name, value):
        if name == stage and value == 3:
            raise RuntimeError(f"{name} broke")
        return value

    pipeline = Pipeline(
        range(10),
        lambda job: maybe("launch", job),
        lambda job: [maybe("fetch", job)],
        lambda results: maybe("store", results[0]),
        lambda result: 1,
    )
    pipeline.start()
    with pytest.raises(RuntimeError, match=f"{stage} broke"):
        finish(pipeline)
    assert pipeline.stop(5)


def test_stopping_ends_after_the_result_at_hand():
    stored, begun, release = [], threading.Event(), threading.Event()

    def store(results):
        begun.set()
        assert release.wait(10)
        stored.extend(results)

    pipeline = Pipeline(range(10), int, lambda job: [job], store, lambda result: 1)
    pipeline.start()
    assert begun.wait(10)
    assert not pipeline.stop(0.1)  # it is still storing
    release.set()
    assert pipeline.stop(10)
    assert stored == [0]
