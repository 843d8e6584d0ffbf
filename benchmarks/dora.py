"""DoRA beside LoRA and PEFT: memory by the compilers of a TPU and a GPU, time on a processor, losses over training.

See `harness.phases` for how it measures. Memory needs no device: it is the compilers' account
(`pip install -e '.[aot]'`).

    pip install -e '.[oracles]'
    python benchmarks/dora.py                       # every phase, about half an hour on two cores
    python benchmarks/dora.py memory                # one phase; its results replace those it had
    JAX_PLATFORMS=cuda python benchmarks/dora.py device     # a layer on the GPU at hand, beside PEFT's there
    python benchmarks/dora.py --show                # the table of the committed results
"""

import os
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from harness import phases, report
from harness.phases import ratio, run, take_turns

from portable import adapters, models, ops, parity
from portable.parity import hlo

HERE = pathlib.Path(__file__).resolve().parent
RESULTS = HERE / "results" / "dora.json"
MIB = 2**20
D, LAYERS, SCALE = 4096, 2, 2.0


def pefts_linear(x, w, a, b, m):
    """DoRA as PEFT writes it: the whole update, its norm, and a difference to the frozen layer's result."""
    n = jax.lax.stop_gradient(jnp.sqrt(jnp.sum((w + SCALE * (a @ b)).astype(jnp.float32) ** 2, axis=0)))
    g, base = m / n, x @ w
    return base + ((g - 1) * base + g * (SCALE * ((x @ a) @ b))).astype(x.dtype)


def layer_of(kind: str) -> Callable:
    """Returns (x, w, a, b, m) -> y of "dora", "lora", or "peft"."""
    if kind == "lora":
        return lambda x, w, a, b, m: ops.lora_linear(x, w, a, b, scale=SCALE)
    if kind == "dora":
        return lambda x, w, a, b, m: ops.dora_linear(x, w, a, b, m, scale=SCALE)
    return pefts_linear


def stack_program(kind: str) -> tuple[Callable, tuple]:
    """Returns the gradients of 4 layers of 4096 x 4096 on 4096 tokens with r = 384, in bfloat16."""
    layer = layer_of(kind)

    def loss(trained, x, weights):
        for (a, b, m), w in zip(trained, weights, strict=True):
            x = jax.nn.silu(layer(x, w, a, b, m))
        return jnp.sum(x.astype(jnp.float32) ** 2)

    def shape(*sizes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype)

    trained = [(shape(D, 384), shape(384, D), shape(D, dtype=jnp.float32)) for _ in range(4)]
    return jax.grad(loss), (trained, shape(D, D), [shape(D, D)] * 4)


def norm_program(form: str, known: bool) -> tuple[Callable, tuple]:
    """Returns the norms of a weight of 8192 x 8192 with r = 384, in bfloat16."""
    shapes = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((8192, 8192), (8192, 384), (384, 8192))]
    squares = [jax.ShapeDtypeStruct((8192,), jnp.float32)] * known

    def norm(w, a, b, *squares):
        options = {"squares": squares[0] if squares else None, "implementation": form or None}
        return ops.dora_norm(w, a, b, scale=SCALE, **options)

    return norm, (*shapes, *squares)


def memory(rounds: int) -> Iterator[list[report.Row]]:
    """Temporary memory of forward and backward, and of the norm alone, by the compilers."""
    del rounds

    def temp(target: str, fn: Callable, args: tuple) -> float:
        return hlo.memory(parity.compile_for(target, fn, *args))["temp"]

    for target, bar in (("tpu-v5e", 176), ("cuda-sm90", 450)):
        ours, lora, theirs = (temp(target, *stack_program(kind)) for kind in ("dora", "lora", "peft"))
        rows = [size_row(f"{target}: 4 layers, forward and backward", ours, "PEFT's formula", theirs, bar)]
        texts = f"{ours / MIB:.0f} MiB", "LoRA", f"{lora / MIB:.0f} MiB"
        yield [*rows, report.Row("  over LoRA", *texts, ours / lora, "<=", 1.65 if target == "tpu-v5e" else None)]
    for target, bar in (("tpu-v5e", 1), ("tpu-v6e", 1), ("cuda-sm90", 25)):
        dense, auto, known = (
            temp(target, *norm_program(form, squares))
            for form, squares in (("xla_dense", False), ("", False), ("", True))
        )
        yield [
            size_row(f"{target}: norms", auto, "the updated weight formed", dense, bar),
            size_row("  squares known", known, "the updated weight formed", dense, bar),
        ]


def size_row(what: str, ours: float, against: str, theirs: float, bar: float) -> report.Row:
    """Returns a row of memory, judged in MiB."""
    texts = f"{ours / MIB:.1f} MiB", against, f"{theirs / MIB:.1f} MiB"
    return report.Row(what, *texts, ours / MIB, "<=", bar, f"{ours / MIB:.1f} MiB")


def arrays(rank: int, *lead: int) -> tuple[list, list]:
    """Returns the frozen weights and [(a, b, m)] of the layers, float32; `lead` counts adapters."""
    keys = iter(jax.random.split(jax.random.key(0), 4 * LAYERS))
    weights = [jax.random.normal(next(keys), (D, D)) * D**-0.5 for _ in range(LAYERS)]
    trained = []
    for w in weights:
        a = jax.random.uniform(next(keys), (*lead, D, rank), minval=-1, maxval=1) * D**-0.5
        b = 0.01 * jax.random.normal(next(keys), (*lead, rank, D))
        trained.append((a, b, jnp.broadcast_to(jnp.linalg.norm(w, axis=0), (*lead, D))))
    return weights, trained


def step_program(kind: str, rank: int, micro: int) -> Callable:
    """Returns a compiled optimizer step on `micro` times 512 tokens, which keeps what it trains.

    The slope of the first layer's input is computed too, as for a layer that has others before it.
    """
    weights, trained = arrays(rank)
    squares = [jnp.sum(w * w, axis=0) for w in weights]
    x = jax.random.normal(jax.random.key(9), (micro, 512, D))
    optimizer = optax.adamw(1e-4)
    if kind == "lora":
        trained = [(a, b) for a, b, _ in trained]

    def forward(trained, norms, x, weights):
        for factors, w, n in zip(trained, weights, norms, strict=True):
            if kind == "lora":
                x = ops.lora_linear(x, w, *factors, scale=SCALE)
            else:
                x = ops.dora_linear(x, w, *factors, scale=SCALE, norms=n)
            x = jax.nn.silu(x)
        return jnp.mean(x * x)

    def step(trained, state, x, weights, squares):
        norms = [None] * LAYERS
        if kind == "dora":  # once a step: what `adapters.refresh` does
            given = zip(weights, trained, squares, strict=True)
            norms = [ops.dora_norm(w, a, b, scale=SCALE, squares=s) for w, (a, b, _), s in given]

        def body(total, x):
            return jax.tree.map(jnp.add, total, jax.grad(forward, (0, 2))(trained, norms, x, weights)), None

        start = jax.tree.map(jnp.zeros_like, (trained, x[0]))
        slopes, back = body(start, x[0])[0] if micro == 1 else jax.lax.scan(body, start, x)[0]
        updates, state = optimizer.update(slopes, state, trained)
        return optax.apply_updates(trained, updates), state, back

    state = optimizer.init(trained)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(trained, state, x, weights, squares).compile()
    held = [trained, state]

    def once():
        held[0], held[1], _ = compiled(held[0], held[1], x, weights, squares)
        return held[0]

    return once


def peft_step(rank: int) -> Callable:
    """Returns PEFT's optimizer step on 512 tokens."""
    import peft
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    weights, trained = arrays(rank)
    net = torch.nn.Sequential()
    for w in weights:
        net.extend([torch.nn.Linear(D, D, bias=False), torch.nn.SiLU()])
        with torch.no_grad():
            net[-2].weight.copy_(torch.from_numpy(np.array(w.T)))
    targets = [str(2 * i) for i in range(LAYERS)]
    config = peft.LoraConfig(r=rank, lora_alpha=SCALE * rank, target_modules=targets, use_dora=True)
    model = peft.get_peft_model(net, config)
    with torch.no_grad():
        for name, (a, b, m) in zip(targets, trained, strict=True):
            layer = model.base_model.model.get_submodule(name)
            layer.lora_A["default"].weight.copy_(torch.from_numpy(np.array(a.T)))
            layer.lora_B["default"].weight.copy_(torch.from_numpy(np.array(b.T)))
            layer.lora_magnitude_vector["default"].weight.copy_(torch.from_numpy(np.array(m)))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    x = torch.from_numpy(np.array(jax.random.normal(jax.random.key(9), (512, D)))).requires_grad_()

    def once() -> None:
        optimizer.zero_grad()
        x.grad = None
        model(x).square().mean().backward()
        optimizer.step()

    return once


def steps(rounds: int) -> Iterator[list[report.Row]]:
    """Optimizer steps of two layers of 4096 x 4096, float32: DoRA over LoRA, and PEFT's over ours."""
    for rank, micro, bar in ((16, 1, 1.15), (384, 1, 1.4), (384, 8, 1.15)):
        name = f"step of {512 * micro} tokens, r={rank}"
        print(name, file=sys.stderr)
        programs = {kind: step_program(kind, rank, micro) for kind in ("dora", "lora")}
        if (rank, micro) == (384, 1):
            programs["peft"] = peft_step(rank)
        times = take_turns(programs, rounds if micro == 1 else max(3, rounds // 3))
        rows = [ratio(name, times["dora"], "LoRA", times["lora"], "<=", bar)]
        if "peft" in times:
            rows.append(ratio("  against PEFT", times["dora"], "its DoRA", times["peft"], ">=", 1.5))
        yield rows


def inference(rounds: int) -> Iterator[list[report.Row]]:
    """Forward with cached norms over LoRA; and 20 adapters, each for some of a batch's rows, over one."""
    for rank in (16, 384):
        weights, trained = arrays(rank)
        norms = [ops.dora_norm(w, a, b, scale=SCALE) for w, (a, b, _) in zip(weights, trained, strict=True)]
        x = jax.random.normal(jax.random.key(9), (512, D))

        def dora(x, weights, trained, norms):
            for w, factors, n in zip(weights, trained, norms, strict=True):
                x = jax.nn.silu(ops.dora_linear(x, w, *factors, scale=SCALE, norms=n))
            return x

        def lora(x, weights, trained, norms):
            for w, (a, b, _) in zip(weights, trained, strict=True):
                x = jax.nn.silu(ops.lora_linear(x, w, a, b, scale=SCALE))
            return x

        args = (x, weights, trained, norms)
        programs = {f.__name__: run(f, *args) for f in (dora, lora)}
        times = take_turns(programs, 3 * rounds)
        yield [ratio(f"512 tokens, cached norms, r={rank}", times["dora"], "LoRA", times["lora"], "<=", 1.03)]
    for tokens, what in (
        (32, "20 examples of 32 tokens"),
        (1, "20 rows of one token"),
        (0, "640 tokens, ids for each"),
    ):
        yield [crowd(tokens, what, rounds)]


def crowd(tokens: int, what: str, rounds: int) -> report.Row:
    """Returns the row of 20 DoRA adapters with r=16 in one batch over one for the whole batch."""
    weights, many = arrays(16, 20)
    shape = (20, tokens, D) if tokens > 1 else (20 if tokens else 640, D)
    x = jax.random.normal(jax.random.key(9), shape)
    ids = jnp.arange(20, dtype=jnp.int32) if tokens else jax.random.randint(jax.random.key(3), (640,), 0, 20)
    norms = [jnp.linalg.norm(w, axis=0) for w in weights]

    def several(x, ids, weights, many, norms):
        for w, (a, b, m), n in zip(weights, many, norms, strict=True):
            n = jnp.broadcast_to(n, m.shape)
            x = jax.nn.silu(ops.dora_linear(x, w, a, b, m, scale=SCALE, norms=n, ids=ids))
        return x

    def one(x, ids, weights, single, norms):
        for w, (a, b, m), n in zip(weights, single, norms, strict=True):
            x = jax.nn.silu(ops.dora_linear(x, w, a, b, m, scale=SCALE, norms=n))
        return x

    single = [tuple(z[0] for z in factors) for factors in many]
    runs = {}
    for name, f, factors in (("several", several, many), ("one", one, single)):
        args = (x, ids, weights, factors, norms)
        runs[name] = run(f, *args)
    times = take_turns(runs, 3 * rounds)
    # A token a row is bound by memory, and 20 adapters of rank 16 are 16 % more to read than one, beside the weight.
    return ratio(f"{what}, 20 adapters", times["several"], "one adapter", times["one"], "<=", 1.11)


# Square layers as arXiv:2603.22276 times them on GPUs: width, tokens, rank.
DEVICE_SHAPES = ((4096, 4096, 384), (8192, 4096, 384))


def device(rounds: int) -> Iterator[list[report.Row]]:
    """One layer on the device at hand, bfloat16, beside PEFT's in PyTorch there: inference, and value and gradients.

    The goals are a GPU's; on another device the rows are shown without one.
    """
    import peft
    import torch

    on_gpu = jax.default_backend() == "gpu"
    if on_gpu and not torch.cuda.is_available():
        raise SystemExit("device: JAX has a GPU and PyTorch has none; install a PyTorch for CUDA.")
    place = "cuda" if on_gpu else "cpu"
    bar = 1.5 if on_gpu else None
    for d, tokens, rank in DEVICE_SHAPES if on_gpu else ((1024, 256, 64),):
        x, w, a, b, m = _layer(d, tokens, rank)
        net = torch.nn.Sequential(torch.nn.Linear(d, d, bias=False, dtype=torch.bfloat16))
        config = peft.LoraConfig(r=rank, lora_alpha=SCALE * rank, target_modules=["0"], use_dora=True)
        theirs = peft.get_peft_model(net, config).to(place)
        rows = torch.from_numpy(np.array(x, np.float32)).to(place, torch.bfloat16).requires_grad_()

        def infer(theirs=theirs, rows=rows):
            with torch.no_grad():
                theirs(rows)
            if on_gpu:
                torch.cuda.synchronize()

        def both(theirs=theirs, rows=rows):
            theirs.zero_grad()
            rows.grad = None
            theirs(rows).sum().backward()
            if on_gpu:
                torch.cuda.synchronize()

        def ours(x, a, b, m, w, norms=None):
            return ops.dora_linear(x, w, a, b, m, scale=SCALE, norms=norms)

        norms = ops.dora_norm(w, a, b, scale=SCALE)
        slopes = phases.with_gradients(lambda x, a, b, m, w=w: ours(x, a, b, m, w))
        programs = {
            "inference": (run(ours, x, a, b, m, w, norms), infer),
            "value and gradients": (run(slopes, x, a, b, m, jnp.ones_like(x)), both),
        }
        kind = jax.devices()[0].device_kind
        for what, (mine, other) in programs.items():
            times = take_turns({"ours": mine, "PEFT": other}, rounds)
            name = f"{kind}: {what}, {d} x {d}, {tokens} tokens, r={rank}"
            yield [ratio(name, times["ours"], "PEFT", times["PEFT"], ">=", bar)]


def _layer(d: int, tokens: int, rank: int) -> list[jax.Array]:
    """Returns x, w, a, b in bfloat16 and m in float32."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = (tokens, d), (d, d), (d, rank), (rank, d)
    x, w, a, b = (jax.random.normal(k, s, jnp.bfloat16) * s[0] ** -0.5 for k, s in zip(keys, shapes, strict=True))
    return [x, w, a, b, jnp.linalg.norm(w.astype(jnp.float32), axis=0)]


def training(rounds: int) -> Iterator[list[report.Row]]:
    """Losses of 2,000 steps of a small Llama from the same start and batches as PEFT's, by three seeds."""
    del rounds
    yield [losses_row(2000, seeds=3)]


def losses_row(count: int, seeds: int) -> report.Row:
    """Returns the row of the mean difference of losses over `count` steps."""
    differences, last = [], []
    for seed in range(seeds):
        ours, theirs = losses(count, seed)
        differences.append(np.abs(ours - theirs).mean())
        last.append((ours[-50:].mean(), theirs[-50:].mean()))
        print(f"  seed {seed}: {ours[0]:.4f} to {last[-1][0]:.5f}, PEFT {last[-1][1]:.5f}", file=sys.stderr)
    text = f"{np.mean([x for x, _ in last]):.4f}", "PEFT", f"{np.mean([y for _, y in last]):.4f}"
    mean = float(np.mean(differences))
    return report.Row(f"loss over {count} steps, {seeds} seeds, DoRA", *text, mean, "<=", 7e-4, f"{mean:.1e}")


def losses(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns our losses and PEFT's [count]."""
    import peft
    import torch
    import transformers

    torch.manual_seed(seed)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=4))
    rng = np.random.default_rng(seed)
    table = rng.dirichlet(np.full(64, 0.1), 64).cumsum(1)  # a language of pairs, which there is something to learn of
    batches = np.zeros((count, 8, 33), np.int64)
    for t in range(1, 33):
        drawn = rng.random((count, 8, 1))
        batches[..., t] = np.minimum((table[batches[..., t - 1]] < drawn).sum(-1), 63)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(f"{folder}/model")
        config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", use_dora=True)
        theirs = peft.get_peft_model(model, config)
        theirs.save_pretrained(f"{folder}/adapter")
        ours = models.load(f"{folder}/model")
        adapters.load_peft(ours, f"{folder}/adapter")
    graphdef, trained, rest = nnx.split(ours, adapters.AdapterParam, ...)
    optimizer = optax.adamw(1e-3, weight_decay=0.0)

    def loss(trained, batch):
        logits = nnx.merge(graphdef, trained, rest)(batch[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()

    @jax.jit
    def train(trained, batches):
        def step(held, batch):
            value, slopes = jax.value_and_grad(loss)(held[0], batch)
            updates, state = optimizer.update(slopes, held[1], held[0])
            return (optax.apply_updates(held[0], updates), state), value

        return jax.lax.scan(step, (trained, optimizer.init(trained)), batches)[1]

    mine = np.asarray(train(trained, jnp.asarray(batches, jnp.int32)))
    named = [p for p in theirs.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(named, lr=1e-3, weight_decay=0.0)
    found = []
    for batch in torch.from_numpy(batches):
        adam.zero_grad()
        logits = theirs(batch[:, :-1]).logits
        value = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        value.backward()
        adam.step()
        found.append(float(value.detach()))
    return mine, np.asarray(found)


PHASES = {"memory": memory, "steps": steps, "inference": inference, "training": training, "device": device}


if __name__ == "__main__":
    raise SystemExit(phases.main("DoRA", __doc__, PHASES, RESULTS, rounds=9, by_name=["device"]))
