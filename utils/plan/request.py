"""What a run is asked to do: the flags of the inference scripts, with their defaults, once.

`flags` reads the defaults from here, and `prepare` checks a request against files.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from utils.arc.views import MOST_VIEWS
from utils.errors import UserError
from utils.store.bucket import is_uri, parse_uri


@dataclass(frozen=True)
class Request:
    """What a run is asked to do; each field is explained by the flag of its name."""

    model_path: str
    dataset_path: str
    output_path: str = "results/predictions.json"
    activations_dir: str | None = "results/activations"  # None extracts nothing
    max_tasks: int | None = None
    batch_size: int = 1
    max_batch_tokens: int | None = None
    distributed: bool = False  # on all devices and processes; writes submission.json
    mesh_shape: tuple[int, int] | None = None  # None chooses
    shard_id: int = 0
    num_shards: int = 1
    dtype: str | None = None
    prompt_format: str = "chat"
    grid_encoding: str = "digits"
    max_train_pairs: int | None = None
    augmentations: int = 1
    max_model_len: int | None = None
    max_output_tokens: int = 1100
    temperature: float | None = None
    predictions_per_task: int = 1
    seed: int = 0
    teacher_forcing: bool = False
    solutions_path: str | None = None
    layers_to_extract: Sequence[str] | None = None
    hook_points: Sequence[str] = ("resid_post",)
    token_positions: str = "all"
    activation_dtype: str = "float16"
    no_logits: bool = False
    save_every_n_samples: int | None = 50
    save_every_n_batches: int | None = None
    max_shard_mb: float = 512
    resume: bool = False
    overwrite: bool = False
    upload_to_cloud: bool = False
    cloud_bucket: str | None = None
    upload_timeout: float = 600
    max_pending_gb: float = 50
    delete_after_upload: bool = False
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
