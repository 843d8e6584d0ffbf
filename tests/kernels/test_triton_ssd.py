"""The Triton kernels of `ssd`: values and gradients by Triton's interpreter, machine code by the compilers."""

import dataclasses
import importlib.util
import json
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import portable
from portable.ops._ssd import reference
from portable.pallas_kernels.gpu import _launch, ssd
from portable.parity import numbers
from tests.kernels.mutation import errors
from tests.kernels.triton_compiler import SHARED, compile_kernels, compilers
from tests.oracles import child, need

IMPORTS = """
import sys
import jax, jax.numpy as jnp
from portable.pallas_kernels.gpu import _launch, ssd

def shapes(b, t, h, p, g, n, dtype):
    of = jax.ShapeDtypeStruct
    k, v, state = of((b, t, g, n), dtype), of((b, t, h, p), dtype), of((b, h, p, n), jnp.float32)
    return of((b, t, h), jnp.float32), k, v, k, state, of((b, t), jnp.int32)

def both(residuals, dy, dstate):
    return ssd.fwd(*residuals, chunk_size=None), ssd.bwd(residuals, (dy, dstate), chunk_size=None)

def lowered(fn, *args):
    return jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
"""


def core(b, t, h, p, g, n, *, state=True, segments=0.0, chunk_size=16, dtype="float32", keys=None, decay=1.0):
    """Returns a function of a seed that makes the core's arguments and options; `decay` scales the logs, `segments` is
    how often one starts."""

    def make(seed):
        rng = np.random.default_rng(seed)
        normal = lambda dtype, *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
        a = -decay * rng.uniform(0.001, 1.0, [b, t, h])
        if decay > 1:  # none at all, and beyond what float32 holds, among the strong ones
            a[rng.uniform(size=a.shape) < 0.3] = 0
            a[rng.uniform(size=a.shape) < 0.1] = -np.inf
        dt = jnp.asarray(rng.uniform(0.1, 1.0, [b, t, h]), jnp.float32)
        x, k, q = (
            normal(d, b, t, *s) for d, s in ((dtype, (h * p,)), (keys or dtype, (g, n)), (keys or dtype, (g, n)))
        )
        start = normal("float32", b, h, p, n) if state else None
        counts = np.cumsum(rng.uniform(size=[b, t]) < segments, 1) if segments else None
        counts = None if counts is None else jnp.asarray(counts - counts[:, :1], jnp.int32)
        return (jnp.asarray(a, jnp.float32), dt, x, k, q, start, counts), {"chunk_size": chunk_size}

    return make


# Beside the op's own cases, which tests/ops/test_parity.py holds against the definition.
MADE = {
    "groups": core(2, 37, 4, 16, 2, 32),
    "segments": core(2, 50, 2, 16, 2, 16, segments=0.15, chunk_size=32),
    "segments_longer_than_chunks": core(1, 90, 2, 16, 1, 16, segments=0.03, decay=0.01),
    "no_state": core(1, 33, 2, 16, 2, 32, state=False),
    "one_token": core(2, 1, 2, 16, 1, 16, chunk_size=None),
    "short_of_a_chunk": core(1, 21, 2, 16, 1, 16, segments=0.15, chunk_size=None),
    "several_blocks": core(1, 70, 2, 64, 1, 64, chunk_size=None),
    "parts_of_a_group": core(1, 20, 11, 16, 1, 16),
    "strong_decay": core(1, 130, 2, 16, 1, 16, chunk_size=64, decay=480.0),
    "huge_decay": core(2, 50, 2, 16, 1, 16, segments=0.15, decay=1e5),
    "weak_decay": core(1, 130, 2, 16, 1, 16, chunk_size=64, decay=1e-5),
    "bfloat16_groups": core(2, 37, 4, 16, 2, 32, segments=0.15, dtype="bfloat16"),
    "bfloat16_several_blocks": core(1, 70, 2, 128, 1, 128, chunk_size=None, dtype="bfloat16"),
    "bfloat16_float32_keys": core(1, 40, 2, 16, 1, 32, dtype="bfloat16", keys="float32"),
    "float16": core(1, 40, 2, 32, 1, 16, dtype="float16"),
}


@pytest.mark.parametrize("case", MADE)
def test_equals_the_definition_in_float64(case, seed):
    need("triton", "torch")
    arrays, options = MADE[case](seed)
    floats = [x for x in arrays if x is not None and jnp.issubdtype(x.dtype, jnp.floating)]
    pairs = numbers.interpreted(ssd.IMPL, reference.IMPL, arrays, options, True, seed)
    assert [x.dtype for x, _ in pairs] == [arrays[2].dtype, jnp.float32, *(x.dtype for x in floats)]
    bar = numbers.BARS[str(arrays[2].dtype)]
    for i, (got, want) in enumerate(pairs):
        assert numbers.relative(got, want) <= bar * (1 if i < 2 else numbers.GRADIENTS), i


def test_the_interpreter_shows_what_a_kernel_did_not_write(tmp_path, monkeypatch):
    need("triton", "torch")
    (tmp_path / "forgetful.py").write_text(
        "import jax, triton, triton.language as tl\n"
        "from portable.pallas_kernels.gpu import _launch\n"
        "from portable.selection import Impl\n"
        "@triton.jit\n"
        "def half(x, y, N: tl.constexpr):\n"
        "    i = tl.arange(0, N // 2)\n"
        "    tl.store(y + i, tl.load(x + i))\n"
        "def fwd(x):\n"
        "    config = _launch.Config(1, 1, 1, 1)\n"
        "    return _launch.call(half, (x,), (jax.ShapeDtypeStruct(x.shape, x.dtype),), (1,), config=config, N=8)\n"
        "IMPL = Impl(fwd=fwd)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    _launch.stop()  # a new one, which sees the new path
    for dtype in (jnp.float32, jnp.bfloat16):
        (y,) = _launch.interpret("forgetful", "fwd", (jnp.arange(8, dtype=dtype),), {})
        np.testing.assert_array_equal(np.isnan(y.astype(np.float32)), [False] * 4 + [True] * 4)
    with pytest.raises(RuntimeError, match="IndexError: half wrote outside its result 0"):
        _launch.interpret("forgetful", "fwd", (jnp.arange(3.0),), {})
    with pytest.raises(RuntimeError, match="TypeError"):
        _launch.interpret("forgetful", "fwd", (), {})
    _launch.stop()


# A line of a source, and the fault put in its place.
FAULTS = {
    "mask off by one": ("mask = i[:, None] >= i[None, :]", "mask = i[:, None] > i[None, :]"),
    "the start's decay on the wrong side": ("into, whole = big + rest,", "into, whole = big_end - big,"),
    "segments run into each other": ('tl.where(last == 0, whole, float("-inf"))', "whole"),
    "the rest of the sums forgotten": ("(rest[:, None] - rest[None, :])", "0.0 * rest[:, None]"),
    "every group the first": ("group = head // (H // G)", "group = head * 0"),
    "the chunk's end reaches a position too far": (
        "later = i[None, :] >= i[:, None]",
        "later = i[None, :] > i[:, None]",
    ),
    "the state's way through the chunk forgotten": (" + whole * passing", ""),
    "padding is written": ("(chunk * SIZE + i < T)[:, None]", "(chunk * SIZE + i < T + 1)[:, None]"),
    "a group's last heads forgotten": ("part * HEADS + HEADS, H // G)", "part * HEADS + HEADS, H // G - 1)"),
    "the last block of n forgotten": (
        "for first in range(0, N, BLOCK_N)",
        "for first in range(0, N - BLOCK_N + 1, 2 * BLOCK_N)",
    ),
}


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """Returns a function that builds the implementation with a fault and returns its name for the interpreter."""
    need("triton", "torch")
    folder = tmp_path_factory.mktemp("faulty")
    kernels = (Path(ssd.__file__).parent / "_ssd_kernels.py").read_text()

    def build(fault):
        name = f"faulty_{list(FAULTS).index(fault)}"
        old, new = FAULTS[fault]
        assert old in kernels, f"nothing to change: {old}"
        (folder / f"{name}_kernels.py").write_text(kernels.replace(old, new))
        host = (
            Path(ssd.__file__)
            .read_text()
            .replace("from portable.pallas_kernels.gpu import _ssd_kernels", f"import {name}_kernels as _ssd_kernels")
        )
        assert name in host
        (folder / f"{name}.py").write_text(host)
        return name

    sys.path.insert(0, str(folder))
    _launch.stop()  # a new one, which sees the new path
    yield build
    sys.path.remove(str(folder))
    _launch.stop()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_kernel_is_found(fault, faulty, seed):
    # Two groups, two blocks of n, segments, and a chunk that is not full.
    arrays, options = core(1, 37, 4, 16, 2, 32, segments=0.1, decay=0.3)(seed)
    name = faulty(fault)
    impl = dataclasses.replace(ssd.IMPL, interpret=lambda part, *args, **o: _launch.interpret(name, part, args, o))
    try:
        found = errors(impl, reference.IMPL, arrays, options, seed)
    except RuntimeError as fault:
        assert "IndexError" in str(fault)  # noqa: PT017 - one of two ways to be found
        return
    assert not all(error <= 1e-5 for error in found), found


REFUSED = {
    "p to be a power of two from 16 to 256; got p=8": core(1, 4, 2, 8, 1, 16),
    "n to be a power of two from 16 to 256; got n=48": core(1, 4, 2, 16, 1, 48),
    "chunk_size of 16, 32 or 64 (the result is the same); got 24": core(1, 4, 2, 16, 1, 16, chunk_size=24),
    "at least one row, position and head": core(1, 0, 2, 16, 1, 16),
    "got v in float8_e5m2": core(1, 4, 2, 16, 1, 16, dtype="float8_e5m2", keys="float32"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_says_what_it_cannot_take(reason):
    arrays, options = REFUSED[reason](0)
    assert reason in ssd.why_not(*arrays, **options)
    with pytest.raises(portable.Unavailable, match=re.escape(reason)):
        ssd.interpret("fwd", *arrays, **options)


def test_without_its_packages_it_is_a_sentence(monkeypatch):
    assert child("import portable, sys; portable.explain('ssd'); print('triton' in sys.modules)").strip() == "False"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    arrays, options = MADE["groups"](0)
    assert ssd.why_not(*arrays, **options) == "it needs the package triton: pip install 'portable-jax[triton]'."
    with pytest.raises(portable.Unavailable, match=r"needs the package triton: pip install"):
        ssd.interpret("fwd", *arrays, **options)


def test_a_mapped_axis_joins_the_batch():
    def f(x, pair):
        y, none = pair
        assert none is None
        return {"sum": x + y, "rows": x[:, :1]}, None

    x, y = jnp.arange(24.0).reshape(2, 3, 4), jnp.arange(12.0).reshape(3, 4)
    twice = jax.vmap(jax.vmap(_launch.batchable(f), (0, None)), (None, (0, None)))
    got, _ = twice(x, (y[None] * jnp.ones([5, 1, 1]), None))
    want, _ = jax.vmap(jax.vmap(f, (0, None)), (None, (0, None)))(x, (y[None] * jnp.ones([5, 1, 1]), None))
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.aot
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    "target", [90, pytest.param(80, marks=pytest.mark.full), pytest.param(100, marks=pytest.mark.full)]
)
def test_compiles_without_spilling(target, dtype, tmp_path, record_property):
    compilers()
    found = compile_kernels(
        IMPORTS + f"a, k, v, q, s, _ = shapes(2, 2048, 24, 64, 1, 128, jnp.{dtype})\n"
        f"with _launch.capability({target}): lowered(both, (a, k, v, q, s, None), v, s)\n",
        tmp_path,
    )
    record_property("kernels", json.dumps(found))
    assert {name.split()[1] for name in found} == {"walk", "outputs", "head_gradients", "group_gradients"}
    assert len(found) == 5  # the walk in both directions
    for name, used in found.items():
        assert name.startswith(f"sm_{target}")
        assert used["spilled"] == 0, (name, used)
        assert used["shared"] <= SHARED[target], (name, used)


@pytest.mark.aot
def test_lowers_mapped_with_segments_and_for_the_capability_asked(tmp_path):
    compilers()
    code = """
        args = shapes(2, 100, 4, 32, 2, 16, jnp.bfloat16)
        _, _, v, _, s, _ = args
        more = jax.tree.map(lambda x: jax.ShapeDtypeStruct((3, *x.shape), x.dtype), (args, v, s))
        with _launch.capability(90):
            plain, mapped = lowered(both, args, v, s), lowered(jax.vmap(both), *more)
            some = lowered(jax.vmap(both, in_axes=((0, None, 0, None, 0, None), 0, 0)),
                           (more[0][0], args[1], more[0][2], args[3], more[0][4], args[5]), more[1], more[2])
        for text in (plain, mapped, some):
            assert text.count("triton_kernel_call") == 6, text.count("triton_kernel_call")
        with _launch.capability(80):
            lowered(both, args, v, s)
        """
    found = compile_kernels(IMPORTS + "\n".join(line[8:] for line in code.splitlines()), tmp_path)
    assert {name.split()[0] for name in found} == {"sm_80", "sm_90a"}
