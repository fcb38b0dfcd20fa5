"""Tokens/s of extraction, side by side with what one would run instead, in one process.

    python benchmarks/compare_transformers.py --tokenizer FOLDER

The model is a random checkpoint of Qwen2-0.5B's shape, or --model_path. The tasks are made: their
prompts have about as many tokens as --lengths says. Needs requirements-torch.txt. Both sides use
float32, the same token ids, and keep the same arrays: for every token the residual stream after the
first, the middle and the last layer, as float16; the log-probability of every answer token; the
logits at the last prompt position. Neither writes them to a disk. Our side is the run as its users
get it: passes are launched in one thread and fetched in another, while those before them are made
into items. torch is given the number of threads that is faster for it. All run in turns, and every
figure is the best of --repeats, compilation left out. Beside it stands the share of the machine's
matrix-product rate that a prefill's arithmetic amounts to, or the share of its memory rate at which
a decoding step reads the parameters.
"""

import argparse
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import bench
from utils import cli
from utils.errors import UserError


def build_parser() -> cli.Parser:
    parser = bench.build_parser(__doc__)
    parser.add_argument("--model_path", help="a checkpoint (default: random, Qwen2-0.5B's shape)")
    parser.add_argument("--tokenizer", help="folder with the tokenizer for a random checkpoint")
    parser.add_argument(
        "--lengths",
        nargs="+",
        type=cli.int_at_least(64),
        default=[500, 2000, 8000],
        help="tokens of a prompt that is extracted",
    )
    parser.add_argument(
        "--tokens", type=cli.int_at_least(64), default=8000, help="tokens extracted of each length"
    )
    parser.add_argument(
        "--prompt", type=cli.int_at_least(64), default=500, help="tokens of a prompt to continue"
    )
    parser.add_argument(
        "--new_tokens", type=cli.int_at_least(1), default=128, help="tokens generated a row"
    )
    parser.add_argument("--repeats", type=cli.int_at_least(1), default=3, help="best of so many")
    return parser


def alternate(repeats: int, *functions) -> list[float]:
    """Seconds of the fastest call of each, after one that is not counted. They are called in turns,
    so that a busy spell of the machine meets all."""
    times = [[] for _ in functions]
    for _ in range(repeats + 1):
        for function, seconds in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - start)
    return [min(seconds[1:]) for seconds in times]


def best(function, repeats: int) -> float:
    return alternate(repeats, function)[0]


def requests(args: argparse.Namespace, model_path: Path, tasks: Path, **changes):
    """The plan of our run over these tasks, in which no token ends an answer."""
    import simple_extraction_inference as script
    from utils.plan.plan import plan_run
    from utils.plan.request import Request

    flags = {
        "model_path": model_path,
        "dataset_path": tasks,
        "dtype": "float32",
        "max_output_tokens": args.new_tokens,
        **changes,
    }
    argv = []
    for name, value in flags.items():
        argv += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    plan = plan_run(Request.from_flags(script.build_parser().parse_args(argv)))
    return replace(plan, codec=replace(plan.codec, stop_ids=()))


def ours(plan):
    """A call that computes every batch of the run and makes its items, nothing stored."""
    from utils.run.compute import Computation
    from utils.run.pipeline import pipelined
    from utils.run.result import to_item
    from utils.shards.items import stored_item

    computation = Computation(plan)
    computation.compile(plan.batches)

    def run() -> None:
        jobs, stages = computation.passes(plan.batches), (computation.launch, computation.fetch)
        for results in pipelined(jobs, *stages, lambda: None):
            for result in results:
                stored_item(to_item(result, plan)[0], "float16")

    return run


def captured_layers(plan) -> list[int]:
    return sorted(int(name.rpartition(".")[2]) for name in plan.capture.names)


def torch_loop(model, plan, answer_logits_only: bool):
    """What a user writes with transformers: all hidden states, and the three layers kept."""
    import torch

    encoded = [plan.encode(sample) for sample in plan.samples]
    layers = captured_layers(plan)

    kept = []

    @torch.no_grad()
    def run():
        for sample in encoded:
            P, A = sample.prompt_length, len(sample.ids) - sample.prompt_length
            ids = torch.tensor(sample.ids, dtype=torch.long)
            keep = {"logits_to_keep": A + 1} if answer_logits_only else {}
            out = model(ids[None], output_hidden_states=True, use_cache=False, **keep)
            states = [out.hidden_states[layer + 1][0].half().numpy() for layer in layers]
            logits = out.logits[0, -(A + 1) :]
            logprobs = torch.log_softmax(logits[:-1].float(), -1).gather(-1, ids[P:, None])
            kept.append((states, logprobs.numpy(), logits[0].half().numpy()))
            kept.clear()  # as if written

    return run


def torch_generate(model, plan, batch_size: int, new_tokens: int):
    """`generate` on left-padded batches with the hidden states of every step."""
    import torch

    rows = sorted((plan.encode(s).ids for s in plan.samples), key=len, reverse=True)
    layers = captured_layers(plan)
    model.generation_config.eos_token_id = None  # no token ends an answer

    @torch.no_grad()
    def run():
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            width = max(map(len, batch))
            ids = torch.zeros(len(batch), width, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, prompt in enumerate(batch):
                ids[row, width - len(prompt) :] = torch.tensor(prompt, dtype=torch.long)
                mask[row, width - len(prompt) :] = 1
            out = model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
                output_hidden_states=True,
                output_logits=True,
                return_dict_in_generate=True,
            )
            for layer in layers:
                states = [step[layer + 1] for step in out.hidden_states]
                torch.cat(states, dim=1).half().numpy()
            logits = torch.stack(out.logits, 1).float()
            new = out.sequences[:, width:]
            torch.log_softmax(logits, -1).gather(-1, new[..., None])

    return run


def matmul_rate(repeats: int) -> float:
    """FLOP/s of a float32 matrix product of the MLP's shape, the faster of JAX and torch."""
    import jax
    import jax.numpy as jnp
    import torch

    rng = jax.random.key(0)
    x, w = jax.random.normal(rng, (1024, 896)), jax.random.normal(rng, (896, 4864))
    product = jax.jit(jnp.matmul)
    a, b = torch.randn(1024, 896), torch.randn(4864, 896)
    flops = 2 * 1024 * 896 * 4864
    times = (
        best(lambda: product(x, w).block_until_ready(), repeats),
        best(lambda: torch.nn.functional.linear(a, b), repeats),
    )
    return flops / min(times)


def prefill_flops(plan, layers: int, with_head: bool) -> float:
    """Arithmetic that the samples need, padding left out: projections, MLP, causal attention."""
    c = plan.config
    D, F, N, K, H = (
        c.hidden_size,
        c.intermediate_size,
        c.num_heads,
        c.num_kv_heads,
        c.head_dim,
    )
    per_token = 2 * D * H * (2 * N + 2 * K) + 6 * D * F
    total = 0.0
    for sample in plan.samples:
        T, A = sample.length.total, sample.length.answer
        total += layers * (T * per_token + 2 * T * T * N * H)
        total += 2 * D * c.vocab_size * (A + 1) if with_head else 0
    return total


def report(name: str, tokens: int, mine: float, others: dict[str, float], limit: str) -> None:
    print(f"{name}: {tokens / mine:.1f} tokens/s, {limit}", flush=True)
    for other, seconds in others.items():
        print(f"    {other}: {tokens / seconds:.1f} tokens/s, ratio {seconds / mine:.2f}")


def main(args: argparse.Namespace, signals: cli.Signals) -> None:
    tiny = {"lengths": [120], "tokens": 400, "prompt": 100, "new_tokens": 4, "repeats": 1}
    with bench.scratch(args, **tiny) as scratch:
        model_path = Path(args.model_path or random_model(scratch / "model", args.tokenizer))
        measure(args, model_path, scratch)


def random_model(folder: Path, tokenizer: str | None) -> Path:
    from checkpoints import write_random_checkpoint

    from benchmarks.shapes import QWEN2_0_5B

    if not tokenizer:
        raise UserError("a random checkpoint needs --tokenizer, or give --model_path")
    folder.mkdir()
    write_random_checkpoint(folder, QWEN2_0_5B)
    for file in Path(tokenizer).iterdir():
        shutil.copy(file, folder)
    return folder


def threads(function, repeats: int) -> int:
    """The number of torch's threads with which a function is fastest."""
    import torch

    times = {}
    for count in (torch.get_num_threads(), 1):
        torch.set_num_threads(count)
        times[count] = best(function, repeats)
    fastest = min(times, key=times.get)
    torch.set_num_threads(fastest)
    return fastest


def memory_rate(repeats: int) -> float:
    """Bytes/s at which all cores together read an array that no cache holds."""
    import torch

    values = torch.ones(1 << 27)
    return values.nbytes / best(lambda: values.sum(), repeats)


def measure(args: argparse.Namespace, folder: Path, scratch: Path) -> None:
    to_continue = bench.write_tasks(scratch / "generate", 4 * [args.prompt])
    requests(args, folder, to_continue)  # refuses a wrong --model_path in a line

    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.eval()
    if args.smoke:  # on a busy machine torch's threads wait for one another
        torch.set_num_threads(1)
    rate, memory = matmul_rate(1 if args.smoke else 20), memory_rate(1 if args.smoke else 5)
    print(bench.processor())
    print(f"matrix product, float32: {rate / 1e9:.0f} GFLOP/s; reading: {memory / 1e9:.1f} GB/s")

    count = None
    for length in args.lengths:
        rows = max(1, round(args.tokens / length))
        tasks = bench.write_tasks(scratch / f"extract{length}", rows * [length])
        forced = requests(args, folder, tasks, teacher_forcing=True)
        tokens = sum(sample.length.total for sample in forced.samples)
        flops = prefill_flops(forced, forced.config.num_layers, True)
        theirs = torch_loop(model, forced, False)
        count = count or (1 if args.smoke else threads(theirs, 1))
        sides = ours(forced), theirs, torch_loop(model, forced, True)
        mine, stock, tuned = alternate(args.repeats, *sides)
        report(
            f"teacher-forced extraction of {tokens // len(forced.samples)} tokens",
            tokens,
            mine,
            {f"transformers loop, {count} threads": stock, "with logits_to_keep": tuned},
            f"{flops / mine / rate:.0%} of the matrix-product rate",
        )

    for batch_size in (1, 4):
        run = requests(args, folder, to_continue, batch_size=batch_size)
        plain = requests(args, folder, to_continue, batch_size=batch_size, no_extraction=True)
        prompts = requests(args, folder, to_continue, batch_size=batch_size, max_output_tokens=0)
        new = len(run.samples) * args.new_tokens
        theirs = torch_generate(model, run, batch_size, args.new_tokens)
        count = 1 if args.smoke else threads(theirs, 1)
        mine, other, without = alternate(args.repeats, ours(run), theirs, ours(plain))
        step = (mine - best(ours(prompts), args.repeats)) * batch_size / new
        read = 4 * sum(parameter.numel() for parameter in model.parameters())
        report(
            f"generation of {args.new_tokens} tokens with capture, batch {batch_size}",
            new,
            mine,
            {f"transformers generate, {count} threads": other},
            f"a step of {step * 1e3:.0f} ms reads the parameters at {read / step / memory:.0%} of "
            "the memory rate",
        )
        print(f"    cost of extraction: {mine / without - 1:+.1%}", flush=True)


if __name__ == "__main__":
    cli.run(main, build_parser())
