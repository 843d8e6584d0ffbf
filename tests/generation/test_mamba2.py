"""Generation with a real model: Mamba-2 from ragged prompts, by the loop and by repeated full forwards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from portable import nn
from portable.generation import generate, programs
from portable.models.mamba2 import Mamba2Config, Mamba2LM
from tests.oracles import child

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [27], [18, 28, 18] * 15]


def small(**options):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 16, "state_size": 16}
    model = Mamba2LM(Mamba2Config(vocab_size=71, **sizes, **options), rngs=nnx.Rngs(0))
    # Away from the initial values: logits that differ, and a last token that does not simply repeat.
    model.embed.embedding[...] *= 50
    for block in model.layers:
        block.mixer.out.kernel[...] *= 20
    return model


@pytest.fixture(scope="module")
def model():
    return small()


def repeated_forwards(model, prompt, n):
    """Greedy continuation in which every token comes from a forward over the whole sequence, padded right."""
    forward = nnx.jit(lambda model, tokens: model(tokens))
    tokens = np.zeros((1, 64), np.int32)
    tokens[0, : len(prompt)] = prompt
    margins = []
    for t in range(len(prompt), len(prompt) + n):
        logits = np.asarray(forward(model, tokens))[0, t - 1]
        tokens[0, t] = logits.argmax()
        margins.append(np.diff(np.sort(logits)[-2:])[0])
    return tokens[0, len(prompt) : len(prompt) + n], min(margins)


@pytest.mark.parametrize(
    "options",
    [{}, {"tie_word_embeddings": False, "n_groups": 2, "time_step_limit": (0.01, 0.2)}],
    ids=["tied", "untied, groups, dt limit"],
)
def test_greedy_equals_repeated_full_forwards(options):
    model = small(**options)
    got = generate(model, PROMPTS, max_new_tokens=16).tokens
    assert len(np.unique(got)) > 8, "a text of few tokens would test little"
    for prompt, row in zip(PROMPTS, got, strict=True):
        expected, margin = repeated_forwards(model, prompt, 16)
        assert margin > 1e-4, f"a near tie ({margin:.1e}) would make the comparison a matter of rounding"
        np.testing.assert_array_equal(row, expected)


def test_batch_equals_single(model):
    keys = jax.random.split(jax.random.key(0), 3)
    together = generate(model, PROMPTS, max_new_tokens=40, temperature=0.8, key=keys).tokens
    for i, prompt in enumerate(PROMPTS):
        alone = generate(model, [prompt], max_new_tokens=40, temperature=0.8, key=keys[i : i + 1]).tokens
        np.testing.assert_array_equal(alone[0], together[i])


def test_streaming_gives_the_same_tokens(model):
    blocks = []
    quiet = generate(model, PROMPTS, max_new_tokens=90)
    generate(model, PROMPTS, max_new_tokens=90, stream=lambda block, start: blocks.append(block))
    np.testing.assert_array_equal(np.concatenate(blocks, axis=1), quiet.tokens)


def test_stacked_layers_are_decoded_as_a_list(model):
    stacked = nn.stack(model)
    expected = generate(model, PROMPTS, max_new_tokens=20).tokens
    np.testing.assert_array_equal(generate(stacked, PROMPTS, max_new_tokens=20).tokens, expected)
    kept, first = programs.prepared(stacked)
    again = programs.prepared(stacked)
    assert again[0] is kept
    assert all(a is b for a, b in zip(again[1], first, strict=True)), "copied once"
    nnx.update(stacked, jax.tree.map(lambda x: x * 1.1, nnx.state(stacked)))
    changed = generate(stacked, PROMPTS, max_new_tokens=20).tokens
    np.testing.assert_array_equal(changed, generate(nn.unstack(stacked), PROMPTS, max_new_tokens=20).tokens)
    assert (changed != expected).any()


def test_bfloat16_weights_generate(model):
    halved = small()
    nnx.update(halved, jax.tree.map(lambda x: x.astype(jnp.bfloat16), nnx.state(model)))
    got = generate(halved, PROMPTS, max_new_tokens=20)
    assert got.tokens.shape == (3, 20)


def test_sharded_weights_give_the_same_tokens():
    child(
        """
        import jax, numpy as np
        from flax import nnx
        from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
        from portable import nn
from portable.generation import generate, programs
        from tests.generation.toys import Recurrent

        model = Recurrent(vocab_size=64, rngs=nnx.Rngs(0))
        prompts = [[1, 2, 3], [4], [5] * 40, [9]]
        expected = generate(model, prompts, max_new_tokens=40).tokens
        mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
        columns = lambda x: NamedSharding(mesh, P(None, "model") if x.ndim == 2 else P())
        place = lambda x: jax.device_put(x, columns(x))
        nnx.update(model, jax.tree.map(place, nnx.state(model)))
        assert len(model.head.kernel.get_value().sharding.device_set) == 4
        compiled = []
        note = lambda name, seconds, **about: compiled.append(name) if "backend_compile" in name else None
        jax.monitoring.register_event_duration_secs_listener(note)
        got = generate(model, prompts, max_new_tokens=40, stream=lambda block, start: None).tokens
        np.testing.assert_array_equal(got, expected)
        assert len(compiled) == 3, compiled
        """.replace("\n        ", "\n"),
        devices=4,
    )


def test_the_decode_loop_updates_its_states_in_place():
    model = small()
    graph, weights = nnx.split(model)

    def loop(weights, token, state):
        def body(_, carry):
            logits, state = nnx.merge(graph, weights).step(*carry)
            return jnp.argmax(logits, -1).astype(jnp.int32), state

        return jax.lax.fori_loop(0, 9, body, (token, state))

    text = jax.jit(loop, donate_argnums=2).lower(weights, jnp.zeros(1, jnp.int32), model.init_state(1)).compile()
    copies = [line for line in text.as_text().splitlines() if " copy(" in line and "f32[1,4,16,16]" in line]
    assert not copies, copies


def test_padding_of_the_vocabulary_is_never_chosen():
    model = small(pad_vocab_size_multiple=16)
    model.embed.embedding[...] = model.embed.embedding[...].at[71:].set(100 * model.embed.embedding[3])
    logits = np.asarray(model(jnp.array([PROMPTS[0]])))[0]
    assert (logits.argmax(-1) >= 71).any(), "padding must be tempting, or the test would show nothing"
    for options in ({}, {"temperature": 5.0, "key": jax.random.key(0)}):
        assert (generate(model, PROMPTS, max_new_tokens=20, **options).tokens < 71).all()


def test_calls_that_make_no_sense_get_a_sentence(model):
    with pytest.raises(TypeError, match=r"tokens must be an array .*; got list"):
        model([[1, 2]])
    with pytest.raises(ValueError, match="last_only needs at least one position"):
        model(jnp.zeros([1, 0], jnp.int32), last_only=True)
    with pytest.raises(ValueError, match="one entry a layer, 2; got 1"):
        model(jnp.zeros([1, 3], jnp.int32), state=model.init_state(1)[:1])
