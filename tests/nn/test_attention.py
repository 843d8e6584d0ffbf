"""The layer against transformers' Llama, Qwen 3, Mistral and gpt-oss; its cache against the whole sequence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from portable import nn
from portable.checks import PortableError
from tests.oracles import need


def _layer(**options):
    return nn.Attention(32, **{"num_heads": 4, "num_kv_heads": 2, "rngs": nnx.Rngs(0)} | options)


def _inputs(b=2, t=11, d=32):
    return jax.random.normal(jax.random.key(1), (b, t, d))


THEIRS = {
    "llama": ("llama", "Llama", {"rope": nn.Rotary(theta=5e4)}, {}),
    "qwen3": ("qwen3", "Qwen3", {"qk_norm": True, "head_dim": 16}, {"head_dim": 16, "rms_norm_eps": 1e-6}),
    "mistral": ("mistral", "Mistral", {"window": 4}, {"sliding_window": 4}),
    "gpt_oss": (
        "gpt_oss",
        "GptOss",
        {"sinks": True, "use_qkv_bias": True, "use_out_bias": True, "window": 3},
        {"sliding_window": 3, "layer_types": ["sliding_attention"], "attention_bias": True, "head_dim": 8},
    ),
}


@pytest.mark.oracle
@pytest.mark.parametrize("name", THEIRS)
def test_equals_transformers(name):
    """Their layer's own weights, moved by name, on their own rotary tables and masks."""
    torch, transformers = need("torch", "transformers")
    module, prefix, ours_options, theirs_options = THEIRS[name]
    modeling = __import__(f"transformers.models.{module}.modeling_{module}", fromlist=[""])
    theta = ours_options.get("rope", nn.Rotary()).theta
    config = getattr(transformers, f"{prefix}Config")(
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=1,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        attn_implementation="eager",
        **theirs_options,
    )
    torch.manual_seed(0)
    theirs = getattr(modeling, f"{prefix}Attention")(config, layer_idx=0).double().eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    layer = _layer(**ours_options)
    moved = {"q_proj": layer.query, "k_proj": layer.key, "v_proj": layer.value, "o_proj": layer.out}
    for key, linear in moved.items():
        linear.kernel[...] = getattr(theirs, key).weight.detach().T.numpy().astype(np.float32)
        if linear.bias is not None:
            linear.bias[...] = getattr(theirs, key).bias.detach().numpy().astype(np.float32)
    if layer.query_norm is not None:
        layer.query_norm.scale[...] = theirs.q_norm.weight.detach().numpy().astype(np.float32)
        layer.key_norm.scale[...] = theirs.k_norm.weight.detach().numpy().astype(np.float32)
    if layer.sinks is not None:
        layer.sinks[...] = theirs.sinks.detach().numpy().astype(np.float32)
    u = _inputs()
    t = u.shape[1]
    i, j = np.arange(t)[:, None], np.arange(t)
    seen = (j <= i) & (j > i - (layer.window or t))
    mask = torch.tensor(np.where(seen, 0.0, -np.inf))[None, None]
    x = torch.tensor(np.asarray(u, np.float64))
    places = torch.arange(t)[None]
    with torch.no_grad():
        rope = getattr(modeling, f"{prefix}RotaryEmbedding")(config).double()(x, places)
        wanted = theirs(x, position_embeddings=rope, attention_mask=mask)[0].numpy()
    assert np.abs(np.asarray(layer(u)) - wanted).max() / np.abs(wanted).max() <= 5e-6


CACHED = {
    "everything": {"qk_norm": True, "soft_cap": 5.0, "use_qkv_bias": True},
    "window": {"window": 4, "sinks": True},
    "no positions": {"rope": None, "head_dim": 6},
    "part of the channels rotated": {"rope": nn.Rotary(dims=4)},
}


@pytest.mark.parametrize("name", CACHED)
def test_pieces_and_steps_equal_the_whole(name):
    """A ragged first piece, a second one longer than the window, then steps."""
    layer = _layer(**CACHED[name])
    u = _inputs(t=14)
    lengths = jnp.array([3, 5])
    whole = layer(u)
    graphdef, params = nnx.split(layer)

    @jax.jit
    def run(params, u):
        layer = nnx.merge(graphdef, params)
        # Row 0 gives 3 and 6 positions, row 1 gives 5 and 6; both then go on one by one.
        y1, state = layer(u[:, :5], state=layer.init_state(2, 14), lengths=lengths, return_state=True)
        rest = jnp.take_along_axis(u, (lengths[:, None] + jnp.arange(9))[..., None], axis=1)
        y2, state = layer(rest[:, :6], state=state, return_state=True)
        made = []
        for i in range(6, 9):
            y, state = layer.step(rest[:, i], state)
            made.append(y)
        return y1, jnp.concatenate([y2, jnp.stack(made, 1)], 1), state

    y1, later, state = run(params, u)
    for row, n in enumerate([3, 5]):
        np.testing.assert_allclose(y1[row, :n], whole[row, :n], atol=3e-6)
        np.testing.assert_allclose(later[row], whole[row, n : n + 9], atol=3e-6)
    assert state.length.tolist() == [12, 14]
    assert state.k.shape[1] == (layer.window or 14)


def test_padding_on_any_side():
    layer = _layer(is_causal=False)
    u = _inputs(t=6)
    mask = jnp.array([[False, False, True, True, True, False], [True] * 6])
    y = layer(u, mask=mask)
    np.testing.assert_allclose(y[0, 2:5], layer(u[:1, 2:5])[0], atol=3e-6)
    np.testing.assert_allclose(y[1], layer(u[1:])[0], atol=3e-6)


@pytest.mark.parametrize("options", [{}, {"window": 3}])
def test_packed_documents(options):
    """Each document is as if alone; a state before belongs to the first, and the state behind holds the last."""
    layer = _layer(**options)
    u = _inputs(t=12)
    segments = jnp.array([[1, 1, 1, 2, 2, 2, 2, 2], [5, 5, 5, 5, 5, 5, 5, 5]])
    first, rest, later = u[:, :2], u[:, 2:10], u[:, 10:]
    _, state = layer(first, state=layer.init_state(2, 12), return_state=True)
    y, state = layer(rest, state=state, segment_ids=segments, return_state=True)
    z, _ = layer(later, state=state, return_state=True)
    alone = [layer(part)[0] for part in (u[:1, :5], u[:1, 5:], u[1:])]
    np.testing.assert_allclose(y[0, :3], alone[0][2:], atol=3e-6)
    np.testing.assert_allclose(y[0, 3:], alone[1][:5], atol=3e-6)
    np.testing.assert_allclose(z[0], alone[1][5:], atol=3e-6)
    np.testing.assert_allclose(jnp.concatenate([y[1], z[1]]), alone[2][2:], atol=3e-6)
    packed = layer(rest, segment_ids=segments)
    np.testing.assert_allclose(packed[0, 3:], alone[1][:5], atol=3e-6)


BAD = [
    (lambda: _layer(num_heads=5), "num_heads must divide d; got d=32, num_heads=5"),
    (lambda: _layer(num_kv_heads=3), "num_kv_heads must divide num_heads; got num_heads=4, num_kv_heads=3"),
    (lambda: _layer(window=0), "window must be at least 1; got 0"),
    (lambda: _layer()(_inputs(d=31)), "u must be [b, t, d] with d=32; got [2, 11, 31]"),
    (lambda: _layer()(_inputs(), return_state=True), "return_state needs a state"),
    (
        lambda: _layer(is_causal=False)(_inputs(), state=_layer().init_state(2, 11)),
        "a layer that is not causal has no state",
    ),
    (lambda: _layer(rope=nn.Rotary(dims=3))(_inputs()), "dims must be even and at most the head's 8 channels; got 3"),
    (
        lambda: _layer()(_inputs(), state=_layer().init_state(2, 10)),
        "the state holds 10 positions, and more came; give init_state a larger length",
    ),
]


@pytest.mark.parametrize(("call", "sentence"), BAD)
def test_refusals(call, sentence):
    with pytest.raises((ValueError, PortableError)) as error:
        call()
    assert sentence in str(error.value)
