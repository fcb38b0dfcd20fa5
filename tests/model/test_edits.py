"""Interventions against the same changes made by hooks of torch, and what must change nothing."""

import jax
import numpy as np
import pytest
from parity import TOLERANCE, generate, load_engine, log_softmax, prefill, worst_error

from utils.model.autoencoder import decode, encode
from utils.model.interventions import Edit
from utils.model.layout import make_mesh

PROMPT, ANSWER = 45, 6
T = PROMPT + ANSWER


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The reference's model, the folder of its checkpoint, and a prompt."""
    pytest.importorskip("torch", reason="torch is not installed: requirements-torch.txt")
    import reference

    config, folder = reference.CASES["llama_linear"][0], tmp_path_factory.mktemp("model")
    made = reference.random_model(config, seed=11)
    reference.save(made, folder)
    prompt = np.random.default_rng(5).integers(3, config.vocab_size, PROMPT)
    return made, folder, prompt


def every_kind(rng):
    """(edit, constants, what it does to [N, W]) of every operation, at hook points of all kinds."""

    def vector(width):
        return rng.standard_normal(width).astype(np.float32)

    direction = vector(24) / 5
    direction /= np.linalg.norm(direction)
    weights = {
        "w_enc": rng.standard_normal((24, 50)).astype(np.float32) / 5,
        "b_enc": vector(50) / 10,
        "w_dec": rng.standard_normal((50, 24)).astype(np.float32) / 5,
        "b_dec": vector(24) / 10,
    }
    sae = {"architecture": "topk", "k": 8}

    def latents(x):
        return np.asarray(encode("topk", 8, weights, x))

    # The latent that fires most often, so that something is exchanged.
    latent = 7
    first, second, third = vector(24), vector(24), vector(40)
    exchanged = {"weights": weights, "latent": np.int32(latent)}

    def exchange(x, after):
        before = latents(x)[:, latent]
        return x + np.outer(after(before) - before, weights["w_dec"][latent])

    values = rng.standard_normal((T, 24)).astype(np.float32)
    return [
        (Edit("resid_pre.0", "add"), {"vector": first}, lambda x, at: x + first),
        (Edit("attn_in.0", "scale"), {"factor": np.float32(0.5)}, lambda x, at: x / 2),
        (Edit("q.0", "set"), {"vector": second}, lambda x, at: 0 * x + second),
        (Edit("k.1", "zero"), {}, lambda x, at: 0 * x),
        (Edit("v.1", "scale"), {"factor": np.float32(-2)}, lambda x, at: -2 * x),
        (Edit("z.0", "zero"), {}, lambda x, at: 0 * x),
        (
            Edit("resid_mid.1", "ablate_direction"),
            {"vector": direction},
            lambda x, at: x - np.outer(x @ direction, direction),
        ),
        (Edit("mlp_act.1", "add"), {"vector": third}, lambda x, at: x + third),
        (
            Edit("mlp_in.2", "latent", **sae),
            {**exchanged, "amount": np.float32(3)},
            lambda x, at: exchange(x, lambda before: 3),
        ),
        (
            Edit("attn_out.2", "latent", **sae, relative=True),
            {**exchanged, "amount": np.float32(-1)},
            lambda x, at: exchange(x, lambda before: -before),
        ),
        (
            Edit("resid_post.1", "reconstruct", **sae),
            {"weights": weights},
            lambda x, at: np.asarray(decode(weights, latents(x))),
        ),
        (Edit("mlp_out.0", "patch"), {"values": values}, lambda x, at: values[at]),
        # The second of two at one hook sees what the first made.
        (Edit("resid_pre.0", "scale"), {"factor": np.float32(3)}, lambda x, at: 3 * x),
    ]


def changed_reference(model, prompt, kinds, masks):
    """Greedy tokens, states and logits with the changes made by hooks."""
    import reference

    made, ids = model, list(prompt)

    def by_name(length):
        changes = {}
        for (edit, _, change), mask in zip(kinds, masks, strict=True):
            before = changes.get(edit.hook, lambda x: x)

            def new(x, before=before, change=change, mask=mask):
                x, at = before(x).copy(), np.flatnonzero(mask[:length])
                if len(at):
                    x[at] = change(x[at], at)
                return x

            changes[edit.hook] = new
        return changes

    while len(ids) < T:
        _, logits = reference.hidden_states(made, ids, by_name(len(ids)))
        ids.append(int(logits[-1].argmax()))
    return ids, *reference.hidden_states(made, ids, by_name(T))


@pytest.mark.parametrize("shape", [(1, 1), (2, 2)])
def test_every_operation_is_what_hooks_of_torch_make(model, shape):
    """In chunks of a prompt and in each step of decoding, at tokens of which some lie in both; the
    row beside it is left alone."""
    made, folder, prompt = model
    rng = np.random.default_rng(1)
    kinds = every_kind(rng)
    masks = [rng.random(T) < 0.4 for _ in kinds]
    for (edit, _, _), mask in zip(kinds, masks, strict=True):
        if edit.op == "patch":
            mask[PROMPT:] = False
    ids, states, logits = changed_reference(made, prompt, kinds, masks)

    mesh = make_mesh(*shape, jax.devices()[: shape[0] * shape[1]])
    edits = [edit for edit, _, _ in kinds]
    constants = [{n: v for n, v in c.items() if n != "values"} for _, c, _ in kinds]
    engine = load_engine(folder, mesh=mesh, edits=edits)
    put = jax.tree.map(lambda x: jax.device_put(x, engine.model.layout.sharding()), constants)
    engine.constants = put
    other = [9, 8, 7]
    changes, answers = [], []
    for (_, given, _), mask in zip(kinds, masks, strict=True):
        both = np.zeros((2, T), bool)
        both[0] = mask
        arrays = {"mask": both}
        if "values" in given:
            arrays["values"] = np.broadcast_to(given["values"], (2, *given["values"].shape))
        changes.append(arrays)
        answers.append(None if "values" in given else {"mask": both[:, PROMPT:]})
    first, decoded = generate(
        engine,
        [list(prompt), other],
        64,
        ANSWER,
        answer_changes=answers,
        changes=changes,
        chunk=16,
    )
    assert np.asarray(decoded.tokens)[0].tolist() == ids[PROMPT:]
    for name in first.captures:
        if name not in states:  # resid_mid.1, which the hooks of torch change from without
            assert name == "resid_mid.1"
            continue
        found = np.concatenate([first.captures[name][0, :PROMPT], decoded.captures[name][0]])
        assert worst_error(found, states[name]) < TOLERANCE, name
    expected = log_softmax(logits)[np.arange(PROMPT - 1, T - 1), ids[PROMPT:]]
    np.testing.assert_allclose(decoded.logprobs[0], expected, atol=TOLERANCE)
    forced = prefill(
        engine, [ids[:PROMPT], other], 64, [ids[PROMPT:], []], chunk=16, changes=changes
    )
    np.testing.assert_allclose(forced.logprobs[0, :ANSWER], expected, atol=TOLERANCE)
    plain = prefill(load_engine(folder, names=["resid_post.2"]), [other], 64, chunk=16)
    found = first.captures["resid_post.2"][1, :3]
    assert worst_error(found, plain.captures["resid_post.2"][0, :3]) < TOLERANCE


def test_other_values_compile_nothing(model):
    """Masks, vectors and amounts are arguments; an edit that meets no token changes no bit."""
    _, folder, prompt = model
    edited = load_engine(folder, ["resid_post.1"], edits=[Edit("resid_post.0", "add")])
    plain = prefill(load_engine(folder, ["resid_post.1"]), [list(prompt)], 64, chunk=16)
    found = []
    for chosen, size in ((False, 1), (True, 1), (True, 2)):
        vector = np.full(24, size, np.float32)
        edited.constants = [{"vector": jax.device_put(vector, edited.model.layout.sharding())}]
        changes = [{"mask": np.full((1, 64), chosen)}]
        part = prefill(edited, [list(prompt)], 64, chunk=16, changes=changes)
        found.append(part.captures["resid_post.1"][0, :PROMPT])
    np.testing.assert_array_equal(found[0], plain.captures["resid_post.1"][0, :PROMPT])
    assert not np.array_equal(found[0], found[1]) and not np.array_equal(found[1], found[2])
    assert len(edited._programs) == 1
