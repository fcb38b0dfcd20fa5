"""What a run is asked to do: every option of the inference scripts, once, with its default, unit,
help and rule.

`utils.cli.add_flags` makes the flags of it, and `utils.plan.plan` checks a request against files.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from utils.arc.views import MOST_VIEWS
from utils.cli import float_at_least, int_at_least, option
from utils.errors import UserError
from utils.model.capture import HOOK_POINTS, TOKEN_POSITIONS
from utils.prompt.formats import GRID_ENCODINGS, PROMPT_FORMATS
from utils.store.bucket import is_uri, parse_uri

DRY_RUN = "check everything, print tokens, samples, shards, bytes and free disk, and stop"


@dataclass(frozen=True)
class Request:
    """What a run is asked to do; each field but the last two is the flag of its name."""

    # ---------------------------------------------------------------------------- input
    model_path: str = option(
        "input",
        "folder of a Hugging Face model: Llama, Mistral, Qwen; gs://BUCKET/FOLDER is fetched to a "
        "local cache",
        required=True,
    )
    dataset_path: str = option(
        "input",
        "ARC tasks: Kaggle JSON, JSONL, one task file or a folder of them, .gz too; or "
        "gs://BUCKET/FILE",
        required=True,
    )
    solutions_path: str | None = option(
        "input", "ground truth", unset="the file next to a transformed dataset, where there is one"
    )
    max_tasks: int | None = option(
        "input", "take the first so many tasks", unset="all", type=int_at_least(1)
    )

    # ---------------------------------------------------------------------------- output
    output_path: str = option(
        "output", "predictions, a JSON file", default="results/predictions.json"
    )

    # --------------------------------------------------------------------------- devices
    mesh_shape: tuple[int, int] | None = option(
        "mesh",
        "devices that share a batch, and devices that share a sample; their product is the number "
        "of devices that JAX sees (on v4 and v5p one a chip, half the cores in the slice's name); "
        "`auto` takes the smallest second number with which the run fits in memory; --plan "
        "compares several pairs",
        flag_default=["auto"],
        nargs="+",
        metavar="D M",
    )
    batch_size: int = option(
        "batches", "samples a forward pass{unit}", default=1, type=int_at_least(1)
    )
    max_batch_tokens: int | None = option(
        "batches",
        "tokens a forward pass{unit}: long prompts go in smaller batches",
        unset="as many as the memory of the device is estimated to hold",
        type=int_at_least(1),
    )
    shard_id: int = option(
        "parts",
        "which of --num_shards parts of the tasks this run takes, from 0, for hosts that do not "
        "talk to each other; `python -m utils.shards merge` joins the results",
        default=0,
        type=int_at_least(0),
    )
    num_shards: int = option("parts", "parts of the tasks", default=1, type=int_at_least(1))

    # ------------------------------------------------------------------ model and prompt
    dtype: str | None = option(
        "model and prompt",
        "computation",
        unset="bfloat16 on accelerators, float32 on CPU",
        choices=("float32", "bfloat16"),
    )
    prompt_format: str = option(
        "model and prompt",
        "how a task is put to the model, or a Jinja file; a model must be prompted the way it was "
        "trained",
        default="chat",
        metavar=f"{{{','.join(PROMPT_FORMATS)}}}|FILE",
    )
    grid_encoding: str = option(
        "model and prompt", "how a grid is written", default="digits", choices=GRID_ENCODINGS
    )
    max_train_pairs: int | None = option(
        "model and prompt",
        "take the first so many train pairs of a task",
        unset="all",
        type=int_at_least(1),
    )
    augmentations: int = option(
        "model and prompt",
        "run each test input in N views, at N times the cost: as it is, then with the whole task "
        "turned or mirrored (any 8 in a row hold all 8 ways), its colors permuted (black stays "
        "black) and its train pairs shuffled, as --seed draws it; answers are mapped back and "
        "voted into two attempts, and each item records its view",
        default=1,
        metavar="N",
        type=int_at_least(1),
    )
    max_model_len: int | None = option(
        "model and prompt",
        "tokens of prompt and answer together; a longer prompt loses its first train pairs",
        unset="what the model allows",
        type=int_at_least(1),
    )

    # --------------------------------------------------------------------------- answers
    max_output_tokens: int = option(
        "answers",
        "tokens an answer; 0 extracts from the prompt alone",
        default=1100,
        type=int_at_least(0),
    )
    predictions_per_task: int = option(
        "answers",
        "answers to a test input; the first of several is greedy, and its states are kept",
        default=1,
        type=int_at_least(1),
    )
    temperature: float | None = option(
        "answers",
        "of the answers after the first, or of the only one",
        unset="0, greedy, for one answer; 0.7 for those after the first",
        type=float_at_least(0),
    )
    seed: int = option(
        "answers", "of the random draws, also those of the views", default=0, type=int
    )
    teacher_forcing: bool = option(
        "answers", "run prompt and ground truth in one pass instead of generating", default=False
    )

    # ----------------------------------------------------------------- what is extracted
    layers_to_extract: Sequence[str] | None = option(
        "what is extracted",
        "layers from 0, negative from the end, or `all`",
        unset="first, middle, last",
        nargs="+",
        metavar="LAYER",
    )
    hook_points: Sequence[str] = option(
        "what is extracted",
        "where in a layer; resid_post is the residual stream after it",
        default=("resid_post",),
        nargs="+",
        choices=HOOK_POINTS,
    )
    token_positions: str = option(
        "what is extracted",
        "tokens whose states are kept; last is the prompt's last, which the answer's first token "
        "is predicted from",
        default="all",
        choices=TOKEN_POSITIONS,
    )
    activation_dtype: str = option(
        "what is extracted",
        "on disk; what float16 cannot hold is stored as float32 and counted",
        default="float16",
        choices=("float16", "float32"),
    )
    no_logits: bool = option(
        "what is extracted",
        "leave out output_logits; with --max_output_tokens 0 the pass ends after the last captured "
        "layer",
        default=False,
    )

    # --------------------------------------------------------------------------- storage
    activations_dir: str | None = option(  # None extracts nothing
        "storage", "folder of the shards and metadata.json", default="results/activations"
    )
    save_every_n_samples: int | None = option(
        "storage",
        "samples a shard; a kill loses at most those of the open one",
        default=50,
        unset="any",
        type=int_at_least(1),
    )
    save_every_n_batches: int | None = option(
        "storage", "batches a shard", unset="any", type=int_at_least(1)
    )
    max_shard_mb: float = option(
        "storage",
        "megabytes a shard; it is closed at whichever of the three limits comes first",
        default=512,
        type=float_at_least(1),
    )
    resume: bool = option("storage", "do what the run in the folder lacks", default=False)
    overwrite: bool = option("storage", "replace the run in the folder", default=False)

    # --------------------------------------------------------------------- cloud storage
    upload_to_cloud: bool = option(
        "cloud storage",
        "send every shard to a bucket while the model computes, each exactly once; manifest, "
        "predictions and submission follow; needs `gcloud auth application-default login` and "
        "roles/storage.objectUser, which --dry_run tests",
        default=False,
    )
    cloud_bucket: str | None = option(
        "cloud storage",
        "where to; a prefix holds one run, and several processes of a run share it",
        unset="none, --upload_to_cloud needs one",
        metavar="gs://BUCKET/PREFIX",
    )
    upload_timeout: float = option(
        "cloud storage",
        "seconds after the last sample, or of a full --max_pending_gb, in which the uploads must "
        "end; what is left stays on the disk, the exit code is 1, and --resume sends it",
        default=600,
        metavar="SECONDS",
        type=float_at_least(1),
    )
    max_pending_gb: float = option(
        "cloud storage",
        "gigabytes (10^9 bytes) of shards that may wait for the network, in each process; beyond "
        "that computing waits",
        default=50,
        metavar="GB",
        type=float_at_least(0.001),
    )
    delete_after_upload: bool = option(
        "cloud storage",
        "delete a shard from the disk once the bucket was seen to hold it; its manifest stays",
        default=False,
    )

    distributed: bool = False  # on all devices and processes; writes submission.json
    arguments: dict[str, Any] = field(default_factory=dict)  # as given, for the manifest

    @classmethod
    def from_flags(cls, args: argparse.Namespace) -> "Request":
        """Takes the flags that have a field; without extraction `activations_dir` is None."""
        names = {field.name for field in fields(cls)}
        values = {name: value for name, value in vars(args).items() if name in names}
        values["mesh_shape"] = None
        if words := getattr(args, "mesh_shape", None):
            (values["mesh_shape"], *_) = mesh_shapes(words)
        if getattr(args, "no_extraction", False) or not getattr(args, "extract_activations", True):
            values["activations_dir"] = None
        return cls(**values, arguments=vars(args))

    @property
    def output_flag(self) -> str:
        return "--output_filepath" if self.distributed else "--output_path"

    @property
    def generates(self) -> bool:
        return not self.teacher_forcing and self.max_output_tokens > 0

    @property
    def temperatures(self) -> list[float]:
        """Of each prediction; the first of several is greedy."""
        if self.predictions_per_task == 1:
            return [self.temperature or 0.0]
        further = 0.7 if self.temperature is None else self.temperature
        return [0.0] + [further] * (self.predictions_per_task - 1)

    def check(self) -> None:
        """Raises UserError for flags that are empty or contradict one another."""
        for name in ("model_path", "dataset_path", "output_path", "activations_dir"):
            if getattr(self, name) == "":
                flag = self.output_flag if name == "output_path" else f"--{name}"
                raise UserError(f"{flag} is empty: give a path")
        for name in ("output_path", "activations_dir"):
            if (path := getattr(self, name)) is not None and is_uri(path):
                flag = self.output_flag if name == "output_path" else f"--{name}"
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
        if self.activations_dir is None:
            given = {
                "layers_to_extract": self.layers_to_extract is not None,
                "hook_points": tuple(self.hook_points) != Request.hook_points,
                "token_positions": self.token_positions != Request.token_positions,
                "no_logits": self.no_logits,
            }
            if names := [f"--{name}" for name, is_given in given.items() if is_given]:
                if self.distributed:
                    raise UserError(f"{', '.join(names)}: give --extract_activations too")
                raise UserError(f"--no_extraction extracts nothing: leave out {', '.join(names)}")
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
        if self.upload_to_cloud:
            if not self.cloud_bucket:
                raise UserError("--upload_to_cloud needs --cloud_bucket gs://BUCKET/PREFIX")
            parse_uri(self.cloud_bucket, "--cloud_bucket")
            if self.delete_after_upload and self.activations_dir is None:
                raise UserError("--delete_after_upload has no shards to delete: leave it out")
            return
        given = {
            "cloud_bucket": self.cloud_bucket is not None,
            "delete_after_upload": self.delete_after_upload,
            "upload_timeout": self.upload_timeout != Request.upload_timeout,
            "max_pending_gb": self.max_pending_gb != Request.max_pending_gb,
        }
        if names := [f"--{name}" for name, is_given in given.items() if is_given]:
            raise UserError(f"{', '.join(names)}: give --upload_to_cloud too")


def mesh_shapes(words: Sequence[str]) -> list[tuple[int, int] | None]:
    """The values of --mesh_shape as (data, model) pairs; `auto` is [None]. Raises UserError."""
    if list(words) == ["auto"]:
        return [None]
    if len(words) % 2 or not all(map(_is_count, words)):
        raise UserError(
            f"--mesh_shape {' '.join(words)} is not `auto` or two whole numbers: data and model"
        )
    numbers = [int(word) for word in words]
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def _is_count(word: str) -> bool:
    return word.isascii() and word.isdigit() and int(word) > 0
