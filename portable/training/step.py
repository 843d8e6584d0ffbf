"""One optimizer step: schedule, loss, accumulation, update, compiled as one program."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from portable import adapters, ops
from portable.checks import ConfigError, DataError
from portable.nn.moe import SelectionBias
from portable.training.data import IGNORE
from portable.training.options import TrainOptions

# Scales, offsets and the decay and step parameters of state-space layers: pulling them to zero means nothing.
_NOT_DECAYED = {"scale", "bias", "A_log", "D", "dt_bias", "gamma1", "gamma2", "rel_pos_bias", "sinks"}
_NOT_DECAYED |= {"gate_bias", "up_bias", "down_bias", "score_scale", "constants"}  # of experts
_NOT_DECAYED |= {"magnitude"}  # of adapters


class TrainState(NamedTuple):
    """Everything a step reads and writes.

    Attributes:
      params: what is trained of the model, float32, layers stacked.
      optimizer: optax's state.
      step: [] int32, steps done.
      biases: of the selection of experts (`portable.nn.SelectionBias`), which their loads move; empty without experts,
        and where only a part of the model is trained.
    """

    params: nnx.State
    optimizer: optax.OptState
    step: jax.Array
    biases: nnx.State


def parts(model: nnx.Module, trained: Any = nnx.Param) -> tuple[nnx.GraphDef, nnx.State, nnx.State, nnx.State]:
    """Returns (graphdef, params, biases, rest): a model's structure, what a step changes, and what it does not.

    Args:
      model: any module. trained: the kind of variable that is trained; the biases of a part of a model stay.
    """
    moved = SelectionBias if trained is nnx.Param else nnx.Nothing()
    graphdef, params, biases, rest = nnx.split(model, trained, moved, ...)
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


def optimizer(options: TrainOptions, b_ratio: float | None = None) -> optax.GradientTransformation:
    """Returns AdamW (Loshchilov & Hutter, arXiv:1711.05101) behind a clip of the global gradient norm.

    Args:
      options: of the run. b_ratio: of the learning rate of adapters' B to that of everything else (LoRA+).
    """

    def adamw(rate: Any) -> optax.GradientTransformation:
        decay = {"weight_decay": options.weight_decay, "mask": decayed}
        return optax.adamw(rate, b1=options.beta1, b2=options.beta2, eps=options.epsilon, **decay)

    rate = learning_rate(options)
    made = adamw(rate) if b_ratio is None else adapters.lora_plus(adamw, rate, ratio=b_ratio)
    return optax.chain(optax.clip_by_global_norm(options.clip), made) if options.clip else made


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

    Raises:
      DataError: the batch has no segments. ConfigError: the model takes none, so documents of a row would be one to it.
    """
    if "segments" not in batch:
        raise DataError(
            "next_token: a batch must have segments, [b, t] integers that change where a document begins, or the "
            f"documents of a row are one to the model; got {', '.join(batch)}. Zeros say that each row is one document."
        )
    if not takes_segments(model):
        raise ConfigError(
            f"next_token: {type(model).__name__} takes no segment_ids, so documents packed into one row would see each "
            "other; give its __call__ that argument, or train on one document a row."
        )
    if not getattr(model, "routed", False):
        return cross_entropy(model(batch["tokens"], segment_ids=batch["segments"]), batch["targets"])
    logits, aux = model(batch["tokens"], segment_ids=batch["segments"], return_aux=True)
    nats, targets = cross_entropy(logits, batch["targets"])
    return nats + aux * targets, targets


def takes_segments(model: Any) -> bool:
    """Returns whether a model can be called with segment_ids."""
    found = inspect.signature(type(model).__call__).parameters
    return "segment_ids" in found or any(p.kind is p.VAR_KEYWORD for p in found.values())


def init_state(
    params: nnx.State,
    biases: nnx.State,
    options: TrainOptions,
    update: optax.GradientTransformation | None = None,
) -> TrainState:
    """Returns the state before the first step: float32 copies of what `parts` gives, which a step may donate.

    Args:
      params, biases: from `parts`. options: of the run. update: the optimizer; `optimizer(options)` by default.
    """
    params, biases = jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), (params, biases))
    return TrainState(params, (update or optimizer(options)).init(params), jnp.zeros((), jnp.int32), biases)


def make_step(
    graphdef: nnx.GraphDef,
    rest: nnx.State,
    options: TrainOptions,
    loss: Callable[[Any, Any], tuple[jax.Array, jax.Array]] = next_token,
    *,
    trained: Any = nnx.Param,
    refresh: Callable[[Any], None] | None = None,
    update: optax.GradientTransformation | None = None,
) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]:
    """Returns the compiled step `(state, batch) -> (state, metrics)`; the state given is donated.

    With `accumulate` = k the batch is walked in k microbatches by `lax.scan`; the loss is the mean over all targets
    of the batch either way.

    Args:
      graphdef, rest: the model's structure and untrained variables, from `parts`.
      options: the run's options.
      loss: (model, batch) -> (sum in nats [] float32, targets [] int32); a batch is a tree of arrays of b rows.
      trained: the kind of variable that `parts` was told.
      refresh: called with the model once a step, before the microbatches, to change what is not trained in place, such
        as the norms of `portable.adapters.refresh`.
      update: the optimizer; `optimizer(options)` by default.

    Metrics, each [] : loss (nats a target, float32), gradient_norm (before clipping), learning_rate, targets
    (int32).
    """
    transform = update or optimizer(options)
    schedule = learning_rate(options)

    def whole(graphdef, moved, rest, batch):
        gradient = jax.value_and_grad(lambda moved, micro: loss(nnx.merge(graphdef, *moved, rest), micro), has_aux=True)
        if options.accumulate == 1:
            return gradient(moved, batch)
        micros = jax.tree.map(lambda x: x.reshape(options.accumulate, -1, *x.shape[1:]), batch)

        def body(total, micro):
            return jax.tree.map(jnp.add, total, gradient(moved, micro)), None

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient, moved, batch))
        return jax.lax.scan(body, zeros, micros)[0]

    def step(state: TrainState, rest: nnx.State, batch: Any):
        graph = graphdef
        if refresh is not None:
            model = nnx.merge(graphdef, state.params, state.biases, rest)
            refresh(model)
            graph, _, _, rest = parts(model, trained)
        (total, targets), (gradients, loads) = whole(graph, (state.params, state.biases), rest, batch)
        gradients = jax.tree.map(lambda g: g / jnp.maximum(targets, 1), gradients)
        updates, opt_state = transform.update(gradients, state.optimizer, state.params)
        metrics = {
            "loss": total / jnp.maximum(targets, 1),
            "gradient_norm": optax.tree.norm(gradients),
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
            "targets": targets,
        }
        biases = jax.tree.map(lambda b, load: ops.updated_bias(b, load, rate=options.bias_rate), state.biases, loads)
        params: Any = optax.apply_updates(state.params, updates)  # pyright: ignore[reportArgumentType]
        return TrainState(params, opt_state, state.step + 1, biases), metrics

    # What is not trained is an argument: a program that held it as constants would have the model's size.
    compiled = jax.jit(step, donate_argnums=0)
    return lambda state, batch: compiled(state, rest, batch)
