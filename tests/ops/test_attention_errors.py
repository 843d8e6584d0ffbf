"""What `attention` and `merge_attentions` say of wrong arguments."""

import jax.numpy as jnp
import pytest

from portable.ops import attention, merge_attentions


def _plain(q=(2, 6, 4, 8), k=(2, 6, 2, 8), v=(2, 6, 2, 8)):
    return [jnp.ones(x) for x in (q, k, v)]


INT, FLAGS = jnp.zeros((2, 6), jnp.int32), jnp.ones((2, 6), bool)
WINDOW = "window must be an integer of at least 1, a pair"
BAD = {
    "rank": (_plain(q=(6, 4, 8)), {}, ValueError, r"q must be \[b, t, h, k\]; got rank 3"),
    "width": (_plain(k=(2, 6, 2, 9)), {}, ValueError, r"k must be \[b, s, g, k\] with k=8"),
    "values": (_plain(v=(2, 5, 2, 8)), {}, ValueError, r"v must be \[b, s, g, v\] with s=6"),
    "groups": (
        _plain(q=(2, 6, 5, 8)),
        {},
        ValueError,
        r"k and v must be \[b, s, g, ...\] with h % g == 0; got h=5, g=2",
    ),
    "a list": ([[1.0], *_plain()[1:]], {}, TypeError, "q must be an array; got list"),
    "integers": ([_plain()[0].astype(int), *_plain()[1:]], {}, TypeError, "q must be floating point; got int32"),
    "sinks": (_plain(), {"sinks": jnp.ones(3)}, ValueError, r"sinks must be \[h\] with h=4"),
    "whole sinks": (_plain(), {"sinks": jnp.ones(4, int)}, TypeError, "sinks must be floating point"),
    "key mask": (_plain(), {"key_mask": FLAGS[:, :5]}, ValueError, r"key_mask must be \[b, s\] with s=6"),
    "key mask of numbers": (
        _plain(),
        {"key_mask": INT},
        TypeError,
        "key_mask must be booleans, True for keys that are",
    ),
    "segments": (_plain(), {"segment_ids": INT[:1]}, ValueError, r"segment_ids of queries must be \[b, t\] with b=2"),
    "segments of keys": (_plain(), {"segment_ids": (INT, INT[:, :5])}, ValueError, "segment_ids of keys must be"),
    "float segments": (_plain(), {"segment_ids": INT * 1.0}, TypeError, "segment_ids must be integers; got float32"),
    "three segments": (_plain(), {"segment_ids": (INT,) * 3}, ValueError, "or a pair of arrays; got a tuple of 3"),
    "half a pair": (_plain(), {"segment_ids": (INT, None)}, ValueError, "or a pair of arrays; got a tuple of 2"),
    "one for two": (
        _plain(q=(2, 5, 4, 8)),
        {"segment_ids": INT},
        ValueError,
        r"segment_ids must be a pair .* got one array, t=5 and s=6",
    ),
    "positions": (_plain(), {"q_positions": INT[:, :5]}, ValueError, r"q_positions must be \[b, t\] with t=6"),
    "scalar positions": (_plain(), {"kv_positions": INT[0, 0]}, ValueError, r"kv_positions must be \[b, s\] or \[s\]"),
    "float positions": (_plain(), {"kv_positions": INT * 1.0}, TypeError, "kv_positions must be integers"),
    "a number of positions": (_plain(), {"q_positions": 3}, TypeError, "q_positions must be an array; got int"),
    "window of none": (_plain(), {"window": 0}, ValueError, f"{WINDOW}.*; got 0"),
    "window of true": (_plain(), {"window": True}, ValueError, f"{WINDOW}.*; got True"),
    "negative window": (_plain(), {"window": (3, -1)}, ValueError, rf"{WINDOW}.*; got \(3, -1\)"),
    "three windows": (_plain(), {"window": (3, 1, 1)}, ValueError, WINDOW),
    "array window": (_plain(), {"window": jnp.ones(2)}, ValueError, WINDOW),
    "causal": (_plain(), {"is_causal": 1}, TypeError, "is_causal must be True or False; got 1"),
    "cap": (_plain(), {"soft_cap": 0.0}, ValueError, "soft_cap must be a number above 0, or None for no cap; got 0.0"),
    "array cap": (_plain(), {"soft_cap": jnp.ones(())}, ValueError, "soft_cap must be a number above 0"),
    "scale": (_plain(), {"scale": float("nan")}, ValueError, "scale must be a finite number, or None .*; got nan"),
    "array scale": (_plain(), {"scale": jnp.ones(())}, ValueError, "scale must be .* Multiply q by an array"),
    "mask of numbers": (
        _plain(),
        {"mask_mod": lambda b, h, i, j: i - j},
        TypeError,
        r"mask_mod must return one boolean scalar .*; got int32\[\]",
    ),
    "score of two": (
        _plain(),
        {"score_mod": lambda x, b, h, i, j: jnp.stack([x, x])},
        TypeError,
        r"score_mod must return one floating scalar .*; got float32\[2\]",
    ),
    "score of none": (_plain(), {"score_mod": lambda *a: None}, TypeError, "score_mod must return .*; got nothing"),
    "no function": (_plain(), {"mask_mod": FLAGS}, TypeError, "mask_mod must be a function; got Array"),
    "name": (_plain(), {"implementation": "flash"}, ValueError, "no implementation called 'flash'; there are: ref"),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_wrong_argument_gets_a_sentence(fault):
    args, kwargs, error, sentence = BAD[fault]
    with pytest.raises(error, match=sentence):
        attention(*args, **kwargs)


OUT, LSE = jnp.zeros((1, 3, 2, 4)), jnp.zeros((1, 2, 3))


@pytest.mark.parametrize(
    "outs, lses, error, sentence",
    [
        ([], [], ValueError, "of the same number, at least 1; got 0 and 0"),
        ([OUT], [LSE, LSE], ValueError, "got 1 and 2"),
        ([OUT, OUT[:, :2]], [LSE, LSE], ValueError, r"outs\[1\] must be \[b, t, h, v\] with t=3"),
        ([OUT], [LSE[..., 0]], ValueError, r"lses\[0\] must be \[b, h, t\]; got rank 2"),
        ([OUT.astype(int)], [LSE], TypeError, r"outs\[0\] must be floating point; got int32"),
    ],
)
def test_a_wrong_merge_gets_a_sentence(outs, lses, error, sentence):
    with pytest.raises(error, match=sentence):
        merge_attentions(outs, lses)
