"""Stacked layers, remat and sharding change how a model runs, never what it computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from portable import nn
from portable.models.mamba2 import Mamba2Config, Mamba2LM
from portable.parity.numbers import relative
from tests.oracles import child

CONFIG = Mamba2Config(
    vocab_size=31, hidden_size=16, num_hidden_layers=3, num_heads=4, head_dim=8, state_size=8, n_groups=2
)
TOKENS = jax.random.randint(jax.random.key(0), (2, 11), 0, 31)


def loss_and_gradient(model):
    graphdef, state = nnx.split(model)
    return jax.jit(jax.value_and_grad(lambda s: jnp.mean(nnx.merge(graphdef, s)(TOKENS) ** 2)))(state)


def test_stack_and_unstack_are_inverse_and_equal():
    model = Mamba2LM(CONFIG, rngs=nnx.Rngs(0))
    stacked = nn.stack(model)
    assert [type(layer) for layer in stacked.layers] == [nn.Stack]
    assert stacked.layers[0].layer.mixer.A_log.get_value().shape == (3, 4)
    assert relative(stacked(TOKENS), model(TOKENS)) <= 2e-6
    back = nnx.state(nn.unstack(stacked))
    assert jax.tree.structure(back) == jax.tree.structure(nnx.state(model))
    for got, want in zip(jax.tree.leaves(back), jax.tree.leaves(nnx.state(model)), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.fixture(scope="module")
def plain():
    return loss_and_gradient(Mamba2LM(CONFIG, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_and_stacking_leave_the_gradient(remat, plain):
    model = Mamba2LM(CONFIG, rngs=nnx.Rngs(0))
    want, gradient = plain
    model.remat = remat
    got, same = loss_and_gradient(model)
    assert relative(got, want) <= 1e-6
    for g, w in zip(jax.tree.leaves(same), jax.tree.leaves(gradient), strict=True):
        assert relative(g, w) <= 2e-5
    _, stacked = loss_and_gradient(nn.stack(model))
    name = "in_x"
    got = stacked["layers"][0]["layer"]["mixer"][name]["kernel"].get_value()[1]
    assert relative(got, gradient["layers"][1]["mixer"][name]["kernel"].get_value()) <= 2e-5


def test_remat_keeps_less():
    config = Mamba2Config(vocab_size=31, hidden_size=64, num_hidden_layers=4, num_heads=8, head_dim=16, state_size=16)
    model = nn.stack(Mamba2LM(config, rngs=nnx.Rngs(0)))
    tokens = jax.random.randint(jax.random.key(0), (2, 256), 0, 31)

    def temp(remat):
        model.remat = remat
        graphdef, state = nnx.split(model)
        f = jax.jit(jax.grad(lambda s: jnp.mean(nnx.merge(graphdef, s)(tokens) ** 2)))
        return f.lower(state).compile().memory_analysis().temp_size_in_bytes

    assert temp("full") < temp("dots") < temp("none")


def test_a_wrong_policy_and_states_of_a_stacked_model_get_a_sentence():
    with pytest.raises(ValueError, match="remat must be one of none, full, dots; got 'some'"):
        Mamba2LM(CONFIG, remat="some", rngs=nnx.Rngs(0))(TOKENS)
    with pytest.raises(ValueError, match=r"call portable\.nn\.unstack\(model\) first"):
        nn.stack(Mamba2LM(CONFIG, rngs=nnx.Rngs(0)))(TOKENS, return_state=True)


def test_a_sharded_model_equals_the_unsharded():
    child(
        """
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from portable import nn, sharding
from portable.models.mamba2 import Mamba2Config, Mamba2LM

assert jax.device_count() == 8
config = Mamba2Config(
    vocab_size=64, hidden_size=16, num_hidden_layers=2, num_heads=8, head_dim=4, state_size=8, n_groups=2
)
mesh = sharding.mesh(data=2, model=4)
tokens = jax.random.randint(jax.random.key(0), (2, 9), 0, 64)
for make in (lambda m: m, nn.stack):
    model = make(Mamba2LM(config, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)
    f = jax.jit(jax.value_and_grad(lambda s, t: jnp.mean(nnx.merge(graphdef, s)(t) ** 2)))
    want, gradient = f(state, tokens)
    placed = nnx.state(sharding.shard(model, mesh))
    rows = jax.device_put(tokens, jax.NamedSharding(mesh, jax.P("data")))
    got, same = f(placed, rows)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for g, w in zip(jax.tree.leaves(same), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-6 * float(jnp.abs(w).max()) + 1e-9)
    spread = [x.sharding.spec for x in jax.tree.leaves(placed)]
    assert sum("model" in spec for spec in spread) >= 8, spread
    assert any("model" in x.sharding.spec for x in jax.tree.leaves(same))
try:
    sharding.mesh(model=3, data=4)
except ValueError as error:
    assert "need 12 devices; this process has 8" in str(error)
else:
    raise AssertionError("a mesh too large was accepted")
""",
        devices=8,
    )
