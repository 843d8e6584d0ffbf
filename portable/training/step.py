"""One optimizer step: schedule, loss, accumulation, update, compiled as one program."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from portable import ops
from portable.nn.moe import SelectionBias
from portable.training.data import IGNORE
from portable.training.options import TrainOptions

# Scales, offsets and the decay and step parameters of state-space layers: pulling them to zero means nothing.
_NOT_DECAYED = {"scale", "bias", "A_log", "D", "dt_bias", "gamma1", "gamma2", "rel_pos_bias", "sinks"}
_NOT_DECAYED |= {"gate_bias", "up_bias", "down_bias", "score_scale", "constants"}  # of experts


class TrainState(NamedTuple):
    """Everything a step reads and writes.

    Attributes:
      params: the model's trainable state, float32, layers stacked.
      optimizer: optax's state.
      step: [] int32, steps done.
      biases: of the selection of experts (`portable.nn.SelectionBias`), which their loads move; empty without experts.
    """

    params: nnx.State
    optimizer: optax.OptState
    step: jax.Array
    biases: nnx.State


def parts(model: nnx.Module) -> tuple[nnx.GraphDef, nnx.State, nnx.State, nnx.State]:
    """Returns (graphdef, params, biases, rest): a model's structure, what a step changes, and what it does not."""
    graphdef, params, biases, rest = nnx.split(model, nnx.Param, SelectionBias, ...)
    return graphdef, params, biases, rest


def learning_rate(options: TrainOptions) -> optax.Schedule:
    """Returns step -> learning rate: linear warm-up, then the named schedule."""
    peak, end = options.learning_rate, options.learning_rate * options.final_fraction
    after = max(options.steps - options.warmup, 1)
    if options.schedule == "cosine":
        decay = optax.cosine_decay_schedule(peak, after, alpha=options.final_fraction)
    elif options.schedule == "linear":
        decay = optax.linear_schedule(peak, end, after)
    elif options.schedule == "wsd":
        tail = min(max(options.steps // 5, 1), after)
        decay = optax.linear_schedule(peak, end, tail, transition_begin=after - tail)
    else:
        decay = optax.constant_schedule(peak)
    # The first step (step 0) already moves: warm-up ends exactly at step `warmup`.
    warmup = optax.linear_schedule(peak / (options.warmup + 1), peak, options.warmup)
    return optax.join_schedules([warmup, decay], [options.warmup]) if options.warmup else decay


def decayed(params: nnx.State) -> nnx.State:
    """Returns a tree like `params` of booleans: True where weight decay applies."""

    def one(path, _):
        names = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
        return not _NOT_DECAYED & set(names)

    return jax.tree_util.tree_map_with_path(one, params)


def optimizer(options: TrainOptions) -> optax.GradientTransformation:
    """Returns AdamW (Loshchilov & Hutter, arXiv:1711.05101) behind a clip of the global gradient norm."""
    adamw = optax.adamw(
        learning_rate(options),
        b1=options.beta1,
        b2=options.beta2,
        eps=options.epsilon,
        weight_decay=options.weight_decay,
        mask=decayed,
    )
    return optax.chain(optax.clip_by_global_norm(options.clip), adamw) if options.clip else adamw


def cross_entropy(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sums the negative log likelihood of the targets.

    Args:
      logits: [..., v], any float dtype; computed in float32.
      targets: [...] int; IGNORE (-1) where there is none.

    Returns:
      (sum in nats [] float32, number of targets [] int32).
    """
    real = targets != IGNORE
    nats = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), jnp.where(real, targets, 0))
    return jnp.sum(jnp.where(real, nats, 0.0)), jnp.sum(real, dtype=jnp.int32)


def next_token(model: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
    """Returns `cross_entropy` of a language model over a `Batch`, with what its routers ask to add for each target.

    The model is called as `model(tokens, segment_ids=segments)`, and with return_aux=True where its `routed` is true.
    """
    if not getattr(model, "routed", False):
        return cross_entropy(model(batch["tokens"], segment_ids=batch["segments"]), batch["targets"])
    logits, aux = model(batch["tokens"], segment_ids=batch["segments"], return_aux=True)
    nats, targets = cross_entropy(logits, batch["targets"])
    return nats + aux * targets, targets


def init_state(params: nnx.State, biases: nnx.State, options: TrainOptions) -> TrainState:
    """Returns the state before the first step: float32 copies of what `parts` gives, which a step may donate."""
    params, biases = jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), (params, biases))
    return TrainState(params, optimizer(options).init(params), jnp.zeros((), jnp.int32), biases)


def make_step(
    graphdef: nnx.GraphDef,
    rest: nnx.State,
    options: TrainOptions,
    loss: Callable[[Any, Any], tuple[jax.Array, jax.Array]] = next_token,
) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]:
    """Returns the compiled step `(state, batch) -> (state, metrics)`; the state given is donated.

    With `accumulate` = k the batch is walked in k microbatches by `lax.scan`; the loss is the mean over all targets
    of the batch either way.

    Args:
      graphdef, rest: the model's structure and untrained variables, from `parts`.
      options: the run's options.
      loss: (model, batch) -> (sum in nats [] float32, targets [] int32); a batch is a tree of arrays of b rows.

    Metrics, each [] : loss (nats a target, float32), gradient_norm (before clipping), learning_rate, targets
    (int32).
    """
    update = optimizer(options)
    schedule = learning_rate(options)

    def loss_sum(trained, micro):
        return loss(nnx.merge(graphdef, *trained, rest), micro)

    gradient = jax.value_and_grad(loss_sum, has_aux=True)

    def whole(trained, batch):
        if options.accumulate == 1:
            return gradient(trained, batch)
        micros = jax.tree.map(lambda x: x.reshape(options.accumulate, -1, *x.shape[1:]), batch)

        def body(total, micro):
            return jax.tree.map(jnp.add, total, gradient(trained, micro)), None

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient, trained, batch))
        return jax.lax.scan(body, zeros, micros)[0]

    def step(state: TrainState, batch: Any):
        (total, targets), (gradients, loads) = whole((state.params, state.biases), batch)
        gradients = jax.tree.map(lambda g: g / jnp.maximum(targets, 1), gradients)
        updates, opt_state = update.update(gradients, state.optimizer, state.params)
        metrics = {
            "loss": total / jnp.maximum(targets, 1),
            "gradient_norm": optax.tree.norm(gradients),
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
            "targets": targets,
        }
        biases = jax.tree.map(lambda b, load: ops.updated_bias(b, load, rate=options.bias_rate), state.biases, loads)
        params: Any = optax.apply_updates(state.params, updates)  # pyright: ignore[reportArgumentType]
        return TrainState(params, opt_state, state.step + 1, biases), metrics

    return jax.jit(step, donate_argnums=0)
