"""Which cells of a puzzle each cell of its answer hangs on, layer by layer.

    python examples/causal_map.py --model_path examples/arc_tiny --prompt_format compact \\
        --dataset_path arc_data/arc_format_train.json --task TASK --layers all --output causes

The model reads the puzzle and its true answer. Then the hidden states of one cell of the puzzle are
changed at one layer, and what follows is computed again: how much less likely has each cell of the
answer become? That is asked for every cell and every layer (activation patching, as in Vig et al.
2020 and Meng et al. 2022). OUTPUT/causal_map.json holds the numbers, OUTPUT/causal_map.html a page
in which one points at a cell of the answer and sees what it hangs on.
"""

# T tokens   C tokens of a chunk   W width   L layers   S source cells   A cells of the answer
# P data groups, each of which tries another change

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from utils import cli
from utils.errors import UserError
from utils.model.capture import HOOK_POINTS
from utils.plan.request import Request
from utils.store.local import check_writable, new_folder, write_json, writing

if TYPE_CHECKING:
    from utils.model.generate import Chunk, Shape
    from utils.plan.plan import Plan
    from utils.plan.samples import Sample
    from utils.prompt.codec import Encoded

OPS = ("zero", "mean", "patch")
FLAGS = (
    *("model_path", "dataset_path", "adapter", "solutions_path"),
    *("dtype", "prompt_format", "grid_encoding", "max_train_pairs", "max_model_len"),
)


@dataclass(frozen=True, eq=False)
class CausalMap:
    """What each cell of an answer hangs on.

    sources: int [S, 4], pair, role, row and column of the cells that were changed; targets: int
    [A, 2], row and column of those of the answer. before: float64 [A], log p of the true answer's
    cell, in nats, summed over its tokens. effect: float32 [L, S, A], the same with the states of
    the source cell changed at that layer, minus before.
    """

    sample: "Sample"
    hook_point: str
    layers: list[int]
    sources: np.ndarray
    targets: np.ndarray
    before: np.ndarray
    effect: np.ndarray

    def to_dict(self) -> dict[str, Any]:
        """The content of causal_map.json."""
        task_id, sample_idx = self.sample.key
        return {
            "task_id": task_id,
            "sample_idx": sample_idx,
            "num_train_pairs": self.sample.num_train_pairs,
            "hook_points": [self.hook_point],
            "layers": self.layers,
            "source_cells": self.sources.tolist(),
            "target_cells": self.targets.tolist(),
            "effect": np.round(self.effect.astype(np.float64), 8).tolist(),
        }


@dataclass(frozen=True, eq=False)
class Trial:
    """A change: the states of some tokens, int [N], ascending, at the layer of one of the edits."""

    layer: int
    source: int
    tokens: np.ndarray


class Lab:
    """A model with one change at each of some layers, in one compiled program: which tokens are
    meant, and what takes their place, are its arguments.

    plan: of a teacher-forced run whose captures are the states to be changed.
    """

    def __init__(self, plan: "Plan", op: str, shape: "Shape"):
        from utils.model.capture import CaptureSpec, width_of
        from utils.model.interventions import Edit
        from utils.plan.interventions import Intervention
        from utils.run.compute import Computation

        self.plan, self.op, self.shape, self.names = plan, op, shape, plan.capture.names
        self.groups = plan.layout.data
        self.widths = [width_of(plan.config, name) for name in self.names]
        changes = [
            Intervention({}, Edit(name, "set"), {"vector": np.zeros(width, np.float32)})
            if op == "mean"
            else Intervention({}, Edit(name, op))
            for name, width in zip(self.names, self.widths, strict=True)
        ]
        if op == "zero":  # asks for nobody's states
            plan = replace(plan, capture=CaptureSpec())
        computation = Computation(replace(plan, interventions=tuple(changes)))
        self.engine = computation.engine
        self._state = self.engine.begin(shape)

    def causal_map(
        self, sample: "Sample", cells: np.ndarray, donor: "Sample | None" = None
    ) -> CausalMap:
        """cells: int [S, 7], rows of the sample's cell table, the sources. donor: whose states take
        the place of others, where the op is `patch`."""
        encoded, values = self.plan.encode(sample), None
        if donor is not None:
            values = self._donated(self.plan.encode(donor), encoded.cells, cells)
        targets = encoded.cells[len(encoded.cells) - _answer_cells(encoded) :]
        # The cache is filled with the unchanged states of all tokens. A trial begins at its first
        # token that changes, and overwrites the cache from there on; so the states before that
        # token are still the unchanged ones as long as no trial before it began earlier. Hence the
        # last cells come first. What the cache holds behind the tokens of a chunk does not matter,
        # since no token sees one behind it.
        clean, states = self._clean(encoded)
        if self.op == "mean":
            self._take_means(encoded, states)
        before = _of_cells(clean, targets)[0]
        trials = [
            Trial(layer, source, np.arange(*cells[source, 5:]))
            for source in sorted(range(len(cells)), key=lambda i: -cells[i, 5])
            for layer in range(len(self.names))
        ]
        effect = np.zeros((len(self.names), len(cells), len(targets)), np.float32)
        for trial, logprobs in self._tried(encoded, trials, values):
            effect[trial.layer, trial.source] = _of_cells(logprobs, targets) - before
        return CausalMap(
            sample=sample,
            hook_point=self.names[0].rpartition(".")[0],
            layers=[int(name.rpartition(".")[2]) for name in self.names],
            sources=cells[:, :4],
            targets=targets[:, 2:4],
            before=before,
            effect=effect,
        )

    def _chunks(
        self,
        encoded: "Encoded",
        start: int,
        trials: Sequence[Trial] = (),
        values: np.ndarray | None = None,
    ) -> Iterator[tuple[int, "Chunk"]]:
        """The tokens from `start` on, chunk by chunk, each with the position at which it begins; in
        each data group with the change of another trial, or unchanged."""
        from utils.plan.batching import pad_rows

        groups, length = self.groups, len(encoded.ids)
        ids = pad_rows([encoded.ids] * groups, self.shape.slots)
        prompts = np.full(groups, encoded.prompt_length, np.int32)
        totals = np.full(groups, length, np.int32)
        for begin in range(start, length - 1, self.shape.chunk):  # the last token predicts nothing
            chunk, self._state = self.engine.prefill(
                self._state,
                ids,
                range(groups),
                np.full(groups, begin, np.int32),
                prompts,
                totals,
                self.shape,
                self._changes(begin, trials, values),
            )
            yield begin, chunk

    def _changes(
        self, begin: int, trials: Sequence[Trial], values: np.ndarray | None
    ) -> tuple[dict[str, Any], ...]:
        chunk, found = self.shape.chunk, []
        for layer, width in enumerate(self.widths):
            mask = np.zeros((self.groups, chunk), bool)
            for group, trial in enumerate(trials):
                tokens = trial.tokens[trial.tokens >= begin] - begin
                if trial.layer == layer:
                    mask[group, tokens[tokens < chunk]] = True
            arrays = {"mask": mask}
            if self.op == "patch":
                given = np.zeros((chunk, width), np.float32)
                if values is not None:
                    here = values[layer, begin : begin + chunk]
                    given[: len(here)] = here
                arrays["values"] = np.broadcast_to(given, (self.groups, *given.shape))
            found.append(arrays)
        return tuple(found)

    def _clean(self, encoded: "Encoded") -> tuple[np.ndarray, list[np.ndarray]]:
        """An unchanged pass from the start: log p, float32 [1, T], as `_logprobs` gives it, and the
        states of all tokens, float32 [T, W] of each layer, none where nobody asks for them."""
        chunks = list(self._chunks(encoded, 0))
        states = [
            np.concatenate([np.asarray(chunk.captures[name])[0] for _, chunk in chunks])
            for name in (self.names if self.op != "zero" else ())
        ]
        logprobs = _logprobs(len(encoded.ids), chunks)[:1]
        return logprobs, [part.astype(np.float32) for part in states]

    def _take_means(self, encoded: "Encoded", states: list[np.ndarray]) -> None:
        """The mean over the tokens of the puzzle's cells becomes what `set` sets."""
        import jax

        from utils.model.capture import tokens_in

        tokens = tokens_in(encoded.cells[:, 5:], len(encoded.ids))
        tokens = tokens[tokens < encoded.prompt_length]
        means = [part[tokens].mean(axis=0, dtype=np.float64) for part in states]
        self.engine.constants = [
            {"vector": jax.device_put(mean.astype(np.float32), self.plan.layout.sharding())}
            for mean in means
        ]

    def _donated(self, donor: "Encoded", own: np.ndarray, cells: np.ndarray) -> np.ndarray:
        """float32 [L, T, W]: of each token of the source cells the donor's state, else 0."""
        from utils.plan.donors import by_cells

        tokens = tokens_of(cells)
        source = by_cells(tokens, own, donor.cells, "the donor")
        _, states = self._clean(donor)
        length = int(own[:, 6].max())
        values = np.zeros((len(states), length, states[0].shape[1]), np.float32)
        for layer, part in enumerate(states):
            values[layer, tokens] = part[source]
        return values

    def _tried(
        self, encoded: "Encoded", trials: Sequence[Trial], values: np.ndarray | None
    ) -> Iterator[tuple[Trial, np.ndarray]]:
        """Each trial with what became of log p, float32 [T]; trials whose first tokens come last
        first. One round is on the devices while the one before it is fetched."""
        from tqdm import tqdm

        def fetched(round: Sequence[Trial], parts: list[tuple[int, "Chunk"]]) -> Iterable[Any]:
            bar.update(len(round))
            return zip(round, _logprobs(len(encoded.ids), parts), strict=False)

        with tqdm(total=len(trials), desc="changing cells", unit="pass") as bar:
            before = None
            for i in range(0, len(trials), self.groups):
                round = trials[i : i + self.groups]
                start = int(min(trial.tokens[0] for trial in round))
                parts = [
                    (begin, replace(chunk, captures={}))
                    for begin, chunk in self._chunks(encoded, start, round, values)
                ]
                if before is not None:
                    yield from fetched(*before)
                before = round, parts
            if before is not None:
                yield from fetched(*before)


def _logprobs(length: int, chunks: Iterable[tuple[int, "Chunk"]]) -> np.ndarray:
    """float32 [P, T]: of each token log p of the next, where that is of the answer, else 0."""
    found = None
    for begin, chunk in chunks:
        part = np.asarray(chunk.logprobs)
        if found is None:
            found = np.zeros((len(part), length), np.float32)
        found[:, begin : begin + part.shape[1]] = part[:, : length - begin]
    return found


def _of_cells(logprobs: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """Sums over the tokens of each cell, [..., A], of what `_logprobs` gives, [..., T]."""
    total = np.cumsum(logprobs, axis=-1, dtype=np.float64)
    return total[..., cells[:, 6] - 2] - total[..., cells[:, 5] - 2]


def _answer_cells(encoded: "Encoded") -> int:
    return int((encoded.cells[:, 5] >= encoded.prompt_length).sum())


def tokens_of(cells: np.ndarray) -> np.ndarray:
    """int [N], ascending: the tokens of rows of a cell table."""
    return np.unique(np.concatenate([np.arange(*span) for span in cells[:, 5:]]))


def source_cells(encoded: "Encoded", sources: str) -> np.ndarray:
    """int [S, 7]: the cells of the puzzle, `all` of them or those of the `test` input."""
    cells = encoded.cells[: len(encoded.cells) - _answer_cells(encoded)]
    return cells if sources == "all" else cells[cells[:, 0] == -1]


def shape_for(plan: "Plan", samples: Sequence["Sample"], sources: str) -> "Shape":
    """One compiled shape for the maps of all these samples: chunks as long as suits the passes
    that they are made of."""
    from utils.model.generate import Shape
    from utils.plan.batching import SLOT_UNIT, chunk_tokens

    passes = [
        sample.length.total - int(first)
        for sample in samples
        for first in source_cells(plan.encode(sample), sources)[:, 5]
    ]
    layout = plan.layout
    chunk = chunk_tokens(passes, layout.platform == "cpu", layout.alignment)
    slots = max(sample.length.total for sample in samples) + chunk
    return Shape(layout.data, -(-slots // SLOT_UNIT) * SLOT_UNIT, chunk)


def plan_maps(
    request: Request,
    tasks: Sequence[str],
    layers: Sequence[str],
    hook_point: str,
    devices: Sequence[Any] | None = None,
) -> "Plan":
    """A plan of passes over puzzles and their true answers whose captures are what is changed;
    devices: default, all."""
    from utils.model.layout import find_devices
    from utils.plan.plan import plan_run

    request = replace(
        request,
        task_ids=tuple(tasks),
        teacher_forcing=True,
        no_logits=True,
        layers_to_extract=tuple(layers),
        hook_points=(hook_point,),
    )
    return plan_run(request, devices or find_devices(everywhere=True), writes=False)


def sample_of(plan: "Plan", task: str, sample_idx: int) -> "Sample":
    """Raises UserError where there is none, or the run would skip it."""
    for sample in plan.samples:
        if sample.key == (task, sample_idx):
            return sample
    for entry in plan.skipped:
        if (entry["task_id"], entry["sample_idx"]) == (task, sample_idx):
            raise UserError(f"task {task}, test input {sample_idx}: {entry['reason']}")
    count = next(len(found.test) for found in plan.tasks if found.task_id == task)
    raise UserError(f"task {task} has no test input {sample_idx}: there are 0 to {count - 1}")


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    for name in FLAGS:
        cli.add_flags(parser, Request, name)
    parser.add_argument("--task", required=True, help="id of the task")
    parser.add_argument(
        "--sample_idx",
        type=cli.int_at_least(0),
        default=0,
        help="which of its test inputs",
    )
    parser.add_argument(
        "--op",
        choices=OPS,
        default="zero",
        help="what the states of a cell become: zero; the mean over the puzzle's cells; or those "
        "of the same cell in another task",
    )
    parser.add_argument("--donor", metavar="TASK", help="the other task, for --op patch")
    parser.add_argument(
        "--hook_point", default="resid_pre", choices=HOOK_POINTS, help="where in a layer"
    )
    parser.add_argument(
        "--layers",
        nargs="+",
        metavar="LAYER",
        required=True,
        help="layers from 0, negative from the end, or `all`",
    )
    parser.add_argument(
        "--sources",
        choices=("all", "test"),
        default="all",
        help="the cells that are changed: all of the puzzle, or those of the test input",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    return parser


def main(args: argparse.Namespace, _: cli.Signals) -> None:
    from examples.causal_page import page
    from utils.run.summary import shortfalls

    if (args.op == "patch") != (args.donor is not None):
        raise UserError("--op patch needs --donor TASK, and no other op takes one")
    folder = args.output
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists: choose another folder, or move it away")
    check_writable(folder)
    tasks = [args.task, args.donor] if args.donor else [args.task]
    plan = plan_maps(Request.from_flags(args), tasks, args.layers, args.hook_point)
    sample = sample_of(plan, args.task, args.sample_idx)
    encoded, donor = plan.encode(sample), None
    cells = source_cells(encoded, args.sources)
    if args.donor:
        from utils.plan.donors import by_cells

        donor = sample_of(plan, args.donor, 0)
        whose = f"task {args.donor}"
        try:
            by_cells(tokens_of(cells), encoded.cells, plan.encode(donor).cells, whose)
        except UserError as error:
            raise UserError(
                f"{error}: choose a --donor of the same shape"
                + (", or --sources test" if args.sources == "all" else "")
            ) from error
    samples = [sample] if donor is None else [sample, donor]
    lab = Lab(plan, args.op, shape_for(plan, samples, args.sources))
    found = lab.causal_map(sample, cells, donor)
    with writing(folder), new_folder(folder) as made:
        write_json(made / "causal_map.json", found.to_dict())
        (made / "causal_map.html").write_bytes(page(found, args.op))
    for line in shortfalls(replace(plan, samples=samples, skipped=())):
        print(line)
    passes = len(found.layers) * len(cells)
    print(
        f"{folder / 'causal_map.html'}: {len(cells)} cells of the puzzle at {len(found.layers)} "
        f"layers, in {passes} passes; what each of the answer's {len(found.targets)} cells hangs on"
    )


if __name__ == "__main__":
    cli.run(main, build_parser())
