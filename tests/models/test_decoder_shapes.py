"""Decoders of every family in bfloat16, and lowered for every platform: nothing is computed here."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from portable.models.decoder import FAMILIES, Decoder, DecoderConfig
from tests.models.test_decoder_config import DEEPSEEK, MIXTRAL


def _model(family, **options):
    file = DEEPSEEK | MIXTRAL | {"num_experts": 4, "n_group": 2, "topk_group": 1, "n_routed_experts": 4}
    file |= {"model_type": family, "topk_method": None, "num_key_value_heads": 1, "shared_expert_intermediate_size": 8}
    file |= {"sliding_window": 3, "use_sliding_window": True}
    if family.startswith("lfm2"):
        file["layer_types"] = ["conv", "full_attention"] * 2
    config = DecoderConfig.from_dict(file)
    return nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), **options))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_state_keeps_its_shapes_and_dtypes(family):
    """The loop that generates carries it; logits are float32 whatever the model computes in."""
    graphdef, weights = nnx.split(_model(family, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16))

    def prefill(weights, tokens):
        model = nnx.merge(graphdef, weights)
        return model.prefill(tokens, jnp.array([5, 3]), model.init_state(2, 7))

    first, state = jax.eval_shape(prefill, weights, jax.ShapeDtypeStruct((2, 5), jnp.int32))
    step = jax.eval_shape(
        lambda w, t, s: nnx.merge(graphdef, w).step(t, s), weights, jax.ShapeDtypeStruct((2,), jnp.int32), state
    )
    assert (first, state) == step
    assert first.dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "lfm2_moe"])
def test_one_program_for_every_platform(family):
    graphdef, weights = nnx.split(_model(family))
    state = jax.eval_shape(lambda w: nnx.merge(graphdef, w).init_state(1, 8), weights)
    token = jax.ShapeDtypeStruct((1,), jnp.int32)
    traced = jax.jit(lambda w, t, s: nnx.merge(graphdef, w).step(t, s)).trace(weights, token, state)
    assert traced.lower(lowering_platforms=("cpu", "cuda", "tpu")).as_text()


@pytest.mark.parametrize("family", ["qwen2", "lfm2_moe", "deepseek_v3"])
def test_every_parameter_names_its_axes(family):
    for path, variable in nnx.to_flat_state(nnx.state(_model(family))):
        assert len(variable.get_metadata()["axes"]) == len(variable.get_value().shape), path
