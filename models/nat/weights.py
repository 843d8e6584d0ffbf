"""Where the tensors of NAT and DiNAT checkpoints lie in `NAT`."""

from collections.abc import Iterable

from portable.checkpoint import Rule, WeightMap, conv2d, row, transposed


def format_of(tensors: Iterable[str]) -> str:
    """Returns the format of a file with these tensors: "shi-labs" (the authors' own) or "transformers"."""
    return "shi-labs" if any(name.startswith("patch_embed.") for name in tensors) else "transformers"


def weight_map(format: str = "transformers", kind: str = "dinat") -> WeightMap:
    """Returns the rules for "transformers" or "shi-labs".

    In transformers' format the names begin with the kind, "nat" or "dinat"; both are read, that of `kind` is written.
    """
    return _shi_labs() if format == "shi-labs" else _transformers(kind)


def _norm(tensor: str, module: str) -> tuple[Rule, Rule]:
    return Rule(f"{tensor}.weight", f"{module}.scale"), Rule(f"{tensor}.bias", f"{module}.bias")


def _dense(tensor: str, *modules: str) -> tuple[Rule, Rule]:
    return (
        Rule(f"{tensor}.weight", tuple(f"{module}.kernel" for module in modules), transposed),
        Rule(f"{tensor}.bias", tuple(f"{module}.bias" for module in modules)),
    )


def _conv(tensor: str, module: str) -> tuple[Rule, Rule]:
    return Rule(f"{tensor}.weight", f"{module}.kernel", conv2d), Rule(f"{tensor}.bias", f"{module}.bias")


def _shi_labs() -> WeightMap:
    there, here = "levels.{l}.blocks.{i}", "levels.{l}.blocks.{i}"
    return WeightMap(
        (
            *_conv("patch_embed.proj.0", "stem.conv1"),
            *_conv("patch_embed.proj.1", "stem.conv2"),
            *_norm("patch_embed.norm", "stem.norm"),
            *_norm(f"{there}.norm1", f"{here}.norm1"),
            *_dense(f"{there}.attn.qkv", *[f"{here}.attention.{part}" for part in ("query", "key", "value")]),
            Rule(f"{there}.attn.rpb", f"{here}.attention.rel_pos_bias"),
            *_dense(f"{there}.attn.proj", f"{here}.attention.out"),
            *_norm(f"{there}.norm2", f"{here}.norm2"),
            *_dense(f"{there}.mlp.fc1", f"{here}.up"),
            *_dense(f"{there}.mlp.fc2", f"{here}.down"),
            Rule(f"{there}.gamma1", f"{here}.gamma1"),
            Rule(f"{there}.gamma2", f"{here}.gamma2"),
            Rule("levels.{l}.downsample.reduction.weight", "levels.{l}.downsample.conv.kernel", conv2d),
            *_norm("levels.{l}.downsample.norm", "levels.{l}.downsample.norm"),
            *_norm("norm", "norm"),
            *_dense("head", "head"),
        )
    )


def _transformers(kind: str) -> WeightMap:
    other = {"nat": "dinat", "dinat": "nat"}[kind]
    there, here = "encoder.levels.{l}.layers.{i}", "levels.{l}.blocks.{i}"
    rules = (
        *_conv("embeddings.patch_embeddings.projection.0", "stem.conv1"),
        *_conv("embeddings.patch_embeddings.projection.1", "stem.conv2"),
        *_norm("embeddings.norm", "stem.norm"),
        *_norm(f"{there}.layernorm_before", f"{here}.norm1"),
        *_dense(f"{there}.attention.self.query", f"{here}.attention.query"),
        *_dense(f"{there}.attention.self.key", f"{here}.attention.key"),
        *_dense(f"{there}.attention.self.value", f"{here}.attention.value"),
        Rule(f"{there}.attention.self.rpb", f"{here}.attention.rel_pos_bias"),
        *_dense(f"{there}.attention.output.dense", f"{here}.attention.out"),
        *_norm(f"{there}.layernorm_after", f"{here}.norm2"),
        *_dense(f"{there}.intermediate.dense", f"{here}.up"),
        *_dense(f"{there}.output.dense", f"{here}.down"),
        Rule(f"{there}.layer_scale_parameters", (f"{here}.gamma1", f"{here}.gamma2"), row),
        Rule("encoder.levels.{l}.downsample.reduction.weight", "levels.{l}.downsample.conv.kernel", conv2d),
        *_norm("encoder.levels.{l}.downsample.norm", "levels.{l}.downsample.norm"),
        *_norm("layernorm", "norm"),
    )
    named = [Rule(f"{kind}.{r.tensor}", r.params, r.layout, also=(f"{other}.{r.tensor}",)) for r in rules]
    return WeightMap((*named, *_dense("classifier", "head")), prefix=f"{kind}.")
