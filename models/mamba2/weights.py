"""Where the tensors of Mamba-2 checkpoints lie in `Mamba2LM`."""

from portable.checkpoint import Rule, WeightMap, depthwise, flat, transposed

_EMBEDDING = {"transformers": "embeddings", "state-spaces": "embedding"}


def weight_map(format: str = "transformers") -> WeightMap:
    """Returns the rules for "transformers" or "state-spaces".

    The formats differ in how the embedding is spelled; both spellings are read, that of `format` is written.
    """
    here, there = "backbone.layers.{i}.mixer.", "layers.{i}.mixer."
    spelled = [f"backbone.{name}.weight" for name in _EMBEDDING.values()]
    spelled.sort(key=lambda name: name != f"backbone.{_EMBEDDING[format]}.weight")

    def fused(kind: str, parts: str, leaf: str) -> tuple[str, ...]:
        return tuple(f"{there}{kind}_{part}.{leaf}" for part in parts.split())

    rules = (
        Rule(spelled[0], "embed.embedding", also=tuple(spelled[1:])),
        Rule("backbone.layers.{i}.norm.weight", "layers.{i}.norm.scale"),
        Rule(f"{here}in_proj.weight", fused("in", "z x B C dt", "kernel"), transposed),
        Rule(f"{here}in_proj.bias", fused("in", "z x B C dt", "bias")),
        Rule(f"{here}conv1d.weight", fused("conv", "x B C", "kernel"), depthwise),
        Rule(f"{here}conv1d.bias", fused("conv", "x B C", "bias")),
        Rule(f"{here}dt_bias", f"{there}dt_bias"),
        Rule(f"{here}A_log", f"{there}A_log"),
        Rule(f"{here}D", f"{there}D", flat),
        Rule(f"{here}norm.weight", f"{there}norm.scale"),
        Rule(f"{here}out_proj.weight", f"{there}out.kernel", transposed),
        Rule(f"{here}out_proj.bias", f"{there}out.bias"),
        Rule("backbone.norm_f.weight", "norm.scale"),
        Rule("lm_head.weight", "head.kernel", transposed),
    )
    return WeightMap(rules, repeats={"lm_head.weight": spelled[0]}, prefix="backbone.")
