"""Stores what the reference says about every case, for machines without torch.

    python tests/golden/make_golden.py

One folder a case beside this file: a tiny checkpoint, and `reference.npz` with token ids, the hook
points of the residual stream in every layer, logits, and the tokens that greedy `generate` adds.
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from reference import CASES, hidden_states, random_model, save

HERE = Path(__file__).parent
PROMPT, NEW = 20, 6
STORED = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")


def main() -> None:
    for name, (config, dtype) in CASES.items():
        folder = HERE / name
        model = random_model(config, dtype)
        save(model, folder, dtype)
        (folder / "generation_config.json").unlink(missing_ok=True)
        prompt = np.random.default_rng(1).integers(3, config.vocab_size, PROMPT)
        ids = model.generate(
            torch.tensor(prompt)[None],
            attention_mask=torch.ones(1, PROMPT, dtype=torch.long),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[0].numpy()
        states, logits = hidden_states(model, ids)
        states = {name: x for name, x in states.items() if name.partition(".")[0] in STORED}
        np.savez_compressed(
            folder / "reference.npz",
            ids=ids.astype(np.int32),
            prompt=PROMPT,
            logits=logits,
            **states,
        )


if __name__ == "__main__":
    main()
