"""Autoencoders in every form that is read, against SAELens's own latents, and what is refused."""

import json
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from utils.errors import UserError
from utils.model.autoencoder import (
    Autoencoder,
    encode,
    load_autoencoder,
    top,
)
from utils.model.capture import HOOK_POINTS, capture_name, hook_name

GOLDEN = Path(__file__).parents[1] / "golden" / "saelens"
QWEN = GOLDEN / "SAE-Res-Tiny-W32K-L0_4" / "layer11.sae.pt"
D, L = 8, 24


@pytest.fixture(scope="module")
def latents():
    return dict(np.load(GOLDEN / "latents.npz"))


@pytest.fixture
def folder(tmp_path):
    """A copy of a topk that SAELens trained, and a function that changes its cfg.json."""
    copy = shutil.copytree(GOLDEN / "topk", tmp_path / "topk")

    def change(**fields):
        config = json.loads((copy / "cfg.json").read_text())
        (copy / "cfg.json").write_text(json.dumps({**config, **fields}))
        return copy

    return change


@pytest.mark.parametrize("name", ["standard", "topk", "batchtopk", "batchtopk_checkpoint"])
def test_what_saelens_trained_gives_its_latents(name, latents):
    sae = load_autoencoder(GOLDEN / name)
    kind = name.removesuffix("_checkpoint")
    saved_as = {"batchtopk": "jumprelu", "batchtopk_checkpoint": "batchtopk"}
    assert sae.architecture == saved_as.get(name, name) and sae.hook == "resid_post.2"
    assert (sae.width, sae.num_latents, sae.k) == (D, L, 4 if name == "topk" else None)
    assert len(sae.sha256) == 64 and sae.path == str(GOLDEN / name)
    encoded = sae.encode(latents["x"])
    np.testing.assert_allclose(encoded, latents[kind], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        sae.decode(encoded), latents[f"{kind}_decoded"], rtol=1e-5, atol=1e-5
    )
    assert ((encoded > 0) == (latents[kind] > 0)).all()
    # One row, a batch of batches, and rows in other dtypes are encoded alike.
    assert np.array_equal(sae.encode(latents["x"].reshape(4, 16, D)).reshape(-1, L), encoded)
    halves = latents["x"].astype(np.float16)
    assert np.array_equal(sae.encode(halves), sae.encode(halves.astype(np.float32)))


@pytest.mark.parametrize("architecture", ["standard", "topk", "batchtopk", "jumprelu"])
def test_saelens_gives_the_latents_of_what_is_written(architecture, latents, tmp_path):
    """Here against the formula; against SAELens itself where that is installed."""
    weights = dict(load_autoencoder(GOLDEN / "batchtopk").weights)
    if architecture not in ("batchtopk", "jumprelu"):
        del weights["threshold"]
    weights["w_enc"] = np.asfortranarray(weights["w_enc"])  # safetensors takes bytes as they lie
    about = {"held_out": {"l0": 4.0}}
    made = Autoencoder(architecture, 5, "resid_post.11", weights)
    made.save(tmp_path / "sae", about)
    config = json.loads((tmp_path / "sae" / "cfg.json").read_text())
    assert config["metadata"]["hook_name"] == "blocks.11.hook_resid_post"
    assert config["metadata"]["held_out"] == about["held_out"]
    sae, x = load_autoencoder(tmp_path / "sae"), latents["x"]
    assert sae.hook == "resid_post.11" and sae.k == (5 if architecture == "topk" else None)
    assert all(np.array_equal(sae.weights[name], weights[name]) for name in weights)
    before = (x - weights["b_dec"]) @ weights["w_enc"] + weights["b_enc"]
    lowest = {"topk": np.sort(before)[:, [-5]], "standard": 0.0}
    kept = (
        before >= lowest[architecture]
        if architecture in lowest
        else before > sae.weights["threshold"]
    )
    want = np.where(kept, np.maximum(before, 0), 0)
    np.testing.assert_allclose(sae.encode(x), want, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match=r"cannot write .*sae: .*; .*, or choose another folder"):
        made.save(tmp_path / "sae", {})
    sae_lens = pytest.importorskip("sae_lens")
    import torch

    theirs = sae_lens.SAE.load_from_disk(tmp_path / "sae")
    with torch.no_grad():
        encoded = theirs.encode(torch.tensor(x))
        decoded = theirs.decode(encoded).numpy()
    np.testing.assert_allclose(sae.encode(x), encoded.numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(sae.decode(sae.encode(x)), decoded, rtol=1e-5, atol=1e-5)


def test_a_configuration_of_before_saelens_6_is_read(folder, latents):
    old = folder()
    config = {
        "d_in": D,
        "d_sae": L,
        "activation_fn_str": "topk",
        "hook_point": "blocks.2.hook_mlp_out",
    }
    config |= {"activation_fn_kwargs": {"k": 4}, "normalize_activations": None}
    (old / "cfg.json").write_text(json.dumps(config))
    sae = load_autoencoder(old)
    assert (sae.architecture, sae.k, sae.hook) == ("topk", 4, "mlp_out.2")
    np.testing.assert_allclose(sae.encode(latents["x"]), latents["topk"], rtol=1e-5, atol=1e-5)


def test_an_autoencoder_without_a_hook_has_none(folder):
    assert load_autoencoder(folder(metadata={})).hook is None
    head = {"hook_name": "blocks.2.attn.hook_z", "hook_head_index": 3}
    with pytest.raises(UserError, match="trained on one attention head, number 3"):
        load_autoencoder(folder(metadata=head))


def test_the_former_form_is_still_read(tmp_path, latents):
    random = np.random.default_rng(0)
    tensors = {
        "encoder": random.standard_normal((D, L), np.float32),
        "bias": random.standard_normal(L, np.float32),
        "decoder": random.standard_normal((L, D), np.float32),
        "shift": random.standard_normal(D, np.float32),
        "center": random.standard_normal(D, np.float32),
        "scale": np.float32([3]),
    }
    save_file(tensors, tmp_path / "sae.safetensors")
    (tmp_path / "config.json").write_text('{"k": 4, "activation": "resid_post.11"}')
    sae, t = load_autoencoder(tmp_path), tensors
    assert (sae.architecture, sae.k, sae.hook) == ("topk", 4, "resid_post.11")
    x = latents["x"]
    before = ((x - t["center"]) / 3 - t["shift"]) @ t["encoder"] + t["bias"]
    want = np.asarray(top(np.maximum(before, 0), 4))
    np.testing.assert_allclose(sae.encode(x), want * 3, rtol=1e-4, atol=1e-5)
    rebuilt = (want @ t["decoder"] + t["shift"]) * 3 + t["center"]
    np.testing.assert_allclose(sae.decode(sae.encode(x)), rebuilt, rtol=1e-4, atol=1e-4)


def test_a_file_of_qwen_scope_is_read(latents):
    """Its tensors are of three dtypes, one transposed in its storage and one a parameter."""
    sae = load_autoencoder(QWEN)
    assert (sae.architecture, sae.k, sae.hook) == ("topk", 4, "resid_post.11")
    encoded = sae.encode(latents["x"])
    np.testing.assert_allclose(encoded, latents["qwen"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(sae.decode(encoded), latents["qwen_decoded"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (None, pickle.dumps(print), "asks for 'builtins.print', which is no part of a tensor"),
        (
            b"_rebuild_tensor_v2",
            b"_rebuild_qtensor12",
            "asks for 'torch._utils._rebuild_qtensor12'",
        ),
        (b"QK\x00", b"QK\x01", "a tensor reaches beyond its storage"),
        (b"b_dec", b"B_dec", "'b_dec' is missing"),
        (b"FloatStorage", b"HalfStorageX", "asks for 'torch.HalfStorageX'"),
        (b"K\x18", b"K\x17", "storage 1 has 48 bytes"),
        (None, b"\x80\x02", "it is damaged"),
    ],
)
def test_nothing_of_a_file_of_torch_is_run(old, new, said, tmp_path):
    file = tmp_path / "L0_4" / QWEN.name
    file.parent.mkdir()
    with zipfile.ZipFile(QWEN) as source, zipfile.ZipFile(file, "w") as archive:
        for name in source.namelist():
            content = source.read(name)
            if name.endswith("data.pkl"):
                content = new if old is None else content.replace(old, new)
            archive.writestr(name, content)
    with pytest.raises(UserError, match=said):
        load_autoencoder(file)


def test_a_file_that_is_not_as_published_is_refused(tmp_path):
    (tmp_path / "weights.pt").write_bytes(b"")
    with pytest.raises(UserError, match=r"those called layer\{n\}.sae.pt are read"):
        load_autoencoder(tmp_path / "weights.pt")
    file = tmp_path / "layer3.sae.pt"
    file.write_bytes(b"PK" + bytes(100))
    with pytest.raises(UserError, match="ends in -L0_50"):
        load_autoencoder(file)
    (tmp_path / "L0_50").mkdir()
    with pytest.raises(UserError, match="it is damaged"):
        load_autoencoder(file.rename(tmp_path / "L0_50" / file.name))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"architecture": "gated"}, "architecture is 'gated', not one of standard, topk"),
        ({"architecture": "transcoder"}, "architecture is 'transcoder'"),
        ({"architecture": "jumprelu"}, "'threshold' is missing"),
        ({"activation_fn": "tanh-relu"}, "activation function is 'tanh-relu'"),
        ({"normalize_activations": "layer_norm"}, r"normalises its input \('layer_norm'\)"),
        ({"normalize_activations": "expected_average_only_in"}, "not folded into its weights"),
        ({"metadata": {"hook_name": "blocks.2.hook_scale"}}, "none of the places captured"),
        ({"k": 25}, "its k, 25, is not between 1 and its 24 latents"),
        ({"k": None}, "it is damaged"),
    ],
)
def test_what_would_give_other_latents_is_refused(folder, fields, said):
    with pytest.raises(UserError, match=f"topk holds no autoencoder that can be read: .*{said}"):
        load_autoencoder(folder(**fields))


def test_damaged_folders_are_refused(folder, tmp_path):
    place = folder()
    tensors = load_file(place / "sae_weights.safetensors")
    for change, said in (
        ({"W_dec": tensors["W_dec"][:, 1:]}, r"w_dec has shape \[24, 7\], which does not fit"),
        ({"b_enc": tensors["b_enc"] * np.nan}, "b_enc holds values that are not finite"),
        ({"scaling_factor": tensors["b_enc"]}, "holds scaling_factor, whose meaning"),
    ):
        save_file({**tensors, **change}, place / "sae_weights.safetensors")
        with pytest.raises(UserError, match=said):
            load_autoencoder(place)
    (place / "sae_weights.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(UserError, match="it is damaged"):
        load_autoencoder(place)
    (place / "sae_weights.safetensors").unlink()
    with pytest.raises(UserError, match="No such file or directory"):
        load_autoencoder(place)
    (place / "cfg.json").write_text("[")
    with pytest.raises(UserError, match="it is damaged"):
        load_autoencoder(place)
    with pytest.raises(UserError, match=r"nothing holds no .*: neither a folder with cfg.json"):
        load_autoencoder(tmp_path / "nothing")


def test_hook_names_go_to_those_of_transformerlens_and_back():
    for point in HOOK_POINTS:
        assert capture_name(hook_name(f"{point}.11")) == f"{point}.11"
    assert capture_name("model.layers.3") == "resid_post.3"
    assert hook_name("z.2") == "blocks.2.attn.hook_z"
    assert hook_name("mlp_act.2") == "blocks.2.mlp.hook_post"


def test_the_k_largest_are_those_of_numpy():
    values = np.maximum(np.random.default_rng(3).standard_normal((50, 40), np.float32), 0)
    values[0] = 0
    values[1, :5] = 1.5  # ties
    for k in (1, 7, 40):
        smallest = np.sort(values, axis=1)[:, [-k]]
        assert np.array_equal(top(values, k), np.where(values >= smallest, values, 0))
        assert np.array_equal(top(values[None], k)[0], top(values, k))
        smallest = np.sort(values, axis=None)[-20 * k]
        assert np.array_equal(top(values, 20 * k, None), np.where(values >= smallest, values, 0))


def test_nothing_is_compiled_anew_for_other_weights(latents):
    import jax

    traced = []

    @jax.jit
    def encoded(weights, x):
        traced.append(1)
        return encode("topk", 4, weights, x)

    for factor in (1, 2):
        weights = load_autoencoder(GOLDEN / "topk").weights
        encoded({name: value * factor for name, value in weights.items()}, latents["x"])
    assert len(traced) == 1
