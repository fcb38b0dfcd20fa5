"""Selected activation rows for the libraries that train sparse autoencoders in torch.

    torch                 DataLoader(TorchRows(dataset, 4096), batch_size=None)
    SAELens               export_for_saelens(dataset, folder)
    dictionary_learning   trainSAE(data=DictionaryLearningBuffer(dataset, 4096), ...)

None of these libraries is needed for anything else.
"""

# B rows of a batch   D model width   N context of an export

import logging
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from utils.dataset import ActivationDataset
from utils.errors import UserError
from utils.model.capture import hook_name
from utils.store.local import check_writable, new_folder

try:
    import torch
    from torch.utils.data import IterableDataset, get_worker_info
except ImportError:
    torch, IterableDataset = None, object

log = logging.getLogger(__name__)


class TorchRows(IterableDataset):
    """Batches of rows as float32 tensors [B, D]; give it to a `DataLoader` with `batch_size=None`.

    options: as of `ActivationDataset.batches`. `worker` and `workers` are there for the ranks of a
    distributed training; the workers of each rank's loader share its part, so that each row comes
    once in all. With more shares than shards some have nothing. `set_epoch` draws the next order,
    as a distributed sampler's does. Raises UserError where torch is not installed.
    """

    def __init__(self, dataset: ActivationDataset, batch_size: int, **options: Any):
        _need_torch()
        super().__init__()
        self.dataset, self.batch_size, self.options = dataset, batch_size, options
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # for living workers too

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def __iter__(self) -> Iterator[Any]:
        options = {"seed": 0, "worker": 0, "workers": 1, **self.options}
        options["seed"] += int(self._epoch)
        if loader := get_worker_info():
            options["worker"] = options["worker"] * loader.num_workers + loader.id
            options["workers"] *= loader.num_workers
        for rows in self.dataset.batches(self.batch_size, **options):
            yield torch.from_numpy(rows.activations)


class DictionaryLearningBuffer(Iterator):
    """What dictionary_learning's `trainSAE` takes as `data`: an iterator of tensors [B, D].

    options: as of `ActivationDataset.batches`; epochs is None, without end, unless given, and the
    last batch of a pass is left out unless it is whole. config is what the library stores beside
    its dictionaries. Raises UserError where torch is not installed.
    """

    def __init__(
        self, dataset: ActivationDataset, out_batch_size: int, device: str = "cpu", **options: Any
    ):
        _need_torch()
        self.d_submodule, self.out_batch_size, self.device = dataset.width, out_batch_size, device
        options = {"epochs": None, "drop_last": True, **options}
        self._batches = dataset.batches(out_batch_size, **options)
        self.config = {
            "d_submodule": dataset.width,
            "out_batch_size": out_batch_size,
            "activation": dataset.name,
            "folders": [str(folder) for folder in dataset.folders],
            "selection": repr(dataset.selection),
        }

    def __next__(self) -> Any:
        return torch.from_numpy(next(self._batches).activations).to(self.device)


def export_for_saelens(
    dataset: ActivationDataset,
    folder: str | Path,
    context_size: int = 64,
    *,
    shuffle_buffer: int = 0,
    seed: int = 0,
) -> dict[str, Any]:
    """Writes the rows as a Hugging Face dataset that SAELens reads as cached activations.

    One row of it holds `context_size` of ours: the activations, float32 [N, D], under the name that
    SAELens gives the hook point, and `token_ids`, int32 [N]. What does not fill the last row is
    left out, and logged. Returns the fields of SAELens's configuration that have to agree with it.

    Raises UserError: the folder is there already, fewer rows than one context.
    """
    from datasets import Array2D, Dataset, Features, Sequence, Value
    from datasets.exceptions import DatasetGenerationError

    folder, column = Path(folder), hook_name(dataset.name)
    if folder.exists():
        raise UserError(f"{folder} exists: choose another folder for the export")
    if context_size < 1 or (shuffle_buffer and shuffle_buffer < context_size):
        raise UserError(
            f"context_size {context_size} must be at least 1, and a shuffle_buffer, here "
            f"{shuffle_buffer}, as large"
        )
    check_writable(folder.parent)
    states = Array2D((context_size, dataset.width), "float32")
    token_ids = Sequence(Value("int32"), length=context_size)
    features = Features({column: states, "token_ids": token_ids})
    left = whole = 0

    def contexts() -> Iterator[dict[str, np.ndarray]]:
        nonlocal left, whole
        for rows in dataset.batches(context_size, shuffle_buffer=shuffle_buffer, seed=seed):
            if len(rows) == context_size:
                whole += 1
                yield {column: rows.activations, "token_ids": rows.token_ids}
            else:
                left = len(rows)
        if not whole:
            raise UserError(f"the selection has fewer rows than a context of {context_size}")

    try:
        with (
            new_folder(folder) as unfinished,
            tempfile.TemporaryDirectory(dir=unfinished) as scratch,
        ):
            made = Dataset.from_generator(
                contexts, features=features, cache_dir=scratch, fingerprint=uuid.uuid4().hex
            )
            made.save_to_disk(unfinished)
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise
    if left:
        log.info("left out the last %d rows, which do not fill a context of %d", left, context_size)
    return {
        "use_cached_activations": True,
        "cached_activations_path": str(folder),
        "hook_name": column,
        "context_size": context_size,
        "training_tokens": len(made) * context_size,
    }


def _need_torch() -> None:
    if torch is None:
        raise UserError("this needs torch: pip install torch")
