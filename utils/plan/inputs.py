"""Models and datasets that lie in a bucket, as copies on this disk. All raise UserError for what is
not there, cannot be read, or does not fit on the disk."""

import logging
from dataclasses import replace
from pathlib import Path

from utils.arc.tasks import SUFFIXES, solutions_names, split_suffix
from utils.errors import UserError
from utils.model.adapters import CONFIG
from utils.model.files import model_folder
from utils.plan.request import Request
from utils.store.bucket import BucketFolder, is_uri
from utils.store.copies import copied

OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".msgpack", ".h5", ".ot", ".onnx", ".gguf")
log = logging.getLogger(__name__)


def localized(request: Request) -> Request:
    """The request with local paths for what it reads from buckets, and for the model the folder
    that holds its files."""
    for name in ("model_path", "adapter", "dataset_path", "solutions_path"):
        uri = getattr(request, name)
        if uri is not None and is_uri(uri):
            read = model if name in ("model_path", "adapter") else tasks
            local = str(read(uri, f"--{name}"))
            log.info("%s is read from its copy %s", uri, local)
            request = replace(request, **{name: local})
    return replace(request, model_path=str(model_folder(request.model_path)))


def model(uri: str, flag: str = "--model_path") -> Path:
    """The folder of a Hugging Face model or of an adapter; weights in other formats than
    safetensors are left."""
    bucket = BucketFolder(uri, flag)
    wanted = {n: r for n, r in bucket.listing().items() if not n.endswith(OTHER_WEIGHTS)}
    if not {"config.json", CONFIG} & wanted.keys():
        named = CONFIG if flag == "--adapter" else "config.json"
        raise UserError(f"{flag} {uri} holds no {named}: check the path")
    return copied(bucket, wanted)


def tasks(uri: str, flag: str) -> Path:
    """A file of tasks, with the ground truth beside it; or a folder of files."""
    is_file = bool(split_suffix(uri)[1])
    folder, _, name = uri.rpartition("/") if is_file else (uri, "", "")
    bucket = BucketFolder(folder, flag)
    there = bucket.listing().items()
    wanted = {n: r for n, r in there if split_suffix(n)[1] and not n.startswith(".")}
    if is_file and name not in wanted:
        raise UserError(f"{flag} {uri} does not exist; check the path")
    if not wanted:
        raise UserError(f"{flag} {uri} holds no {' or '.join(SUFFIXES)} file: check the path")
    if is_file:
        wanted = {n: wanted[n] for n in {name, *solutions_names(name)} & wanted.keys()}
    return copied(bucket, wanted) / name
