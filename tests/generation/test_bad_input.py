"""A sentence for every wrong argument: what was wrong, what was got, what to do."""

import numpy as np
import pytest
from flax import nnx

from portable.generation import generate, prompts
from tests.generation.toys import TRACED, Recurrent


@pytest.fixture(scope="module")
def model():
    return Recurrent(vocab_size=61, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    "given, error, sentence",
    [
        ([], ValueError, "at least one prompt; got none"),
        (np.zeros((0, 4), int), ValueError, "at least one prompt; got none"),
        (np.zeros((2, 0), int), ValueError, "at least one token; got an empty row 0"),
        ([[1], [], [2]], ValueError, "at least one token; got an empty row 1"),
        ([[1, 2], [3, 61]], ValueError, r"must be in \[0, 61\); got 61 in row 1, place 1"),
        (np.array([[1, -1]]), ValueError, r"must be in \[0, 61\); got -1 in row 0, place 1"),
        ([[2**40]], ValueError, "got 1099511627776"),
        (np.array([[2**63]], np.uint64), ValueError, "got 9223372036854775808"),
        (np.array([[1.0, 2.0]]), TypeError, "must be integers; got float64"),
        ([[1.0, 2]], TypeError, "must be integers; got float in prompt 0"),
        ([np.array([1.5])], TypeError, "must be integers; got float64 as prompt 0"),
        (np.array([[True]]), TypeError, "must be integers; got bool"),
        (np.array([[1, 2], [3]], object), TypeError, "object array.*pass a list of lists"),
        ([[1, "a"]], TypeError, "must be integers; got str in prompt 0"),
        (np.array([1, 2]), TypeError, r"must be \[b, t\]; got shape \[2\]; write prompts\[None\]"),
        (np.zeros((1, 2, 3), int), TypeError, r"got shape \[1, 2, 3\]"),
        ([1, 2, 3], TypeError, r"got int as prompt 0; write \[prompt\]"),
        ([np.zeros((1, 2), int)], TypeError, "must be 1-D"),
        ("text", TypeError, "got text; encode"),
        (["text"], TypeError, "got text; encode"),
        (None, TypeError, "got NoneType"),
        (5, TypeError, "got int"),
    ],
)
def test_prompts(model, given, error, sentence):
    with pytest.raises(error, match=sentence):
        generate(model, given)


@pytest.mark.parametrize(
    "options, error, sentence",
    [
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be at least 1; got 0"),
        ({"max_new_tokens": -3}, ValueError, "got -3"),
        ({"max_new_tokens": 2.5}, TypeError, "max_new_tokens must be an integer; got 2.5"),
        ({"max_new_tokens": True}, TypeError, "must be an integer"),
        ({"temperature": -0.1}, ValueError, "temperature must be 0 .* got -0.1"),
        ({"temperature": float("nan")}, ValueError, "got nan"),
        ({"temperature": float("inf")}, ValueError, "got inf"),
        ({"temperature": "hot"}, TypeError, "temperature must be a number; got 'hot'"),
        ({"temperature": None}, TypeError, "temperature must be a number; got None"),
        ({"top_k": 0}, ValueError, "top_k must be at least 1; got 0; pass None"),
        ({"top_k": 1.5}, TypeError, "top_k must be an integer"),
        ({"top_p": 0.0}, ValueError, r"top_p must be in \(0, 1\]; got 0.0"),
        ({"top_p": 1.01}, ValueError, "got 1.01"),
        ({"top_p": float("nan")}, ValueError, "got nan"),
        ({"min_p": -0.1}, ValueError, r"min_p must be in \[0, 1\]"),
        ({"min_p": 2}, ValueError, "got 2"),
        ({"repetition_penalty": 0}, ValueError, "repetition_penalty must be positive and finite; got 0"),
        ({"eos_id": 61}, ValueError, r"eos_id must be in \[0, 61\); got 61"),
        ({"eos_id": [1, -1]}, ValueError, "got -1; pass None"),
        ({"eos_id": "</s>"}, TypeError, "eos_id must be an integer; got '</s>'"),
        ({"pad_id": 2**31}, ValueError, "pad_id must fit into int32"),
        ({"pad_id": None}, TypeError, "pad_id must be an integer; got None"),
        ({"temperature": 1.0}, ValueError, r"random key; got key=None; pass key=jax.random.key\(seed\)"),
        ({"temperature": 1.0, "key": 42}, TypeError, "a jax random key; got int; pass jax.random.key"),
        ({"temperature": 1.0, "key": np.zeros(2, np.float32)}, TypeError, "random key; got float32"),
        ({"temperature": 1.0, "key": np.zeros(3, np.uint32)}, TypeError, r"random key; got uint32 \[3\]"),
        (
            {"temperature": 1.0, "key": np.zeros((3, 2), np.uint32)},
            ValueError,
            r"each of the 2 prompts; .*\[3\]",
        ),
    ],
)
def test_options(model, options, error, sentence):
    with pytest.raises(error, match=sentence):
        generate(model, [[1], [2]], **options)


def test_a_model_that_cannot_decode():
    with pytest.raises(TypeError, match="init_state, prefill and step; got Linear"):
        generate(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), [[1]])
    with pytest.raises(TypeError, match="got str"):
        generate("mamba2-130m", [[1]])


def test_mistakes_are_found_before_anything_is_compiled(model):
    before = dict(TRACED)
    for wrong in (
        {"prompts": [[99]]},
        {"prompts": [[1]], "temperature": 1.0},
        {"prompts": [[1]], "top_p": 3},
    ):
        with pytest.raises(ValueError, match=r"^generate: .*\.$"):
            generate(model, **wrong)
    assert dict(TRACED) == before


def test_prompt_buckets():
    for length in range(1, 3000):
        b = prompts.bucket(length)
        assert b >= length
        assert b % 32 == 0
        assert prompts.bucket(b) == b
        assert length <= 128 or (b - length) / b < 0.2
    assert len({prompts.bucket(n) for n in range(1, 2049)}) == 20
