"""Every family of decoders against transformers on the same random weights: logits, gradients, tokens, files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from portable import models
from portable.generation import generate
from portable.models.decoder import FAMILIES
from tests.models import decoder_oracle as oracle
from tests.oracles import need

pytestmark = pytest.mark.oracle
FORWARD, GRADIENT = 2e-5, 5e-5
# One of each mechanism; the others of each family run with -m full.
QUICK = ("qwen3_moe", "gpt_oss", "lfm2_moe", "deepseek_v3")
GRADIENTS = ("llama", "qwen3_moe", "gpt_oss", "lfm2", "deepseek_v3")


def _cases(quick):
    return [pytest.param(n, marks=() if n in quick else pytest.mark.full) for n in oracle.CASES]


def test_every_family_is_tried():
    need("torch", "transformers")
    assert {oracle.oracle(name).config.model_type for name in oracle.CASES} == set(FAMILIES)


@pytest.mark.parametrize("name", _cases([name for name in oracle.CASES if "," not in name]))
def test_logits(name):
    assert oracle.logits(name) <= FORWARD


@pytest.mark.parametrize("name", _cases(GRADIENTS))
def test_gradients_of_every_parameter(name):
    far = {key: error for key, error in oracle.gradients(name).items() if error > GRADIENT}
    assert not far


@pytest.mark.parametrize("name", _cases(QUICK))
def test_greedy_tokens(name):
    """By prefill and steps here, by their cache there."""
    prompts = oracle.tokens((2, 7), seed=2)
    want, margin = oracle.greedy(name, prompts)
    assert margin > 1e-4  # else the weights should be drawn again: a tie decides nothing
    assert len(np.unique(want)) > 5
    got = generate(oracle.loaded(name), prompts, max_new_tokens=oracle.NEW_TOKENS)
    np.testing.assert_array_equal(got.tokens, want)


@pytest.mark.parametrize("name", oracle.CASES)
def test_transformers_loads_what_we_save(name, tmp_path):
    torch = need("torch")
    ours, theirs = oracle.loaded(name), oracle.oracle(name)
    models.save(ours, tmp_path)
    back, told = type(theirs).from_pretrained(tmp_path, output_loading_info=True, attn_implementation="eager")
    assert not [key for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in told[kind]]
    want = theirs.state_dict()
    assert back.state_dict().keys() == want.keys()
    for key, tensor in back.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), want[key].numpy(), err_msg=key)
    given = torch.tensor(oracle.tokens((1, 13)))
    with torch.no_grad():
        # Their products over two threads differ in the last bit from call to call.
        assert oracle.relative(back.eval()(given).logits, theirs(given).logits) <= 1e-6
    assert models.load(tmp_path).config == ours.config


@pytest.mark.parametrize("name", _cases(("lfm2_moe", "deepseek_v2")))
def test_ragged_prompts_are_as_if_alone(name):
    """Padding on either side, packed documents, and rows of unequal length in one cache."""
    graphdef, params = nnx.split(oracle.loaded(name))
    given = oracle.tokens((2, 12), seed=4)
    lengths = np.array([5, 9])

    @jax.jit
    def run(params):
        model = nnx.merge(graphdef, params)
        alone = [model(given[i : i + 1, :n])[0] for i, n in enumerate(lengths)]
        right = model(given, lengths=jnp.array(lengths))
        mask = np.arange(12) >= 12 - lengths[:, None]
        turned = np.stack([np.roll(row, 12 - n) for row, n in zip(given, lengths, strict=True)])
        left = model(turned, mask=jnp.array(mask))
        packed = model(np.concatenate([given[0, :5], given[1, :9]])[None], segment_ids=jnp.array([[0] * 5 + [1] * 9]))
        last, state = model.prefill(given, jnp.array(lengths), model.init_state(2, 12))
        steps = []
        for i in range(3):
            step, state = model.step(given[np.arange(2), lengths + i], state)
            steps.append(step)
        longer = [model(given[i : i + 1, : n + 3])[0] for i, n in enumerate(lengths)]
        return alone, right, left, packed, last, steps, longer

    alone, right, left, packed, last, steps, longer = run(params)
    for i, n in enumerate(lengths):
        for found in (right[i, :n], left[i, 12 - n :], packed[0, i * 5 : i * 5 + n]):
            assert oracle.relative(found, alone[i]) <= FORWARD
        assert oracle.relative(last[i], alone[i][-1]) <= FORWARD
        assert oracle.relative(jnp.stack(steps)[:, i], longer[i][n:]) <= FORWARD
