"""A random-weight checkpoint with the shapes of mamba2-130m, written by transformers.

    python benchmarks/mamba2_peers/checkpoint.py FOLDER [--seed N] [--tiny]

Nothing is left at a value that would hide a mistake: biases, gains, skip weights and decay rates are all
  perturbed.
"""

import argparse
import pathlib


def write(folder: pathlib.Path, seed: int = 0, tiny: bool = False) -> None:
    """Writes config.json and model.safetensors (float32); `tiny` is for tests of the benchmark itself."""
    import torch
    from transformers import Mamba2Config, Mamba2ForCausalLM

    size = (
        {"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 16, "state_size": 16}
        if tiny
        else {"hidden_size": 768, "num_hidden_layers": 24, "num_heads": 24, "head_dim": 64, "state_size": 128}
    )
    torch.manual_seed(seed)
    config = Mamba2Config(
        **size,
        vocab_size=512 if tiny else 50288,
        expand=2,
        n_groups=1,
        conv_kernel=4,
        chunk_size=256,
        rms_norm=True,
        residual_in_fp32=True,
        tie_word_embeddings=True,
        use_bias=False,
        use_conv_bias=True,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        layer_norm_epsilon=1e-5,
    )
    model = Mamba2ForCausalLM(config).float().eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("conv1d.bias", "norm.weight", "norm_f.weight", ".D", ".A_log", ".dt_bias")):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    write(arguments.folder, arguments.seed, arguments.tiny)
