"""Adapters as a training task: rows do not leak, only adapters are trained and kept, steps are those of plain code."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from portable import adapters, models, nn
from portable.adapters import AdapterParam, DoRAConfig, LoRAConfig, S2FTConfig
from portable.checks import CheckpointError, ConfigError, DataError
from portable.models.decoder import Decoder, DecoderConfig
from portable.models.mamba2 import Mamba2Config, Mamba2LM
from portable.training.adapt import AdapterTask
from portable.training.data import IGNORE, Batches
from portable.training.examples import Example, Examples
from portable.training.loop import fit
from portable.training.options import TrainOptions
from portable.training.packing import Rows
from portable.training.step import init_state, make_step, next_token, parts
from tests.oracles import need

need("grain", "matplotlib")

V, LENGTH = 40, 24
COMMON = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24}


def model(kind, **options):
    if kind == "mamba2":
        config = Mamba2Config(**COMMON, num_heads=4, head_dim=8, state_size=4)
        return Mamba2LM(config, rngs=nnx.Rngs(0), **options)
    more = {}
    if kind == "convolution":
        more = {"model_type": "lfm2", "layer_types": ["conv", "full_attention"], "block_ff_dim": 24}
    if kind == "window":
        more = {"model_type": "mistral", "sliding_window": 5}
    config = DecoderConfig.from_dict({"model_type": "llama", **COMMON, **HEADS, **more})
    return Decoder(config, rngs=nnx.Rngs(0), **options)


def random_examples(sizes, seed=0):
    rng = np.random.default_rng(seed)
    made = []
    for n in sizes:
        trained = np.arange(n) >= max(1, n // 3)
        made.append(Example(rng.integers(1, V, n).astype(np.int32), trained, int(trained.sum())))
    return tuple(made)


def examples(sizes=(9, 14, 5, 25, 7, 12), held=(11, 6)):
    return Examples(random_examples(sizes), random_examples(held, 1), "few", "a rule")


def adapted(kind="decoder", config=None, **options):
    made = model(kind, **options)
    config = config or DoRAConfig(rank=2, **adapters.default_targets(made, rank=2), init="random")
    adapters.apply(made, config)
    return made, config


def batch_of(rows):
    return jax.tree.map(lambda *x: np.stack(x), *(rows[i] for i in range(len(rows))))


@pytest.mark.parametrize("kind", ["mamba2", "decoder", "convolution", pytest.param("window", marks=pytest.mark.full)])
def test_examples_of_a_row_do_not_see_each_other(kind):
    """Logits and losses of a packed row are those of each example alone, through attention, convolution and state."""
    made, _ = adapted(kind)
    data = random_examples((9, 14, 5, 25, 7, 12))
    rows = Rows(data, LENGTH)
    assert len(rows) < len(data)
    run = jax.jit(lambda state, tokens, segments: nnx.merge(graphdef, state)(tokens, segment_ids=segments))
    graphdef, state = nnx.split(nn.stack(made))
    batch = batch_of(rows)
    logits = np.asarray(run(state, batch["tokens"], batch["segments"]))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, np.maximum(batch["targets"], 0))
    alone = np.zeros((len(data), LENGTH), np.int32)
    for row, example in zip(alone, data):
        row[: len(example.tokens) - 1] = example.tokens[:-1]
    apart = np.asarray(run(state, alone, np.zeros_like(alone)))
    leaked = np.asarray(run(state, batch["tokens"], np.zeros_like(batch["segments"])))
    seen = 0
    for example, single in zip(data, apart):
        n = len(example.tokens) - 1
        places = [
            (r, c)
            for r in range(len(rows))
            for c in range(LENGTH - n + 1)
            if (batch["tokens"][r, c : c + n] == example.tokens[:-1]).all()
        ]
        ((r, c),) = places
        np.testing.assert_allclose(logits[r, c : c + n], single[:n], rtol=0, atol=2e-5 * np.abs(single).max())
        wanted = optax.softmax_cross_entropy_with_integer_labels(single[:n], example.tokens[1:])
        told = batch["targets"][r, c : c + n] != IGNORE
        assert told.tolist() == example.trained[1:].tolist()
        np.testing.assert_allclose(losses[r, c : c + n][told], wanted[told], rtol=2e-5, atol=2e-5)
        seen += int(told.sum())
        if c:  # and without segments they would
            assert np.abs(leaked[r, c : c + n] - single[:n]).max() > 1e-3
    assert seen == (batch["targets"] != IGNORE).sum()


class Deaf(nnx.Module):
    """A model that cannot be told where a document begins."""

    def __init__(self):
        self.embed, self.out = nnx.Embed(V, 8, rngs=nnx.Rngs(0)), nnx.Linear(8, V, rngs=nnx.Rngs(1))
        self.config, self.dtype = DecoderConfig(**COMMON, **HEADS), jnp.float32

    def __call__(self, tokens):
        return self.out(jnp.cumsum(self.embed(tokens), axis=1))


def test_a_packed_batch_without_segments_is_refused(tmp_path):
    batch = batch_of(Rows(random_examples((9, 5)), LENGTH))
    with pytest.raises(DataError, match=r"a batch must have segments, .* got targets, tokens. Zeros say that"):
        next_token(model("decoder"), {k: v for k, v in batch.items() if k != "segments"})
    with pytest.raises(ConfigError, match="Deaf takes no segment_ids, so documents packed into one row would see"):
        next_token(Deaf(), batch)
    deaf, config = Deaf(), LoRAConfig(rank=2, target_modules=["out"])
    adapters.apply(deaf, config)
    options = TrainOptions(steps=3, batch_size=2, length=LENGTH, warmup=0, eval_every=0)
    with pytest.raises(ConfigError, match=r"examples packed into one row would see each other: .*--no-packing"):
        fit(deaf, AdapterTask(examples(), config), options, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    done = fit(deaf, AdapterTask(examples(), config, packed=False), options, tmp_path / "run")
    assert done.status == "finished"
    assert done.held_out > 0


def test_a_task_that_could_not_be_saved_is_refused_before_it_begins(tmp_path):
    options = TrainOptions(steps=3, batch_size=2, length=LENGTH, warmup=0)
    with pytest.raises(ConfigError, match="PEFT's format holds LoRA and DoRA; ask for the merged model"):
        AdapterTask(examples(), S2FTConfig(target_modules="all-linear"))
    with pytest.raises(ConfigError, match="lora_plus is a positive ratio for LoRA and DoRA; got 0"):
        AdapterTask(examples(), LoRAConfig(target_modules="all-linear"), lora_plus=0)
    with pytest.raises(ConfigError, match="the model has no active adapter to train"):
        fit(model("decoder"), AdapterTask(examples(), LoRAConfig()), options, tmp_path / "run")
    tied = Decoder(DecoderConfig(**COMMON, **HEADS, tie_word_embeddings=True), rngs=nnx.Rngs(0))
    config = LoRAConfig(rank=2, target_modules=["embed"])
    adapters.apply(tied, config)
    with pytest.raises(ValueError, match="merge: the embedding has an adapter and is the head too"):
        fit(tied, AdapterTask(examples(), config, merge=True), options, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def plain_steps(made, batches, options, b_ratio):
    """The same by nnx.Optimizer, without microbatches, refresh, stacked layers or packing's help."""
    rate = options.learning_rate

    def adam(rate):
        return optax.adam(rate, b1=options.beta1, b2=options.beta2, eps=options.epsilon)

    update = adapters.lora_plus(adam, rate, ratio=b_ratio) if b_ratio else adam(rate)
    optimizer = nnx.Optimizer(made, update, wrt=AdapterParam)

    @nnx.jit
    def step(made, optimizer, batch):
        def loss(made):
            logits = made(batch["tokens"], segment_ids=batch["segments"])
            nats = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(batch["targets"], 0))
            real = batch["targets"] >= 0
            return jnp.sum(jnp.where(real, nats, 0)) / jnp.sum(real)

        value, slopes = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, AdapterParam))(made)
        optimizer.update(made, slopes)
        return value

    return [float(step(made, optimizer, batch)) for batch in batches]


@pytest.mark.parametrize("kind, b_ratio", [("decoder", None), ("mamba2", 8.0)])
def test_steps_are_those_of_plain_code(kind, b_ratio):
    """In microbatches of stacked layers with the norms kept for a step, and only the adapter moves."""
    made, config = adapted(kind)
    other, _ = adapted(kind)
    rate = {"learning_rate": 3e-3, "warmup": 0, "schedule": "constant", "weight_decay": 0.0, "clip": 0.0}
    options = TrainOptions(steps=4, batch_size=4, length=LENGTH, accumulate=2, **rate)
    task = AdapterTask(examples(), config, lora_plus=b_ratio)
    batches = [task.batches(options)[i] for i in range(4)]
    graphdef, params, biases, rest = parts(task.prepare(made), task.trained)
    assert not jax.tree.leaves(biases)
    frozen = [np.asarray(x) for x in jax.tree.leaves(rest)]
    hooks = {"trained": task.trained, "refresh": task.refresh, "update": task.optimizer(options)}
    step = make_step(graphdef, rest, options, task.loss, **hooks)
    state = init_state(params, biases, options, task.optimizer(options))
    size = sum(x.size for x in jax.tree.leaves(params))
    assert sum(x.size for x in jax.tree.leaves(state.optimizer)) <= 2 * size + 10  # two moments and some counters
    losses = []
    for batch in batches:
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(losses, plain_steps(other, batches, options, b_ratio), rtol=2e-5)
    assert losses[-1] != losses[0]
    for before, now in zip(frozen, jax.tree.leaves(rest), strict=True):
        np.testing.assert_array_equal(before, now)
    ours = nn.unstack(nnx.merge(graphdef, state.params, state.biases, rest))
    for (path, a), (_, b) in zip(
        nnx.to_flat_state(nnx.state(ours, AdapterParam)), nnx.to_flat_state(nnx.state(other, AdapterParam)), strict=True
    ):
        moved = np.abs(b.get_value()).max()
        np.testing.assert_allclose(a.get_value(), b.get_value(), rtol=0, atol=2e-4 * moved, err_msg=str(path))


def test_dropout_is_of_the_step_and_the_microbatch():
    config = LoRAConfig(rank=2, target_modules="all-linear", dropout=0.5, init="random")
    made, _ = adapted("decoder", config)
    rows = Rows(random_examples((24, 23, 22, 21)), LENGTH)
    task = AdapterTask(examples(), config)
    batch, again = (Batches(rows, 4, 0, noise=True)[step] for step in (0, 0))
    np.testing.assert_array_equal(batch["noise"], again["noise"])
    assert batch["noise"].shape == (4, 2)
    run = nnx.jit(lambda made, batch: task.loss(made, batch)[0])
    first, other = run(made, batch), run(made, batch | {"noise": batch["noise"][::-1]})
    assert float(first) == float(run(made, again))
    without = float(run(made, {k: v for k, v in batch.items() if k != "noise"}))
    assert len({float(first), float(other), without}) == 3


def test_a_run_keeps_the_adapter_alone_and_its_measures_are_those_of_the_model(tmp_path):
    made, config = adapted("decoder", LoRAConfig(rank=2, target_modules=["query", "up"], modules_to_save=["norm"]))
    task = AdapterTask(examples(held=(11, 6, 20)), config, merge=True)
    options = TrainOptions(steps=3, batch_size=2, length=LENGTH, warmup=0, eval_every=2, learning_rate=0.02)
    before = {n: np.asarray(x) for n, x in arrays(made, nnx.Not(AdapterParam)).items()}
    done = fit(made, task, options, tmp_path / "run", save_dtype=None)
    assert done.status == "finished"
    stored = {p.name for p in (tmp_path / "run" / "checkpoints" / "3" / "state").iterdir()}
    assert stored
    text = (tmp_path / "run" / "checkpoints" / "3" / "state" / "_METADATA").read_text()
    for word, there in {
        "magnitude": False,
        "embedding": False,
        "query.kernel": False,
        ".a": True,
        "scale": True,
    }.items():
        assert (word in text) == there, word
    after = arrays(done.model, nnx.Not(AdapterParam))
    assert before.keys() == after.keys()
    assert all((before[name] == after[name]).all() for name in before)
    # Held out, from the definition: each example alone, in float64.
    nats = tokens = size = 0
    for example in task.examples.held_out:
        logits = np.asarray(done.model(example.tokens[None, :-1])[0], np.float64)
        logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        own = logs[np.arange(len(logits)), example.tokens[1:]][example.trained[1:]]
        nats, tokens, size = nats - own.sum(), tokens + len(own), size + example.bytes
    assert done.held_out == pytest.approx(nats / size / np.log(2), rel=1e-5)
    # What was written gives the same logits: as an adapter, and merged.
    ids = jnp.asarray(task.examples.held_out[0].tokens[None])
    wanted = done.model(ids)
    fresh = model("decoder")
    adapters.load_peft(fresh, tmp_path / "run" / "adapter")
    merged = models.load(tmp_path / "run" / "model")
    for got in (fresh(ids), merged(ids)):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=3e-6 * np.abs(wanted).max())
    assert np.abs(wanted - model("decoder")(ids)).max() > 1e-3
    with pytest.raises(CheckpointError, match="the adapter is for another model than this one"):
        adapters.load_peft(model("mamba2"), tmp_path / "run" / "adapter")
    with pytest.raises(CheckpointError, match=r"holds another run: .*adapter\.rank was 2, is 3"):
        fit(*_with_rank(3, task), options, tmp_path / "run")


def arrays(made, kind):
    return {".".join(map(str, p)): v.get_value() for p, v in nnx.to_flat_state(nnx.state(made, kind))}


def _with_rank(rank, task):
    config = dataclasses.replace(task.config, rank=rank)
    return adapted("decoder", config)[0], AdapterTask(task.examples, config, merge=True)


def test_default_targets_are_what_peft_takes():
    mamba = model("mamba2")
    assert adapters.default_targets(mamba, rank=4) == {"target_modules": "all-linear", "exclude_modules": ["out"]}
    wide = adapters.default_targets(mamba, rank=5)  # in_dt has 4 columns, B and C too
    assert wide["exclude_modules"] == ["in_B", "in_C", "in_dt", "out"]
    experts = DecoderConfig.from_dict(
        {"model_type": "qwen3_moe", **COMMON, **HEADS, "num_experts": 4, "num_experts_per_tok": 2}
        | {"moe_intermediate_size": 8, "head_dim": 8, "mlp_only_layers": [0]}
    )
    routed = Decoder(experts, rngs=nnx.Rngs(0))
    config = LoRAConfig(rank=2, **adapters.default_targets(routed, rank=2))
    assert config.exclude_modules == ("router",)
    names = adapters.apply(routed, config)
    assert "layers.0.mlp.up" in names  # the dense layer's
    assert not any("router" in n or n.startswith(("head", "embed")) or n == "layers.1.mlp.up" for n in names)
    assert adapters.expert_targets(routed)["target_modules"] == [
        "layers.1.mlp.gate",
        "layers.1.mlp.up",
        "layers.1.mlp.down",
    ]
    with pytest.raises(ValueError, match="no linear layer of Mamba2LM can have an adapter of rank 99 by default"):
        adapters.default_targets(mamba, rank=99)
    with pytest.raises(ValueError, match="Mamba2LM has no layer with experts"):
        adapters.expert_targets(mamba)
