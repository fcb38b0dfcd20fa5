"""The same rows through torch, SAELens and dictionary_learning, each the real library."""

import json
import re
from collections import Counter

import numpy as np
import pytest
from runs import sorted_rows

from utils.dataset import ActivationDataset, Selection
from utils.dataset.bridges import DictionaryLearningBuffer, TorchRows, export_for_saelens, hook_name
from utils.errors import UserError

torch = pytest.importorskip("torch", reason="torch is not installed: requirements-torch.txt")


@pytest.fixture
def dataset(run_folder):
    return ActivationDataset(run_folder, Selection(layer=2, part="prompt"))


def test_torch_gives_the_rows_of_the_batches(dataset):
    loader = torch.utils.data.DataLoader(TorchRows(dataset, 48), batch_size=None)
    batches = list(loader)
    assert all(batch.dtype == torch.float32 for batch in batches)
    want = [batch.activations for batch in dataset.batches(48)]
    assert [len(batch) for batch in batches] == [len(batch) for batch in want]
    assert np.array_equal(torch.cat(batches).numpy(), np.concatenate(want))


def test_workers_share_the_rows_and_hear_of_epochs(dataset):
    rows = TorchRows(dataset, 48, shuffle_buffer=100, seed=3)
    loader = torch.utils.data.DataLoader(
        rows,
        batch_size=None,
        num_workers=2,
        persistent_workers=True,
        multiprocessing_context="spawn",  # JAX's threads may not live through a fork
    )
    want = dataset.rows().activations
    epochs = []
    for epoch in range(2):
        rows.set_epoch(epoch)
        epochs.append(torch.cat(list(loader)).numpy())
        assert np.array_equal(sorted_rows(epochs[-1]), sorted_rows(want))
    assert not np.array_equal(*epochs)


def test_the_ranks_of_a_distributed_training_share_the_rows(dataset):
    ranks = [TorchRows(dataset, 48, worker=rank, workers=3) for rank in range(3)]
    found = [torch.cat([*rank]).numpy() for rank in ranks]
    assert np.array_equal(
        sorted_rows(np.concatenate(found)), sorted_rows(dataset.rows().activations)
    )


def test_the_dictionary_learning_buffer_goes_round_and_round(dataset):
    buffer = DictionaryLearningBuffer(dataset, 32, shuffle_buffer=64)
    count = len(dataset.rows()) // 32
    batches = [next(buffer) for _ in range(2 * count)]
    assert {tuple(batch.shape) for batch in batches} == {(32, 32)}
    stored = Counter(row.tobytes() for row in dataset.rows().activations.astype(np.float32))
    for epoch in (batches[:count], batches[count:]):
        rows = Counter(row.tobytes() for row in torch.cat(epoch).numpy())
        assert rows.total() == 32 * count and rows <= stored
    assert json.loads(json.dumps(buffer.config))["activation"] == "resid_post.2"
    once = list(DictionaryLearningBuffer(dataset, 32, epochs=1, drop_last=False))
    assert np.array_equal(torch.cat(once).numpy(), dataset.rows().activations)


def test_dictionary_learning_trains_on_it(dataset, tmp_path):
    training = pytest.importorskip("dictionary_learning.training")
    from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer

    trainer = {
        "trainer": TopKTrainer,
        "dict_class": AutoEncoderTopK,
        "steps": 20,
        "warmup_steps": 5,
        "activation_dim": dataset.width,
        "dict_size": 64,
        "k": 8,
        "layer": 2,
        "lm_name": "tiny",
        "device": "cpu",
    }
    training.trainSAE(
        data=DictionaryLearningBuffer(dataset, 32, shuffle_buffer=64),
        trainer_configs=[trainer],
        steps=20,
        save_dir=str(tmp_path),
        device="cpu",
        autocast_dtype=torch.float32,
    )
    saved = json.loads((tmp_path / "trainer_0" / "config.json").read_text())
    assert saved["buffer"]["d_submodule"] == dataset.width
    weights = torch.load(tmp_path / "trainer_0" / "ae.pt")
    assert weights["decoder.weight"].shape == (dataset.width, 64)


def test_the_export_is_a_dataset_of_whole_contexts(dataset, tmp_path, caplog):
    from datasets import load_from_disk

    caplog.set_level("INFO")
    fields = export_for_saelens(dataset, tmp_path / "cached", 16)
    rows = dataset.rows()
    whole = len(rows) // 16
    made = load_from_disk(tmp_path / "cached").with_format("numpy")
    assert len(made) == whole and fields["training_tokens"] == 16 * whole
    states = np.concatenate([made[i]["blocks.2.hook_resid_post"] for i in range(whole)])
    assert np.array_equal(states, rows.activations[: 16 * whole].astype(np.float32))
    ids = np.concatenate([made[i]["token_ids"] for i in range(whole)])
    assert np.array_equal(ids, rows.token_ids[: 16 * whole])
    left = len(rows) - 16 * whole
    assert left and f"left out the last {left} rows" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cached"]
    with pytest.raises(UserError, match="cached exists: choose another"):
        export_for_saelens(dataset, tmp_path / "cached", 16)
    with pytest.raises(UserError, match="shuffle_buffer, here 4, as large"):
        export_for_saelens(dataset, tmp_path / "other", 16, shuffle_buffer=4)
    with pytest.raises(UserError, match="fewer rows than a context"):
        export_for_saelens(dataset, tmp_path / "other", 10**6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cached"]


def test_all_of_an_unfinished_export_is_in_one_folder(dataset, tmp_path, monkeypatch):
    """The one that the next export removes after a kill."""
    from datasets import Dataset

    def stopped(self, folder):
        assert [path.suffix for path in tmp_path.iterdir()] == [".partial"]
        raise OSError("a disk that fails")

    monkeypatch.setattr(Dataset, "save_to_disk", stopped)
    with pytest.raises(OSError, match="a disk that fails"):
        export_for_saelens(dataset, tmp_path / "cached", 16)
    assert not list(tmp_path.iterdir())


def test_saelens_reads_the_export(dataset, tmp_path):
    store = pytest.importorskip("sae_lens.training.activations_store")
    fields = export_for_saelens(dataset, tmp_path / "cached", 16)
    activations = store.ActivationsStore(
        model=None,
        dataset=None,
        streaming=False,
        hook_name=fields["hook_name"],
        hook_head_index=None,
        context_size=fields["context_size"],
        d_in=dataset.width,
        n_batches_in_buffer=2,
        total_training_tokens=fields["training_tokens"],
        store_batch_size_prompts=2,
        train_batch_size_tokens=16,
        prepend_bos=False,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype="float32",
        cached_activations_path=fields["cached_activations_path"],
    )
    rows = dataset.rows().activations[: fields["training_tokens"]].astype(np.float32)
    batches = [activations.next_batch() for _ in range(len(rows) // 16 // 2 * 2)]
    stored = Counter(row.tobytes() for row in rows)
    assert {tuple(batch.shape) for batch in batches} == {(16, dataset.width)}
    read = Counter(row.tobytes() for row in torch.cat(batches).numpy())
    assert read.keys() <= stored.keys() and len(read) > 0.9 * len(stored)


def test_saelens_trains_on_it(dataset):
    config = pytest.importorskip("sae_lens.config")
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    rows = TorchRows(dataset, 32, shuffle_buffer=64, epochs=None, drop_last=True)
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=dataset.width, d_sae=64, k=8))
    before = sae.W_dec.detach().clone()
    trainer = SAETrainer(
        cfg=config.SAETrainerConfig(
            total_training_samples=640, train_batch_size_samples=32, lr=1e-3, lr_end=1e-4
        ),
        sae=sae,
        data_provider=iter(rows),
    )
    trainer.fit()
    assert not torch.equal(sae.W_dec, before)


def test_hook_points_are_called_as_transformer_lens_does():
    assert hook_name("resid_post.11") == "blocks.11.hook_resid_post"
    assert hook_name("attn_out.0") == "blocks.0.hook_attn_out"


def test_without_torch_it_says_so(dataset, monkeypatch):
    monkeypatch.setattr("utils.dataset.bridges.torch", None)
    for bridge in (TorchRows, DictionaryLearningBuffer):
        with pytest.raises(UserError) as error:
            bridge(dataset, 8)
        assert re.search("pip install torch", str(error.value))
