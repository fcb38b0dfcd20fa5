"""Runs that no model computes, for tests that ask about folders, buckets, signals and processes,
and not about numbers.
"""

import time
import zlib

import google.cloud.storage  # noqa: F401
import jax.experimental.multihost_utils  # noqa: F401
import numpy as np
import tokenizers  # noqa: F401
import transformers.tokenization_utils_fast  # noqa: F401

import distributed_inference_with_activations  # noqa: F401 (before a process is forked, as below)
from utils.plan.plan import Plan
from utils.prompt.codec import Encoded
from utils.run import loop
from utils.run.compute import Pass, Usage
from utils.run.result import Result


class FakeComputation:
    """Stands in for `utils.run.compute.Computation` where only folders and buckets matter.

    Numbers are made from the sample's key: the same in every run and whatever the batches are. A
    generated answer holds no grid, as those of a random model. Nothing is compiled or loaded, and
    no process waits for another. seconds: that a pass takes.
    """

    seconds = 0.0

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
        time.sleep(self.seconds)
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


def from_now_on(seconds: float) -> None:
    """No run of this process is computed by a model any more."""
    FakeComputation.seconds = seconds
    loop.Computation = FakeComputation
