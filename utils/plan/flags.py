"""The flags that the inference scripts share; each is declared here once, with default and unit."""

import argparse

from utils.cli import float_at_least, int_at_least
from utils.model.capture import HOOK_POINTS, TOKEN_POSITIONS
from utils.plan.request import Request
from utils.prompt.formats import GRID_ENCODINGS, PROMPT_FORMATS


def add_input_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("input")
    group.add_argument(
        "--model_path",
        required=True,
        help="folder of a Hugging Face model: Llama, Mistral, Qwen; gs://BUCKET/FOLDER is fetched "
        "to a local cache",
    )
    group.add_argument(
        "--dataset_path",
        required=True,
        help="ARC tasks: Kaggle JSON, JSONL, one task file or a folder of them, .gz too; or "
        "gs://BUCKET/FILE",
    )
    group.add_argument(
        "--solutions_path",
        help="ground truth (default: the file next to a transformed dataset, where there is one)",
    )
    group.add_argument(
        "--max_tasks", type=int_at_least(1), help="take the first so many tasks (default: all)"
    )


def add_batch_flags(group: argparse._ActionsContainer, default: int, unit: str) -> None:
    group.add_argument(
        "--batch_size", type=int_at_least(1), default=default, help=f"samples a forward pass{unit}"
    )
    group.add_argument(
        "--max_batch_tokens",
        type=int_at_least(1),
        help=f"tokens a forward pass{unit}: long prompts go in smaller batches (default: as many "
        "as the memory of the device is estimated to hold)",
    )


def add_mesh_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("devices and processes")
    group.add_argument(
        "--mesh_shape",
        nargs="+",
        default=["auto"],
        metavar="D M",
        help="devices that share a batch, and devices that share a sample; their product is the "
        "number of devices that JAX sees (on v4 and v5p one a chip, half the cores in the slice's "
        "name); `auto` takes the smallest second number with which the run fits in memory; --plan "
        "compares several pairs",
    )
    add_batch_flags(group, 8, " and device")
    group.add_argument(
        "--coordinator_address",
        metavar="HOST:PORT",
        help="where process 0 listens; with --num_processes and --process_id, where the "
        "surroundings do not tell (default: what a TPU pod, Slurm or GKE says)",
    )
    group.add_argument(
        "--num_processes",
        type=int_at_least(1),
        help="processes of the run (default: see --coordinator_address)",
    )
    group.add_argument(
        "--process_id",
        type=int_at_least(0),
        help="this one's number, from 0 (default: see --coordinator_address)",
    )
    group.add_argument(
        "--coordinator_timeout",
        type=int_at_least(1),
        default=300,
        help="seconds to wait for all processes to come together",
    )
    group.add_argument(
        "--peer_timeout",
        type=int_at_least(6),
        default=45,
        help="seconds of silence after which a process counts as dead, and the others stop",
    )
    group.add_argument(
        "--shard_id",
        type=int_at_least(0),
        default=Request.shard_id,
        help="which of --num_shards parts of the tasks this run takes, from 0, for hosts that do "
        "not talk to each other; `python -m utils.shards merge` joins the results",
    )
    group.add_argument(
        "--num_shards", type=int_at_least(1), default=Request.num_shards, help="parts of the tasks"
    )


def add_plan_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("plan")
    group.add_argument(
        "--plan",
        metavar="SLICE",
        help="compile the run for a TPU slice (v4-8 .. v4-64, v5e-8 .. v5e-256, v5p-8 .., v6e-8 ..)"
        ", print memory, FLOPs, time and storage, and stop; needs jax[tpu], but no TPU (default: "
        "run)",
    )
    group.add_argument(
        "--plan_json", metavar="FILE", help="write the plan there too (default: nowhere)"
    )


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model and prompt")
    group.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="computation (default: bfloat16 on accelerators, float32 on CPU)",
    )
    group.add_argument(
        "--prompt_format",
        default=Request.prompt_format,
        metavar=f"{{{','.join(PROMPT_FORMATS)}}}|FILE",
        help="how a task is put to the model, or a Jinja file; a model must be prompted the way it "
        "was trained",
    )
    group.add_argument(
        "--grid_encoding",
        default=Request.grid_encoding,
        choices=GRID_ENCODINGS,
        help="how a grid is written",
    )
    group.add_argument(
        "--max_train_pairs",
        type=int_at_least(1),
        help="take the first so many train pairs of a task (default: all)",
    )
    group.add_argument(
        "--augmentations",
        metavar="N",
        type=int_at_least(1),
        default=Request.augmentations,
        help="run each test input in N views, at N times the cost: as it is, then with the whole "
        "task turned or mirrored (any 8 in a row hold all 8 ways), its colors permuted (black "
        "stays black) and its train pairs shuffled, as --seed draws it; answers are mapped back "
        "and voted into two attempts, and each item records its view",
    )
    group.add_argument(
        "--max_model_len",
        type=int_at_least(1),
        help="tokens of prompt and answer together; a longer prompt loses its first train pairs "
        "(default: what the model allows)",
    )


def add_generation_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("answers")
    group.add_argument(
        "--max_output_tokens",
        type=int_at_least(0),
        default=Request.max_output_tokens,
        help="tokens an answer; 0 extracts from the prompt alone",
    )
    group.add_argument(
        "--predictions_per_task",
        type=int_at_least(1),
        default=Request.predictions_per_task,
        help="answers to a test input; the first of several is greedy, and its states are kept",
    )
    group.add_argument(
        "--temperature",
        type=float_at_least(0),
        help="of the answers after the first, or of the only one (default: 0, greedy, for one "
        "answer; 0.7 for those after the first)",
    )
    group.add_argument(
        "--seed",
        type=int,
        default=Request.seed,
        help="of the random draws, also those of the views",
    )
    group.add_argument(
        "--teacher_forcing",
        action="store_true",
        help="run prompt and ground truth in one pass instead of generating",
    )


def add_capture_flags(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("what is extracted")
    group.add_argument(
        "--layers_to_extract",
        nargs="+",
        metavar="LAYER",
        help="layers from 0, negative from the end, or `all` (default: first, middle, last)",
    )
    group.add_argument(
        "--hook_points",
        nargs="+",
        default=Request.hook_points,
        choices=HOOK_POINTS,
        help="where in a layer; resid_post is the residual stream after it",
    )
    group.add_argument(
        "--token_positions",
        default=Request.token_positions,
        choices=TOKEN_POSITIONS,
        help="tokens whose states are kept; last is the prompt's last, which the answer's first "
        "token is predicted from",
    )
    group.add_argument(
        "--activation_dtype",
        default=Request.activation_dtype,
        choices=("float16", "float32"),
        help="on disk; what float16 cannot hold is stored as float32 and counted",
    )
    group.add_argument(
        "--no_logits",
        action="store_true",
        help="leave out output_logits; with --max_output_tokens 0 the pass ends after the last "
        "captured layer",
    )
    return group


def add_storage_flags(
    parser: argparse.ArgumentParser, save_every_n_samples: int | None = Request.save_every_n_samples
) -> None:
    group = parser.add_argument_group("storage")
    group.add_argument(
        "--activations_dir",
        default=Request.activations_dir,
        help="folder of the shards and metadata.json",
    )
    group.add_argument(
        "--save_every_n_samples",
        type=int_at_least(1),
        default=save_every_n_samples,
        help="samples a shard; a kill loses at most those of the open one"
        + ("" if save_every_n_samples else " (default: any)"),
    )
    group.add_argument(
        "--save_every_n_batches", type=int_at_least(1), help="batches a shard (default: any)"
    )
    group.add_argument(
        "--max_shard_mb",
        type=float_at_least(1),
        default=Request.max_shard_mb,
        help="megabytes a shard; it is closed at whichever of the three limits comes first",
    )
    group.add_argument("--resume", action="store_true", help="do what the run in the folder lacks")
    group.add_argument("--overwrite", action="store_true", help="replace the run in the folder")
    group.add_argument(
        "--dry_run",
        action="store_true",
        help="check everything, print tokens, samples, shards, bytes and free disk, and stop",
    )
    add_upload_flags(parser)


def add_upload_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("cloud storage")
    group.add_argument(
        "--upload_to_cloud",
        action="store_true",
        help="send every shard to a bucket while the model computes, each exactly once; manifest, "
        "predictions and submission follow; needs `gcloud auth application-default login` and "
        "roles/storage.objectUser, which --dry_run tests",
    )
    group.add_argument(
        "--cloud_bucket",
        metavar="gs://BUCKET/PREFIX",
        help="where to; a prefix holds one run, and several processes of a run share it (default: "
        "none, --upload_to_cloud needs one)",
    )
    group.add_argument(
        "--upload_timeout",
        metavar="SECONDS",
        type=float_at_least(1),
        default=Request.upload_timeout,
        help="seconds after the last sample, or of a full --max_pending_gb, in which the uploads "
        "must end; what is left stays on the disk, the exit code is 1, and --resume sends it",
    )
    group.add_argument(
        "--max_pending_gb",
        metavar="GB",
        type=float_at_least(0.001),
        default=Request.max_pending_gb,
        help="gigabytes (10^9 bytes) of shards that may wait for the network, in each process; "
        "beyond that computing waits",
    )
    group.add_argument(
        "--delete_after_upload",
        action="store_true",
        help="delete a shard from the disk once the bucket was seen to hold it; its manifest stays",
    )
