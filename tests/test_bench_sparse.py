"""`portable bench sparse`: its questions, its methods and its page."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from portable import cli, ops
from portable.commands._benchmark import sparse
from portable.parity.numbers import relative
from portable.training import recall
from portable.training.data import IGNORE


@pytest.mark.parametrize("kind", recall.TASKS)
def test_every_answer_stands_in_a_record_of_its_key(kind):
    batch = recall.Questions().batch(kind, 4, 256, seed=3)
    count = recall.TASKS[kind]
    for tokens, targets in zip(batch["tokens"], batch["targets"], strict=True):
        asked = np.flatnonzero(targets != IGNORE)
        np.testing.assert_array_equal(asked, np.arange(256 - count, 256))
        records = tokens[:192][(tokens[:192] >= recall.RECORD) & (tokens[:192] < recall.KEY)] - recall.RECORD
        said = dict(divmod(int(record), recall.VALUES) for record in records)
        assert len(said) == len(records) == count
        for at in asked:
            assert said[tokens[at] - recall.KEY] == targets[at] - recall.VALUE
    again = recall.Questions().batch(kind, 4, 256, seed=3)
    other = recall.Questions(held_out=True).batch(kind, 4, 256, seed=3)
    np.testing.assert_array_equal(again["tokens"], batch["tokens"])
    assert (other["tokens"] != batch["tokens"]).any()


@pytest.mark.parametrize("name", sparse.METHODS)
def test_a_method_that_may_see_all_is_full_attention(name, seed):
    rng = np.random.default_rng(seed)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 80, h, 8)), jnp.float32) for h in (4, 2, 2))
    attend = functools.partial(sparse.METHODS[name], budget=96)
    assert relative(jax.jit(attend)(q, k, v), ops.attention(q, k, v, is_causal=True)) <= 5e-6


def test_the_study_prints_and_draws(capsys, tmp_path):
    picture = tmp_path / "page.png"
    words = ["bench", "sparse", "--quick", "--method", "MoBA", "--method", "window", "--samples", "1"]
    assert cli.main([*words, "--plot", str(picture), "--json"]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    [rows] = found["results"].values()
    assert [(row["method"], row["budget"]) for row in rows] == [
        ("full", None), ("MoBA", 48), ("MoBA", 96), ("window", 48), ("window", 96)
    ]  # fmt: skip
    full, *others = rows
    for row in rows:
        assert 0 <= row["needles"] <= 1
        assert 0 <= row["recall"] <= 1
        assert np.median(row["samples_s"]) * 1e3 == pytest.approx(row["ms"])
    flops = {(row["method"], row["budget"]): row["gflop"] for row in others}
    assert flops["window", 48] <= flops["window", 96] <= full["gflop"]  # so short a text is one block of queries
    assert flops["MoBA", 48] < flops["MoBA", 96]
    assert found["trained"]["steps"] == 4
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "step 4/4" in said.err
    assert "5/5  window 96" in said.err


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["sparse", "ssd"], "sparse is measured alone; got sparse, ssd"),
        (["sparse", "--size", "130m"], "--size does not belong to sparse"),
        (["sparse", "--method", "moba"], "there is no method called 'moba'; methods: window, MoBA"),
        (["sparse", "--prompt", "50"], "--prompt of sparse must be at least 96; got 50"),
        (["ssd", "--steps", "5"], "--steps belongs to sparse"),
    ],
)
def test_what_cannot_be_measured_is_refused(words, sentence, capsys):
    assert cli.main(["bench", *words]) == 2
    assert sentence in capsys.readouterr().err
