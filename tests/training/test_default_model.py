"""The embedded model and the list of files it was trained on."""

import hashlib
import json

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from portable import models
from portable.training import bits_per_byte
from portable.training.metrics import sample
from portable.training.stdlib import stdlib_text
from tests.oracles import ROOT

ASSETS = ROOT / "portable" / "assets"


@pytest.fixture(scope="module")
def corpus() -> dict:
    return json.loads((ASSETS / "default_corpus.json").read_text())


def test_the_held_out_files_are_those_of_the_rule(corpus):
    parts = {part: set(corpus[part]) for part in ("train", "held_out")}
    assert not parts["train"] & parts["held_out"]
    for part, names in parts.items():
        for name in names:
            in_twentieth = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 20 == 0
            assert in_twentieth == (part == "held_out"), name
            assert not name.startswith(("/", ".."))
    assert corpus["held_out_bytes"] > 300_000
    assert corpus["train_bytes"] > 5_000_000


def test_the_files_listed_are_the_files_read(corpus):
    text = stdlib_text()
    same = [d for d in text.train + text.held_out if d.name in corpus["train"] or d.name in corpus["held_out"]]
    assert len(same) > 100  # another Python has most of them, some changed
    for document in text.held_out:
        assert document.name not in corpus["train"]
    for document in text.train:
        assert document.name not in corpus["held_out"]


def test_the_weights_are_small():
    folder = ASSETS / "default"
    assert sum(p.stat().st_size for p in folder.iterdir()) < 10_000_000
    arrays = jax.tree.leaves(nnx.state(models.load(folder), nnx.Param))
    assert 2_000_000 <= sum(x.size for x in arrays) <= 4_000_000
    assert {x.dtype for x in arrays} == {jnp.dtype(jnp.bfloat16)}


def test_a_sample_of_the_held_out_files_is_predicted():
    model = models.load(ASSETS / "default", compute_dtype=jnp.float32)
    assert bits_per_byte(model, sample(stdlib_text().held_out, 8_192), window=512).bits_per_byte < 2.4


@pytest.mark.full
def test_the_held_out_files_need_at_most_2_2_bits_per_byte():
    model = models.load(ASSETS / "default", compute_dtype=jnp.float32)
    score = bits_per_byte(model, stdlib_text().held_out)
    print(f"{score.bits_per_byte:.3f} bits per byte on {score.documents} files, {score.bytes:,} bytes")
    assert score.bits_per_byte <= 2.2
