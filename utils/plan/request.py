"""What a run is asked to do: every option of the inference scripts, once, with its default, unit,
help and rule.

`utils.cli.add_flags` makes the flags of it, and `utils.plan.plan` checks a request against files.
"""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

from utils.arc.views import MOST_VIEWS
from utils.cli import float_at_least, int_at_least, option
from utils.errors import UserError
from utils.model.capture import HOOK_POINTS, TOKEN_POSITIONS
from utils.prompt.formats import GRID_ENCODINGS, PROMPT_FORMATS
from utils.store.bucket import is_uri, parse_uri

DRY_RUN = "check everything, print tokens, samples, shards, bytes and free disk, and stop"

# Each declares an option of the group of flags that has this title in the help.
_input = partial(option, "input")
_output = partial(option, "output")
_mesh = partial(option, "mesh")
_batches = partial(option, "batches")
_parts = partial(option, "parts")
_prompt = partial(option, "model and prompt")
_answers = partial(option, "answers")
_extracted = partial(option, "what is extracted")
_storage = partial(option, "storage")
_cloud = partial(option, "cloud storage")


@dataclass(frozen=True)
class Request:
    """What a run is asked to do; each field but the last three is the flag of its name."""

    model_path: str = _input(
        "folder of a Hugging Face model: Llama, Mistral, Qwen, Gemma; gs://BUCKET/FOLDER is "
        "fetched to a local cache",
        required=True,
    )
    dataset_path: str = _input(
        "ARC tasks: Kaggle JSON, JSONL, one task file or a folder of them, .gz too; or "
        "gs://BUCKET/FILE",
        required=True,
    )
    adapter: str | None = _input(
        "folder of a LoRA adapter of peft's, which is merged into the model as it is loaded; a "
        "--model_path that is an adapter names its base itself",
        unset="none",
        metavar="FOLDER",
    )
    solutions_path: str | None = _input(
        "ground truth",
        unset="the file beside the tasks under its usual name, test_outputs_* or *_solutions",
    )
    max_tasks: int | None = _input(
        "take the first so many tasks", unset="all", type=int_at_least(1)
    )

    output_path: str = _output("predictions, a JSON file", default="results/predictions.json")

    mesh_shape: tuple[int, int] | None = _mesh(
        "devices that share a batch, and devices that share a sample; their product is the number "
        "of devices that JAX sees (on v4 and v5p one a chip, half the cores in the slice's name); "
        "`auto` takes the smallest second number with which the run fits in memory; --plan "
        "compares several pairs",
        flag_default=["auto"],
        nargs="+",
        metavar="D M",
    )
    batch_size: int = _batches("samples a batch{unit}", default=1, type=int_at_least(1))
    max_batch_tokens: int | None = _batches(
        "tokens a batch{unit}, each sample counted like the longest one of its cache: long prompts "
        "go in smaller batches",
        unset="as many as the memory of the device is estimated to hold",
        type=int_at_least(1),
    )
    shard_id: int = _parts(
        "which of --num_shards parts of the tasks this run takes, from 0, for hosts that do not "
        "talk to each other; `python -m utils.shards merge` joins the results",
        default=0,
        type=int_at_least(0),
    )
    num_shards: int = _parts("parts of the tasks", default=1, type=int_at_least(1))

    dtype: str | None = _prompt(
        "computation",
        unset="bfloat16 on accelerators, float32 on CPU",
        choices=("float32", "bfloat16"),
    )
    prompt_format: str = _prompt(
        "how a task is put to the model, or a Jinja file; a model must be prompted the way it was "
        "trained",
        default="chat",
        metavar=f"{{{','.join(PROMPT_FORMATS)}}}|FILE",
    )
    grid_encoding: str | None = _prompt(
        "how a grid is written",
        unset="digits; numbered for arc24",
        choices=GRID_ENCODINGS,
    )
    max_train_pairs: int | None = _prompt(
        "take the first so many train pairs of a task", unset="all", type=int_at_least(1)
    )
    augmentations: int = _prompt(
        "run each test input in N views, at N times the cost: as it is, then with the whole task "
        "turned or mirrored (any 8 in a row hold all 8 ways), its colors permuted (black stays "
        "black) and its train pairs shuffled, as --seed draws it; answers are mapped back and "
        "voted into two attempts, and each item records its view",
        default=1,
        metavar="N",
        type=int_at_least(1),
    )
    max_model_len: int | None = _prompt(
        "tokens of prompt and answer together; a longer prompt loses its first train pairs",
        unset="what the model allows",
        type=int_at_least(1),
    )

    max_output_tokens: int = _answers(
        "tokens an answer; 0 extracts from the prompt alone", default=1100, type=int_at_least(0)
    )
    predictions_per_task: int = _answers(
        "answers to a test input; the first of several is greedy, and its states are kept",
        default=1,
        type=int_at_least(1),
    )
    temperature: float | None = _answers(
        "of the answers after the first, or of the only one",
        unset="0, greedy, for one answer; 0.7 for those after the first",
        type=float_at_least(0),
    )
    seed: int = _answers(
        "of the random draws, also those of the views and of --max_rows_per_sample",
        default=0,
        type=int,
    )
    teacher_forcing: bool = _answers(
        "run prompt and ground truth in one pass instead of generating", default=False
    )

    interventions: str | None = _answers(
        "JSON list of changes made to hidden states while the model runs, in prompts and answers: "
        "what, at which hook, for which cells; see docs/causes.md",
        unset="none",
        metavar="FILE.json",
    )

    layers_to_extract: Sequence[str] | None = _extracted(
        "layers from 0, negative from the end, or `all`",
        unset="first, middle, last",
        nargs="+",
        metavar="LAYER",
    )
    hook_points: Sequence[str] = _extracted(
        "where in a layer; resid_post is the residual stream after it",
        default=("resid_post",),
        nargs="+",
        choices=HOOK_POINTS,
    )
    token_positions: str = _extracted(
        "tokens whose states are kept; last is the prompt's last, which the answer's first token "
        "is predicted from; cells are those that hold a cell of a grid",
        default="all",
        choices=TOKEN_POSITIONS,
    )
    max_rows_per_sample: int | None = _extracted(
        "of these tokens keep N of each sample, drawn at random by --seed, the same in every run",
        unset="all",
        metavar="N",
        type=int_at_least(1),
    )
    activation_dtype: str = _extracted(
        "on disk; int8 is with a scale for each row, and the manifest says how far off it is; what "
        "float16 or int8 cannot hold is stored as float32 and counted",
        default="float16",
        choices=("float16", "float32", "int8"),
    )
    no_logits: bool = _extracted(
        "leave out output_logits; with --max_output_tokens 0 the pass ends after the last captured "
        "layer",
        default=False,
    )

    activations_dir: str | None = _storage(  # None extracts nothing
        "folder of the shards and metadata.json", default="results/activations"
    )
    save_every_n_samples: int | None = _storage(
        "samples a shard; a kill loses at most those of the open one",
        default=50,
        unset="any",
        type=int_at_least(1),
    )
    save_every_n_batches: int | None = _storage(
        "batches a shard", unset="any", type=int_at_least(1)
    )
    max_shard_mb: float = _storage(
        "megabytes a shard; it is closed at whichever of the three limits comes first",
        default=512,
        type=float_at_least(1),
    )
    resume: bool = _storage("do what the run in the folder lacks", default=False)
    overwrite: bool = _storage("replace the run in the folder", default=False)

    upload_to_cloud: bool = _cloud(
        "send every shard to a bucket while the model computes, each exactly once; manifest, "
        "predictions and submission follow; needs `gcloud auth application-default login` and "
        "roles/storage.objectUser, which --dry_run tests",
        default=False,
    )
    cloud_bucket: str | None = _cloud(
        "where to; a prefix holds one run, and several processes of a run share it",
        unset="none, --upload_to_cloud needs one",
        metavar="gs://BUCKET/PREFIX",
    )
    upload_timeout: float = _cloud(
        "seconds after the last sample, or of a full --max_pending_gb, in which the uploads must "
        "end; what is left stays on the disk, the exit code is 1, and --resume sends it",
        default=600,
        metavar="SECONDS",
        type=float_at_least(1),
    )
    max_pending_gb: float = _cloud(
        "gigabytes (10^9 bytes) of shards that may wait for the network, in each process; beyond "
        "that computing waits",
        default=50,
        metavar="GB",
        type=float_at_least(0.001),
    )
    delete_after_upload: bool = _cloud(
        "delete a shard from the disk once the bucket was seen to hold it; its manifest stays",
        default=False,
    )

    task_ids: tuple[str, ...] = ()  # of the tasks that are taken; none of them named takes all
    distributed: bool = False  # on all devices and processes; writes submission.json
    arguments: dict[str, Any] = field(default_factory=dict)  # as given, for the manifest

    @classmethod
    def from_flags(cls, args: argparse.Namespace) -> "Request":
        """Takes the flags that have a field; without extraction `activations_dir` is None."""
        given, names = vars(args), {field.name for field in fields(cls)}
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if k in names}
        words = given.get("mesh_shape")
        values["mesh_shape"] = mesh_shapes(words)[0] if words else None
        if given.get("no_extraction") or not given.get("extract_activations", True):
            values["activations_dir"] = None
        return cls(**values, arguments=given)

    @property
    def output_flag(self) -> str:
        return "--output_filepath" if self.distributed else "--output_path"

    @property
    def generates(self) -> bool:
        return not self.teacher_forcing and self.max_output_tokens > 0

    @property
    def room(self) -> int:
        """Tokens that a generated answer can take, 0 where none is generated."""
        return self.max_output_tokens if self.generates else 0

    @property
    def temperatures(self) -> list[float]:
        """Of each prediction; the first of several is greedy."""
        if self.predictions_per_task == 1:
            return [self.temperature or 0.0]
        further = 0.7 if self.temperature is None else self.temperature
        return [0.0] + [further] * (self.predictions_per_task - 1)

    def check(self) -> None:
        """Raises UserError for flags that are empty or contradict one another."""
        for name in ("model_path", "adapter", "dataset_path", "output_path", "activations_dir"):
            path, is_output = getattr(self, name), name in ("output_path", "activations_dir")
            flag = self.output_flag if name == "output_path" else f"--{name}"
            if path == "":
                raise UserError(f"{flag} is empty: give a path")
            if is_output and path is not None and is_uri(path):
                raise UserError(
                    f"{flag} {path} is in a bucket: give a local path here, and --upload_to_cloud "
                    "--cloud_bucket gs://BUCKET/PREFIX for the bucket"
                )
        if self.shard_id >= self.num_shards:
            raise UserError(
                f"--shard_id {self.shard_id} does not exist: of --num_shards {self.num_shards} "
                f"the ids are 0..{self.num_shards - 1}"
            )
        if self.augmentations > MOST_VIEWS:
            raise UserError(
                f"--augmentations {self.augmentations} is more than the {MOST_VIEWS} views that a "
                "task with one train pair has: lower it"
            )
        if self.resume and self.overwrite:
            raise UserError("--resume continues a run, --overwrite replaces it: give one of them")
        self._check_upload()
        if self.activations_dir is None and (names := self._given("what is extracted")):
            if self.distributed:
                raise UserError(f"{names}: give --extract_activations too")
            raise UserError(f"--no_extraction extracts nothing: leave out {names}")
        if self.predictions_per_task > 1 and not self.generates:
            raise UserError("--predictions_per_task needs answers that are generated")
        if self.predictions_per_task > 1 and self.temperature == 0:
            raise UserError("--predictions_per_task above 1 needs a --temperature above 0")
        if self.temperature and self.temperature < 0.01:
            raise UserError(
                f"--temperature {self.temperature:g} is too low to divide by: 0 is greedy"
            )
        if self.temperature and not self.generates:
            raise UserError("--temperature needs answers that are generated")
        if self.activations_dir is None and not self.generates:
            why = "no --extract_activations and" if self.distributed else "--no_extraction with"
            raise UserError(f"{why} no answer to generate leaves nothing to do")
        if self.teacher_forcing and self.max_output_tokens == 0:
            raise UserError(
                "--teacher_forcing runs the ground truth, and --max_output_tokens 0 the prompt "
                "alone: give one of them"
            )
        if self.token_positions == "answer" and self.max_output_tokens == 0:
            raise UserError("--token_positions answer, but --max_output_tokens 0 makes no answer")

    def _check_upload(self) -> None:
        if not self.upload_to_cloud:
            if names := self._given("cloud storage"):
                raise UserError(f"{names}: give --upload_to_cloud too")
            return
        if not self.cloud_bucket:
            raise UserError("--upload_to_cloud needs --cloud_bucket gs://BUCKET/PREFIX")
        parse_uri(self.cloud_bucket, "--cloud_bucket")
        if self.delete_after_upload and self.activations_dir is None:
            raise UserError("--delete_after_upload has no shards to delete: leave it out")

    def _given(self, group: str) -> str:
        """The flags of a group that are not as they are without any flag."""
        options = [entry for entry in fields(self) if entry.metadata.get("group") == group]
        given = [entry.name for entry in options if getattr(self, entry.name) != entry.default]
        return ", ".join(f"--{name}" for name in given)


def mesh_shapes(words: Sequence[str]) -> list[tuple[int, int] | None]:
    """The values of --mesh_shape as (data, model) pairs; `auto` is [None]. Raises UserError."""
    if list(words) == ["auto"]:
        return [None]
    if len(words) % 2 or not all(re.fullmatch("0*[1-9][0-9]{0,8}", word) for word in words):
        raise UserError(
            f"--mesh_shape {' '.join(words)} is not `auto` or two whole numbers: data and model"
        )
    numbers = [int(word) for word in words]
    return list(zip(numbers[::2], numbers[1::2], strict=True))
