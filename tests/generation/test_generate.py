"""The loop: the same tokens as one forward after another, compiled once, on the device."""

import contextlib
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from portable.checks import PortableError
from portable.generation import generate, loop, programs
from tests.generation.toys import Bigram, Recurrent

PROMPTS = [[1, 2, 3], [4], list(range(5, 45)), [60, 7]]


@pytest.fixture(scope="module")
def model():
    return Recurrent(rngs=nnx.Rngs(0))


@contextlib.contextmanager
def compilations():
    """Collects what JAX traces or compiles inside."""
    events = []
    listener = lambda name, seconds, **about: events.append((name, about))  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)


def token_by_token(model, prompt, n):
    """Greedy continuation by feeding the whole sequence again for every token, one step at a time."""
    sequence = list(prompt)
    for _ in range(n):
        state = model.init_state(1)
        for token in sequence:
            logits, state = model._step(jnp.array([token]), state)
        sequence.append(int(np.asarray(logits[0]).argmax()))
    return sequence[len(prompt) :]


def test_greedy_equals_repeated_full_forwards(model):
    got = generate(model, PROMPTS, max_new_tokens=12)
    np.testing.assert_array_equal(got.tokens, [token_by_token(model, p, 12) for p in PROMPTS])
    np.testing.assert_array_equal(got.lengths, [12] * 4)
    assert got.tokens.dtype == got.lengths.dtype == np.int32


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.9},
        {"temperature": 1.3, "top_k": 9, "top_p": 0.8, "min_p": 0.02, "repetition_penalty": 1.2},
    ],
    ids=["greedy", "sampled", "filtered"],
)
def test_a_row_does_not_depend_on_the_others(model, options):
    keys = jax.random.split(jax.random.key(3), 4)
    together = generate(model, PROMPTS, max_new_tokens=40, key=keys, **options)
    for i, prompt in enumerate(PROMPTS):
        alone = generate(model, [prompt], max_new_tokens=40, key=keys[i : i + 1], **options)
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[i])


def test_one_key_is_folded_for_each_row(model):
    key = jax.random.key(5)
    got = generate(model, [[1, 2]] * 3, max_new_tokens=30, temperature=1.0, key=key)
    assert len({tuple(row) for row in got.tokens}) == 3
    rows = jnp.stack([jax.random.fold_in(key, i) for i in range(3)])
    same = generate(model, [[1, 2]] * 3, max_new_tokens=30, temperature=1.0, key=rows)
    np.testing.assert_array_equal(got.tokens, same.tokens)
    raw = generate(model, [[1, 2]] * 3, max_new_tokens=30, temperature=1.0, key=jax.random.PRNGKey(5))
    np.testing.assert_array_equal(got.tokens, raw.tokens)


@pytest.mark.parametrize("prompts", [np.array([[1, 2, 3], [4, 5, 6]]), jnp.array([[1, 2, 3], [4, 5, 6]], jnp.uint8)])
def test_arrays_and_lists_are_the_same(model, prompts):
    expected = generate(model, [[1, 2, 3], np.array([4, 5, 6], np.int64)], max_new_tokens=5)
    np.testing.assert_array_equal(generate(model, prompts, max_new_tokens=5).tokens, expected.tokens)


@pytest.mark.parametrize("n", [1, 2, 5, 77, 1024, 1025, 2100])
def test_streaming_gives_the_same_tokens(model, n):
    blocks = []
    key = jax.random.key(1)
    options = {"max_new_tokens": n, "temperature": 0.7, "key": key}
    quiet = generate(model, PROMPTS, **options)
    watched = generate(model, PROMPTS, stream=lambda block, start: blocks.append((start, block)), **options)
    np.testing.assert_array_equal(quiet.tokens, watched.tokens)
    np.testing.assert_array_equal(np.concatenate([b for _, b in blocks], axis=1), quiet.tokens)
    np.testing.assert_array_equal([s for s, _ in blocks], np.cumsum([0] + [b.shape[1] for _, b in blocks])[:-1])
    assert blocks[0][1].shape == (4, 1), "the first token is shown at once"
    assert all(b.shape[1] <= 64 and b.dtype == np.int32 for _, b in blocks)
    # A longer run begins with a shorter one.
    np.testing.assert_array_equal(
        generate(model, PROMPTS, **options | {"max_new_tokens": 2100}).tokens[:, :n], quiet.tokens
    )


def test_streamed_blocks_adapt_to_the_speed():
    sizes = [loop._next_size(tokens, seconds) for tokens, seconds in ((4, 0.04), (64, 0.0), (8, 0.3), (2, 9.0))]
    assert sizes == [15, 64, 4, 1]


def test_an_exception_of_the_watcher_ends_the_generation(model):
    def enough(block, start):
        if start > 10:
            raise StopIteration("seen enough")

    with pytest.raises(StopIteration, match="seen enough"):
        generate(model, PROMPTS, max_new_tokens=100, stream=enough)
    generate(model, PROMPTS, max_new_tokens=3)  # nothing is left behind


def test_end_tokens(model):
    n = 60
    free = generate(model, PROMPTS, max_new_tokens=n).tokens
    ends = {int(free[0, 4]), int(free[2, 9])}
    first = [next((i for i, token in enumerate(row) if token in ends), None) for row in free]
    assert any(i is not None for i in first)
    for eos in (
        list(ends),
        ends,
        np.array(sorted(ends)),
        tuple(ends) * 7,
    ):  # 14 ids: more than one set of slots
        got = generate(model, PROMPTS, max_new_tokens=n, eos_id=eos, pad_id=-1)
        for row, expected, end, length in zip(got.tokens, free, first, got.lengths, strict=True):
            assert length == (n if end is None else end + 1), "the end token counts"
            np.testing.assert_array_equal(row[:length], expected[:length])
            assert (row[length:] == -1).all()


def test_stops_as_soon_as_all_rows_have_ended():
    chain = Bigram(np.roll(np.eye(50), 1, axis=1))  # token i is followed by i + 1
    blocks = []
    got = generate(
        chain,
        [[3], [1]],
        max_new_tokens=5000,
        eos_id=40,
        stream=lambda block, start: blocks.append((start, block)),
    )
    np.testing.assert_array_equal(got.lengths, [37, 39])
    np.testing.assert_array_equal(got.tokens[1, :39], range(2, 41))
    assert got.tokens.shape == (2, 5000)
    assert not got.tokens[0, 37:].any()
    assert not got.tokens[1, 39:].any()
    assert sum(b.shape[1] for _, b in blocks) == 39
    quiet = generate(chain, [[3], [1]], max_new_tokens=5000, eos_id=40)
    np.testing.assert_array_equal(quiet.tokens, got.tokens)
    at_once = generate(chain, [[39], [39]], max_new_tokens=7, eos_id=40, stream=lambda block, start: None)
    np.testing.assert_array_equal(at_once.lengths, [1, 1])


def test_nothing_compiles_twice():
    model = Recurrent(vocab_size=53, rngs=nnx.Rngs(1))
    key = jax.random.key(0)
    shown = {"stream": lambda block, start: None}
    filters = {"top_k": 4, "top_p": 0.5, "min_p": 0.1, "repetition_penalty": 1.1}
    generate(model, PROMPTS[:2], max_new_tokens=3)
    generate(model, PROMPTS[:2], max_new_tokens=3, temperature=1.0, key=key, **filters)
    jax.random.key(1)
    with compilations() as events:
        for more in (
            {"max_new_tokens": 1},
            {"max_new_tokens": 200},
            {"max_new_tokens": 3000},
            {"temperature": 0.3, "key": jax.random.key(1)},
            {"temperature": 1.3, "key": jax.random.key(1), "eos_id": [1, 2], "pad_id": 9, **shown},
            {
                "temperature": 1,
                "top_k": 40,
                "top_p": 0.95,
                "min_p": 0.2,
                "repetition_penalty": 2,
                "key": key,
                **shown,
            },
            {"eos_id": 3, "top_k": 3, "top_p": 0.9},  # greedy: the filters mean nothing
        ):
            generate(model, PROMPTS[:2], **more)
        generate(model, [[1] * 20, [2] * 31], max_new_tokens=3)  # same bucket of prompt lengths
    assert events == []
    with compilations() as events:
        generate(model, [[1] * 33, [2]], max_new_tokens=3)
    compiled = {about["fun_name"].strip("jit()") for _, about in events if "fun_name" in about}
    assert compiled == {"prefill"}, "a new bucket compiles only that"


def test_the_loop_is_one_program_that_owns_its_state(model):
    compiled, leaves = programs.prepared(model)
    rules = programs.Rules(programs.Options(np.float32(0)), np.full(8, -1, np.int32), np.int32(0))
    uniform = np.zeros((programs.CAPACITY, 3, 2), np.float32)
    logits, state = compiled.prefill(leaves, np.ones((3, 32), np.int32), np.full(3, 5, np.int32), 0)
    written, seen = programs.first(logits, uniform, None, rules)
    span = programs.Span(np.int32(1), np.int32(1), np.int32(9))
    arguments = (leaves, (state, seen), written.rows, written.block, uniform, rules, span)
    text = compiled.decode.lower(*arguments).as_text()
    assert "stablehlo.while" in text
    assert "callback" not in text
    # Weights are arguments: no constant in the program has the size of one.
    constants = jax.make_jaxpr(compiled.decode)(*arguments).consts
    assert max([np.size(c) for c in constants], default=0) < min(l.size for l in leaves if l.ndim == 2)
    compiled.decode(*arguments)
    assert all(s.is_deleted() for s in state), "the state was donated"


@pytest.mark.parametrize("n, transfers", [(1, 1), (700, 1), (1024, 1), (3000, 3)])
def test_the_host_reads_once_for_each_thousand_tokens(model, monkeypatch, n, transfers):
    reads = []
    monkeypatch.setattr(loop.jax, "device_get", lambda x, get=jax.device_get: reads.append(1) or get(x))
    generate(model, PROMPTS, max_new_tokens=n)
    assert len(reads) == transfers


def test_new_weights_and_new_structure_are_honoured():
    model = Recurrent(vocab_size=31, rngs=nnx.Rngs(2))
    before = generate(model, [[1, 2]], max_new_tokens=9).tokens
    model.head.kernel[...] = -model.head.kernel[...]
    with compilations() as events:
        changed = generate(model, [[1, 2]], max_new_tokens=9).tokens
    assert events == []
    assert (changed != before).any()
    np.testing.assert_array_equal(changed[0], token_by_token(model, [1, 2], 9))
    model.layers[0] = nnx.Sequential(model.layers[0], nnx.Linear(48, 48, rngs=nnx.Rngs(3)))
    np.testing.assert_array_equal(
        generate(model, [[1, 2]], max_new_tokens=9).tokens[0], token_by_token(model, [1, 2], 9)
    )


def test_programs_live_as_long_as_their_model():
    model = Recurrent(vocab_size=29, rngs=nnx.Rngs(4))
    generate(model, [[1]], max_new_tokens=2)
    kept = weakref.ref(programs.prepared(model)[0])
    assert programs.prepared(model)[0] is kept()
    del model
    gc.collect()
    assert kept() is None


def test_logits_that_are_not_finite_are_told():
    table = np.roll(np.eye(20), 1, axis=1)
    table[6, 3] = np.nan
    with pytest.raises(PortableError, match="got NaN or infinity for new token 2 of row 1"):
        generate(Bigram(table), [[10], [4]], max_new_tokens=5)
    # A row that ended before it came there is not concerned.
    assert generate(Bigram(table), [[4]], max_new_tokens=5, eos_id=5).lengths == [1]


def test_sampled_tokens_follow_the_model():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(12, 12)) * 2
    temperature, top_k = 0.8, 7
    got = generate(
        Bigram(logits),
        [[i] for i in range(8)],
        max_new_tokens=4000,
        temperature=temperature,
        top_k=top_k,
        key=jax.random.key(11),
    ).tokens
    p = np.exp(logits / temperature)
    p[np.argsort(np.argsort(-logits, axis=1), axis=1) >= top_k] = 0
    p /= p.sum(1, keepdims=True)
    seen = np.zeros((12, 12))
    np.add.at(seen, (got[:, :-1].ravel(), got[:, 1:].ravel()), 1)
    assert not seen[p == 0].any()
    expected = p * seen.sum(1, keepdims=True)
    enough = expected > 5
    chi2 = ((seen - expected)[enough] ** 2 / expected[enough]).sum()
    freedom = enough.sum() - 12
    assert abs(chi2 - freedom) < 4 * np.sqrt(2 * freedom), f"chi-square {chi2:.0f} of {freedom} degrees of freedom"
    # Successive draws of a row, and the rows, are independent: repeated pairs come as often as they must.
    assert len({tuple(row[:30]) for row in got}) == 8
