"""The decoder against torch transformers, live; where all parts meet, compiled as users do."""

import copy

import numpy as np
import pytest
from parity import TOLERANCE, generate, load_engine, log_softmax, prefill, worst_error

from utils.model.capture import CaptureSpec

torch = pytest.importorskip("torch", reason="torch is not installed: requirements-torch.txt")
import reference  # noqa: E402
import transformers  # noqa: E402

AS_USERS_COMPILE = ("llama3", "gemma2", "qwen3_moe")  # with every part of the decoder


def cases():
    """Each in haste or optimised, and the other way among the slow tests."""
    for case in reference.CASES:
        for optimised in (False, True):
            slow = optimised != (case in AS_USERS_COMPILE)
            yield pytest.param(case, optimised, marks=[pytest.mark.slow] * slow)


@pytest.mark.parametrize(("case", "optimised"), [*cases()])
def test_live_reference(request, case, optimised, tmp_path):
    """Other weights and a longer prompt than the stored ones, in several files on disk."""
    if optimised:
        request.getfixturevalue("optimised")
    config, dtype = reference.CASES[case]
    model = reference.random_model(config, dtype, seed=7)
    reference.save(model, tmp_path, dtype, max_shard_size="20KB")
    prompt = np.random.default_rng(3).integers(3, config.vocab_size, 150)
    with torch.no_grad():
        ids = model.generate(
            torch.tensor(prompt)[None],
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[0].numpy()
    states, logits = reference.hidden_states(model, ids)
    first, decoded = generate(load_engine(tmp_path), [prompt.tolist()], 160, 12)
    assert decoded.tokens[0].tolist() == ids[150:].tolist()
    for name, expected in states.items():
        found = np.concatenate([first.captures[name][0, :150], decoded.captures[name][0]])
        assert worst_error(found, expected) < TOLERANCE, name
    expected = log_softmax(logits)[np.arange(149, 161), ids[150:]]
    np.testing.assert_allclose(decoded.logprobs[0], expected, atol=TOLERANCE)


@pytest.mark.usefixtures("optimised")
def test_the_text_model_of_one_of_text_and_images(tmp_path):
    """As the larger models of Gemma 3 are saved, with a vision tower that nobody reads."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "image_size": 28}
    config = transformers.Gemma3Config(
        text_config=reference.CASES["gemma3_text"][0].to_dict(),
        vision_config={**sizes, "num_attention_heads": 2, "model_type": "siglip_vision_model"},
        mm_tokens_per_image=4,
    )
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    ids = np.random.default_rng(2).integers(3, 150, 40).tolist()
    with torch.no_grad():
        expected = model(torch.tensor(ids)[None]).logits[0, -1].numpy()
    found = prefill(load_engine(tmp_path, ["resid_post.0"]), [ids], 40)
    np.testing.assert_allclose(
        log_softmax(found.logits[0, :160]), log_softmax(expected), atol=TOLERANCE
    )


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("case", ["llama3", "qwen2_sliding_yarn"])
def test_a_prompt_of_nine_thousand_tokens(case, tmp_path):
    """In chunks of 1,024, with a full and with a sliding window, and an answer behind it."""
    config, length = copy.deepcopy(reference.CASES[case][0]), 9000
    config.max_position_embeddings = 16384
    if case == "qwen2_sliding_yarn":
        config.sliding_window = 3000
    model = reference.random_model(config, seed=5)
    reference.save(model, tmp_path)
    ids = np.random.default_rng(1).integers(3, config.vocab_size, length).tolist()
    states, logits = reference.hidden_states(model, ids)
    engine = load_engine(tmp_path)
    # The first layers' states, and the last one's after all the attention.
    names = [f"{point}.{i}" for i in (1, 2) for point in ("attn_out", "resid_post")]
    engine.model = engine.model.clone(capture=CaptureSpec(tuple(names)))
    result = prefill(engine, [ids[:-20]], length, [ids[-20:]], chunk=1024, slots=9216)
    for name in names:
        assert worst_error(result.captures[name][0], states[name]) < TOLERANCE, name
    expected = log_softmax(logits)[np.arange(length - 21, length - 1), ids[-20:]]
    np.testing.assert_allclose(result.logprobs[0], expected, atol=TOLERANCE)
