"""One program for many platforms, saved, loaded and run again."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import portable
from portable.ops import ssd
from portable.ops._ssd.cases import CASES

ARGS, KWARGS = CASES["strong_decay"](0)


def loss(x):
    y, state = ssd(x, *ARGS[1:], **KWARGS)
    return jnp.sum(y**2) + jnp.sum(state**2)


def test_saved_loaded_and_run_again(tmp_path):
    pytest.importorskip("flatbuffers", reason="pip install 'portable-jax[aot]'")
    file = tmp_path / "gradient.bin"
    made = portable.export(jax.grad(loss), ARGS[:1], platforms=("cpu", "cuda", "tpu"), implementation="xla", file=file)
    again = portable.load_export(file)
    assert again.platforms == made.platforms == ("cpu", "cuda", "tpu")
    np.testing.assert_array_equal(again.call(ARGS[0]), made.call(ARGS[0]))
    want = jax.grad(loss)(ARGS[0])
    np.testing.assert_allclose(again.call(ARGS[0]), want, atol=1e-6 * float(jnp.abs(want).max()))


def test_what_goes_in_may_be_abstract():
    made = portable.export(loss, [jax.ShapeDtypeStruct(ARGS[0].shape, jnp.float32)], platforms=["tpu"])
    assert made.platforms == ("tpu",)
    assert "tpu_custom_call" not in made.mlir_module()


def test_mistakes_get_a_sentence(tmp_path):
    with pytest.raises(portable.PortableError, match="platforms must be of cpu, cuda, rocm, tpu; got 'gpu'"):
        portable.export(loss, ARGS[:1], platforms=["gpu"])
    with pytest.raises(portable.PortableError, match="must be a sequence of names; got 'cuda'"):
        portable.export(loss, ARGS[:1], platforms="cuda")
    for wrong in ("90", 9.0, 5):
        with pytest.raises(portable.PortableError, match=f"integer of at least 75, as 90 for 9.0; got {wrong!r}"):
            portable.export(loss, ARGS[:1], platforms=["cuda"], capability=wrong)
    with pytest.raises(portable.PortableError, match="at least one platform; got none"):
        portable.export(loss, ARGS[:1], platforms=[])
    with pytest.raises(portable.PortableError, match=r"nowhere\.bin cannot be read: No such file"):
        portable.load_export(tmp_path / "nowhere.bin")
    bad = tmp_path / "bad.bin"
    bad.write_bytes(b"not a program" * 10)
    with pytest.raises(portable.PortableError, match=r"bad\.bin does not hold a program|needs the package flatbuffers"):
        portable.load_export(bad)
    if importlib.util.find_spec("flatbuffers"):
        with pytest.raises(portable.PortableError, match="cannot be written: No such file or directory"):
            portable.export(loss, ARGS[:1], platforms=["cpu"], file=tmp_path / "no" / "such" / "folder.bin")
        assert not (tmp_path / "no").exists()


def test_a_named_kernel_that_runs_on_none_of_the_platforms():
    with pytest.raises(portable.Unavailable, match="'pallas_tpu' runs on tpu; this program is lowered for cpu"):
        portable.export(loss, ARGS[:1], platforms=["cpu"], implementation="pallas_tpu")


def test_three_kernels_in_one_program(tmp_path):
    for package in ("triton", "jax_triton", "flatbuffers"):
        pytest.importorskip(package, reason="pip install 'portable-jax[aot]'")
    args, kwargs = CASES["heads_of_64_bfloat16"](0)

    def run(x):
        return ssd(x, *args[1:], **kwargs)[0]

    with pytest.raises(portable.Unavailable, match="no GPU to ask; name it"):
        portable.export(run, args[:1], implementation="kernels")
    file = tmp_path / "three.bin"
    portable.export(run, args[:1], implementation="kernels", capability=90, file=file)
    again = portable.load_export(file)
    assert again.platforms == ("cpu", "cuda", "tpu")
    text = again.mlir_module()
    assert "tpu_custom_call" in text
    assert "triton_kernel_call" in text
    np.testing.assert_array_equal(again.call(args[0]), run(args[0]))  # the CPU's own form
    assert "kernel_call" not in portable.export(run, args[:1], implementation="xla").mlir_module()
