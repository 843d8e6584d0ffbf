"""Mamba-2 against transformers on random weights: logits, hidden states, gradients, tokens, and files."""

import dataclasses
import json
import re

import jax.numpy as jnp
import numpy as np
import pytest

from portable import models
from portable.nn.norm import ACTIVATIONS
from tests.models import mamba2_oracle as oracle
from tests.oracles import need

torch, transformers = need("torch", "transformers")
pytestmark = pytest.mark.oracle


def _theirs(folder):
    model, report = transformers.Mamba2ForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


@pytest.mark.parametrize("name", oracle.CASES)
def test_equals_transformers(name):
    distance = oracle.measure(name)
    print(name, distance)
    assert distance.logits <= oracle.FORWARD
    assert distance.hidden_states <= oracle.FORWARD
    assert distance.gradients <= oracle.GRADIENT
    # Equal tokens mean something where no step is a tie and the text is not one token repeated.
    assert distance.margin > 1e-3
    assert distance.distinct_tokens > 16
    assert distance.equal_tokens == oracle.NEW_TOKENS


def test_cases_cover_every_option_of_transformers():
    """An option that changes the result and is new in transformers fails here until a case has it."""
    without_effect = {
        # initialisation
        "initializer_range", "rescale_prenorm_residual", "time_step_rank", "time_step_min", "time_step_max",
        "time_step_floor",
        # not of the forward pass without a cache
        "use_cache", "pad_token_id", "bos_token_id", "eos_token_id",
    }  # fmt: skip
    options = {f.name for f in dataclasses.fields(transformers.Mamba2Config)}
    options -= {f.name for f in dataclasses.fields(transformers.PreTrainedConfig)} - {"tie_word_embeddings"}
    varied = {
        option
        for option in options
        if len({str((oracle.BASE | case).get(option)) for case in oracle.CASES.values()}) > 1
    }
    assert options - varied - without_effect <= {"vocab_size", "hidden_size", "num_hidden_layers"}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_those_of_transformers(name):
    x = np.linspace(-8, 8, 999, dtype=np.float32)
    want = transformers.activations.ACT2FN[name](torch.tensor(x))
    np.testing.assert_allclose(ACTIVATIONS[name](x), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["groups, untied head", "limits on dt"])
@pytest.mark.parametrize("size", [10**9, 20_000], ids=["one file", "shards"])
def test_transformers_loads_what_we_save(tmp_path, name, size):
    theirs = oracle.oracle(oracle.CASES[name])
    models.save(oracle.loaded(theirs), tmp_path, max_shard_size=size)
    again = _theirs(tmp_path)
    given = torch.tensor(oracle.tokens((2, 20)))
    assert torch.equal(again(given).logits, theirs(given).logits)
    assert again.config.time_step_limit == pytest.approx(theirs.config.time_step_limit)
    # Nothing but the name of the folder differs in what transformers makes of our config.json.
    ignored = {"_name_or_path", "architectures", "dtype", "time_step_limit"}
    got, want = again.config.to_dict(), theirs.config.to_dict()
    assert {k: v for k, v in got.items() if k not in ignored} == {k: v for k, v in want.items() if k not in ignored}


def test_transformers_loads_a_padded_state_spaces_model(tmp_path):
    """The way of a published checkpoint: state-spaces' names and padding, converted for transformers."""
    theirs = oracle.oracle({})
    tensors = {k.replace("embeddings", "embedding"): v.clone() for k, v in theirs.state_dict().items()}
    original, converted = tmp_path / "original", tmp_path / "converted"
    original.mkdir()
    need("safetensors.torch").save_file(tensors, original / "model.safetensors")
    layer = {"layer": "Mamba2", "d_state": 16, "headdim": 8, "chunk_size": 16}
    config = {"d_model": 32, "n_layer": 2, "vocab_size": 85, "pad_vocab_size_multiple": 16, "ssm_cfg": layer}
    (original / "config.json").write_text(json.dumps(config))
    models.save(models.load(original), converted)
    given = torch.tensor(oracle.tokens((2, 20)))
    assert torch.equal(_theirs(converted)(given).logits, theirs(given).logits)


def test_bfloat16_files_pass_both_ways(tmp_path):
    theirs = oracle.oracle({}).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / "a")
    ours = models.load(tmp_path / "a")
    models.save(ours, tmp_path / "b")
    again = _theirs(tmp_path / "b")
    assert again.dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("residual_in_fp32", [True, False])
def test_bfloat16_is_as_exact_as_in_transformers(residual_in_fp32):
    """Both round to bfloat16 in places of their own, so both are held against float32 on the same weights."""
    theirs = oracle.oracle({"residual_in_fp32": residual_in_fp32, "num_hidden_layers": 4}).to(torch.bfloat16)
    given = oracle.tokens((4, 40))
    with torch.no_grad():
        want = theirs.float()(torch.tensor(given)).logits
        half = theirs.to(torch.bfloat16)(torch.tensor(given)).logits
    got = oracle.loaded(theirs)(given)
    assert got.dtype == jnp.float32
    rms = [float(np.sqrt(np.mean((np.asarray(x) - want.numpy()) ** 2))) for x in (got, half.float().numpy())]
    assert rms[0] <= 1.2 * rms[1]


def test_table_in_the_readme_is_of_these_cases():
    text = oracle.README.read_text()
    rows = re.findall(r"^\| (.+?) \| .+ \| (\S+) \| (\S+) \| (\S+) \| (\d+) of (\d+) \|$", text, re.MULTILINE)
    assert [row[0] for row in rows] == [*oracle.CASES]
    for _, logits, hidden, gradients, equal, new in rows:
        assert max(float(logits), float(hidden)) <= oracle.FORWARD
        assert float(gradients) <= oracle.GRADIENT
        assert int(equal) == int(new) == oracle.NEW_TOKENS
