"""Runs in the test's own process: planned, computed by the model or by one that only pretends."""

import zlib
from unittest import mock

import numpy as np
from conftest import NoSignals, words

import simple_extraction_inference as script
from utils.plan.plan import Plan, plan_run
from utils.plan.request import Request
from utils.prompt.codec import Encoded
from utils.run.compute import Pass, Usage
from utils.run.loop import run
from utils.run.result import Result


class FakeComputation:
    """Stands in for `utils.run.compute.Computation` where only folders and buckets matter.

    Numbers are made from the sample's key: the same in every run and whatever the batches are. A
    generated answer holds no grid, as those of a random model. Nothing is compiled or loaded.
    """

    def __init__(self, plan: Plan):
        self.plan = plan
        self.usage = Usage()
        self.compile_seconds = 0.0

    def compile(self, batches) -> None:
        pass

    def passes(self, batches) -> list[Pass]:
        return [Pass(batch, first=True, last=True) for batch in batches]

    def launch(self, job) -> list[Result]:
        plan, batch = self.plan, job.batch
        owned = [b for held in plan.layout.owned(len(batch.rows)).values() for b in held]
        samples = [plan.samples[batch.rows[b]] for b in owned if batch.rows[b] >= 0]
        self.usage.prefill += batch.shape.chunk * len(owned)
        results = [self._result(sample, plan.encode(sample)) for sample in samples]
        self.usage.prefill_useful += sum(len(result.encoded.ids) for result in results)
        return results

    def fetch(self, launched: list[Result]) -> list[Result]:
        return launched

    def _result(self, sample, encoded: Encoded) -> Result:
        plan, request, P = self.plan, self.plan.request, encoded.prompt_length
        rng = np.random.default_rng(zlib.crc32(repr(sample.key).encode()))
        answers, lengths = [], [len(encoded.ids) - P] if len(encoded.ids) > P else []
        if request.generates:
            ids = plan.codec.tokenizer.encode("no grid here", add_special_tokens=False)
            ids = np.array(ids[: request.max_output_tokens], np.int32)
            answers = [ids for _ in request.temperatures]
            lengths = [len(answer) for answer in answers]
        kept = len(plan.capture.rows(P, lengths[0] if lengths else 0))
        width, logits = plan.config.hidden_size, None
        if request.activations_dir is not None and not request.no_logits:
            logits = rng.standard_normal((1, plan.config.vocab_size), np.float32)
        return Result(
            sample=sample,
            encoded=encoded,
            answers=answers,
            logprobs=[-rng.random(length, np.float32) for length in lengths],
            captures={
                name: rng.standard_normal((kept, width), np.float32) for name in plan.capture.names
            },
            logits=logits,
        )


def pretending():
    """A context in which runs of this process are computed by `FakeComputation`."""
    return mock.patch("utils.run.loop.Computation", FakeComputation)


def planned(model, tasks, folder, *flags) -> Plan:
    argv = ["--model_path", model, "--dataset_path", tasks, "--dtype", "float32"]
    argv += ["--output_path", folder / "predictions.json", "--activations_dir", folder / "acts"]
    return plan_run(
        Request.from_flags(script.build_parser().parse_args([*map(str, argv), *map(str, flags)]))
    )


def extracted(folder, model, tasks, **more):
    """The shards of a pretended run, in a folder of `folder`: three layers, two samples a shard."""
    flags = {
        "model_path": model,
        "dataset_path": tasks,
        "output_path": folder / "predictions.json",
        "activations_dir": folder / "activations",
        "max_output_tokens": 6,
        "save_every_n_samples": 2,
        "layers_to_extract": [0, 2, 3],
        **more,
    }
    with pretending():
        request = Request.from_flags(script.build_parser().parse_args(words(flags)))
        run(plan_run(request), NoSignals())
    return folder / "activations"


def sorted_rows(rows):
    rows = np.asarray(rows, np.float32)
    return rows[np.lexsort(rows.T)]
