"""Makes the autoencoders that SAELens trained, for tests/model/test_autoencoder.py.

    pip install sae-lens
    python tests/golden/make_saelens.py

Each is trained for a few steps by SAELens's own trainer, on rows with a mean and a scale, and saved
by SAELens. `latents.npz` holds rows, and the latents and reconstructions that SAELens gives them.
Beside them lies a random autoencoder in the form of Qwen-Scope's files.
"""

from pathlib import Path

import numpy as np
import sae_lens
import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training.sae_trainer import SAETrainer

FOLDER = Path(__file__).parent / "saelens"
D, L = 8, 24


def batches(seed: int):
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randn(64, D, generator=generator) * 3 + torch.arange(D)


def qwen_scope(x: torch.Tensor):
    """Writes a file in the form of Qwen-Scope; its latents and reconstructions of x, by hand."""
    torch.manual_seed(0)
    stored = {
        "W_enc": torch.randn(L, D),
        "b_enc": torch.nn.Parameter(torch.randn(L).half(), requires_grad=False),
        "W_dec": torch.randn(L, D).bfloat16().T,
        "b_dec": torch.randn(D),
    }
    folder = FOLDER / "SAE-Res-Tiny-W32K-L0_4"
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(stored, folder / "layer11.sae.pt")
    weights = {name: value.float() for name, value in stored.items()}
    before = x @ weights["W_enc"].T + weights["b_enc"]
    best = before.topk(4)
    latents = torch.zeros_like(before).scatter(-1, best.indices, best.values.relu())
    return latents.numpy(), (latents @ weights["W_dec"].T + weights["b_dec"]).numpy()


def main() -> None:
    metadata = SAEMetadata(hook_name="blocks.2.hook_resid_post")
    common = {"d_in": D, "d_sae": L, "metadata": metadata}
    scaled = "expected_average_only_in"
    configs = {
        "standard": sae_lens.StandardTrainingSAEConfig(**common, apply_b_dec_to_input=False),
        "topk": sae_lens.TopKTrainingSAEConfig(**common, k=4, normalize_activations=scaled),
        "batchtopk": sae_lens.BatchTopKTrainingSAEConfig(**common, k=4),
        "jumprelu": sae_lens.JumpReLUTrainingSAEConfig(**common, l0_coefficient=0.1),
    }
    x = next(batches(1))
    arrays = {"x": x.numpy()}
    for name, config in configs.items():
        torch.manual_seed(0)
        sae = sae_lens.TrainingSAE.get_sae_class_for_architecture(name)(config)
        training = SAETrainerConfig(
            64 * 300, 64, lr=1e-2, lr_end=1e-2, n_batches_for_norm_estimate=10
        )
        SAETrainer(training, sae, batches(0)).fit()
        if name == "batchtopk":  # as a checkpoint of its training, before it is made a jumprelu
            sae.save_model(FOLDER / "batchtopk_checkpoint")
        sae.save_inference_model(FOLDER / name)
        saved = sae_lens.SAE.load_from_disk(FOLDER / name)
        with torch.no_grad():
            latents = saved.encode(x)
            arrays[name], arrays[f"{name}_decoded"] = latents.numpy(), saved.decode(latents).numpy()
    arrays["qwen"], arrays["qwen_decoded"] = qwen_scope(x)
    np.savez_compressed(FOLDER / "latents.npz", **arrays)


if __name__ == "__main__":
    main()
