"""The choice of an implementation: by platform when lowered, strict by name, explained in sentences."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax import export
from jax.sharding import AxisType, PartitionSpec

import portable
from portable import selection
from portable.ops import rms_norm, ssd
from portable.ops._ssd.cases import CASES
from portable.parity.numbers import relative

ARGS, KWARGS = CASES["groups"]()
NAMES = (("cpu", "xla_scan"), ("default", "xla_chunks"), ("tpu", "xla_lanes"))


def loss(x, **options):
    return jnp.sum(ssd(x, *ARGS[1:], **KWARGS, **options)[0] ** 2)


@pytest.fixture
def traced(monkeypatch):
    """Records which implementations of `ssd` are traced, with empty caches."""
    seen = []
    jax.clear_caches()
    for cache in (selection._nested, selection._function, selection._compiled):
        cache.cache_clear()
    table = dict(selection.implementations("ssd"))
    for name, impl in table.items():

        def fwd(*args, _name=name, _fwd=impl.fwd, **options):
            seen.append(_name)
            return _fwd(*args, **options)

        table[name] = selection.dataclasses.replace(impl, fwd=fwd)
    real = selection.implementations
    monkeypatch.setattr(selection, "implementations", lambda op: table if op == "ssd" else real(op))
    yield seen
    for cache in (selection._nested, selection._function, selection._compiled):
        cache.cache_clear()


def test_lowering_for_a_platform_traces_its_own_form(traced):
    f = jax.jit(lambda x: loss(x))
    f.trace(ARGS[0]).lower(lowering_platforms=("tpu",))
    assert traced[-1] == "xla_lanes"
    assert set(traced) == {"xla_chunks", "xla_lanes"}  # types are those of the default form
    f.trace(ARGS[0]).lower(lowering_platforms=("cpu",))
    assert traced[-1] == "xla_scan"


def test_one_exported_program_carries_a_form_for_each_platform():
    f = jax.jit(jax.grad(loss))
    both = export.export(f, platforms=["cpu", "cuda", "tpu"])(ARGS[0])
    back = export.deserialize(both.serialize())
    assert relative(back.call(ARGS[0]), f(ARGS[0])) <= 2e-6
    one = export.export(f, platforms=["cpu"])(ARGS[0])
    assert len(both.mlir_module()) > 1.5 * len(one.mlir_module())


def test_inside_shard_map():
    mesh = jax.make_mesh((1,), ("d",), (AxisType.Auto,))
    spec = PartitionSpec(None, None, "d")
    run = jax.shard_map(
        lambda x, dt: ssd(x, dt, *ARGS[2:], **KWARGS)[0], mesh=mesh, in_specs=(spec, spec), out_specs=spec
    )
    got = jax.jit(jax.grad(lambda x: jnp.sum(run(x, ARGS[1]) ** 2)))(ARGS[0])
    assert relative(got, jax.grad(loss)(ARGS[0])) <= 2e-6


def test_using_names_an_implementation_and_retraces():
    count = []

    @jax.jit
    def f(x):
        count.append(1)
        return loss(x)

    f(ARGS[0])
    f(ARGS[0])
    with portable.using("reference"):
        f(ARGS[0])
        assert "portable[" not in str(jax.make_jaxpr(loss)(ARGS[0]))
        with portable.using(None):
            assert "portable[" in str(jax.make_jaxpr(loss)(ARGS[0]))
    f(ARGS[0])
    assert len(count) == 2
    with portable.using("nonsense"), pytest.raises(ValueError, match="no implementation called 'nonsense'"):
        loss(ARGS[0])


def test_the_xla_name_is_the_form_of_the_platform():
    assert selection.choose("ssd", "xla").names == NAMES
    assert selection.choose("ssd", None).names == NAMES
    assert selection.choose("ssd", "xla_chunks").names == (("default", "xla_chunks"),)


def test_explain_speaks_in_sentences():
    text = str(portable.explain(ssd, *ARGS, **KWARGS))
    assert text.startswith("ssd\n")
    assert "cpu   xla_scan    walks the chunks: one chunk's scores stay in a processor's cache. This process" in text
    assert "cuda  xla_chunks  takes all chunks at once" in text
    assert "by name only" in text
    abstract = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in ARGS]
    assert str(portable.explain("ssd", *abstract, **KWARGS)) == text
    assert "tpu   xla_lanes   keeps heads side by side" in str(portable.explain("ssd"))
    with pytest.raises(
        ValueError, match="no op called 'sdd'; there are: attention, block_sparse_attention, causal_conv1d, "
    ):
        portable.explain("sdd")


def test_info_names_versions_devices_and_choices():
    text = str(portable.info())
    for word in (jax.__version__, "device 0", "ssd", "xla_scan", "of reference, xla_chunks, xla_lanes, xla_scan"):
        assert word in text


@pytest.fixture
def kernel(monkeypatch):
    """A made-up kernel for `rms_norm` on TPUs, that takes multiples of 128 and returns zeros."""
    impl = selection.Impl(
        fwd=lambda x, scale, gate, **options: (x * 0,),
        why_not=lambda x, scale, gate, **o: (
            None if x.shape[-1] % 128 == 0 else f"d must divide by 128, got {x.shape[-1]}."
        ),
    )
    table = {**selection.implementations("rms_norm"), "pallas_tpu": impl}
    real = selection.implementations
    monkeypatch.setattr(selection, "implementations", lambda op: table if op == "rms_norm" else real(op))
    caches = (selection._nested, selection._function, selection._compiled)
    for cache in caches:
        cache.cache_clear()
    yield lambda: monkeypatch.setattr(selection.package("rms_norm"), "KERNELS", {"tpu": "pallas_tpu"}, raising=False)
    for cache in caches:
        cache.cache_clear()


def lowered_for_tpu(f, *args):
    return jax.jit(f).trace(*args).lower(lowering_platforms=("tpu",)).as_text()


def test_a_kernel_is_automatic_only_once_measured_and_only_where_it_fits(kernel):
    wide, narrow = (jnp.ones((2, d)) for d in (128, 96))
    assert "by name on tpu; no committed measurement" in str(portable.explain("rms_norm", wide, wide[0]))
    assert "rsqrt" in lowered_for_tpu(lambda x: rms_norm(x, x[0]), wide)
    kernel()  # measured: automatic
    assert "tpu   pallas_tpu  measured faster here" in str(portable.explain("rms_norm", wide, wide[0]))
    assert "rsqrt" not in lowered_for_tpu(lambda x: rms_norm(x, x[0]), wide)
    text = " ".join(str(portable.explain("rms_norm", narrow, narrow[0])).split())
    assert "tpu xla pallas_tpu cannot take this call: d must divide by 128, got 96." in text
    assert "rsqrt" in lowered_for_tpu(lambda x: rms_norm(x, x[0]), narrow)
    # On this CPU the XLA form still runs, and the gradient everywhere: the kernel has none of its own.
    assert float(rms_norm(wide, wide[0]).sum()) > 0
    assert "rsqrt" in lowered_for_tpu(jax.grad(lambda x: rms_norm(x, wide[0]).sum()), wide)


def test_a_named_kernel_is_strict(kernel):
    narrow, wide = jnp.ones((2, 96)), jnp.ones((2, 128))
    with pytest.raises(portable.Unavailable, match="'pallas_tpu' cannot take this call: d must divide by 128, got 96"):
        rms_norm(narrow, narrow[0], implementation="pallas_tpu")
    with pytest.raises(portable.Unavailable, match="'pallas_tpu' runs on tpu; this program is lowered for cpu"):
        rms_norm(wide, wide[0], implementation="pallas_tpu")
    text = lowered_for_tpu(lambda x: rms_norm(x, x[0], implementation="pallas_tpu"), wide)
    assert "rsqrt" not in text


def test_no_kernel_is_imported_until_it_is_looked_up():
    script = """
import sys
import jax.numpy as jnp
import portable
x, k = jnp.ones((1, 4, 2, 8)), jnp.ones((1, 4, 1, 8))
portable.ops.ssd(x, x[..., 0], -x[0, 0, :, 0], k, k)
portable.info()
rooms = ("portable.pallas_kernels.tpu.", "portable.pallas_kernels.gpu.", "jax.experimental.pallas")
assert not [m for m in sys.modules if m.startswith(rooms)]
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_explain_gives_the_reason_of_a_form_that_refuses():
    text = str(portable.explain("linear", jnp.ones([10, 64]), jnp.ones([64, 64])))
    assert "xla_row    cannot take this call: it is for one row; got 10." in text


def test_explain_and_info_know_what_is_asked_for():
    with portable.using("reference"):
        assert "cpu   reference   asked for by name. This process runs here." in str(portable.explain("ssd"))
        assert any(row[:2] == ("ssd", "reference") for row in portable.info().rows)
        assert any(row[:2] == ("portable.using", "reference") for row in portable.info().rows)
    with portable.using("xla_scan"):
        assert any(row[:2] == ("rms_norm", "none of that name") for row in portable.info().rows)
