"""Targets: their descriptions, and what a process needs to compile for them."""

import os
import re

import jax
import jax.numpy as jnp
import pytest

from portable import parity
from portable.parity import targets


def test_unknown_target_lists_those_there_are():
    with pytest.raises(ValueError, match=r"no target called 'v5e'; there are: cpu, device, tpu-v4, .*cuda-sm90"):
        targets.find("v5e")


@pytest.mark.parametrize("name", [t.name for t in parity.TARGETS.values() if t.family == "cuda"])
def test_descriptions_state_what_the_compiler_asks(name):
    target = parity.TARGETS[name]
    text = targets._description(target.topology)
    values = dict(re.findall(r"^\s*(\w+): ([\d.]+)$", text, re.M))
    major, minor = re.search(r"cuda_compute_capability \{ major: (\d+) minor: (\d+) \}", text).groups()
    assert target.name == f"cuda-sm{major}{minor}"
    assert target.memory_bytes == int(values["device_memory_size"])
    sold = {"sm_75": 16, "sm_80": 80, "sm_86": 48, "sm_89": 24, "sm_90": 80, "sm_100": 180}[target.topology]
    assert 0.9 * sold < target.memory_bytes / 2**30 <= sold
    # Published peaks in float32, without tensor cores.
    units = int(values["core_count"]) * int(values["fpus_per_core"])
    tflops = 2 * units * float(values["clock_rate_ghz"]) / 1e3
    published = {"sm_75": 8.1, "sm_80": 19.5, "sm_86": 38.7, "sm_89": 82.6, "sm_90": 66.9, "sm_100": 75}
    assert tflops == pytest.approx(published[target.topology], rel=0.01)
    # A block can have all of a core's shared memory but the 1 KiB that the system keeps since Ampere.
    kept = int(values["shared_memory_per_core"]) - int(values["shared_memory_per_block_optin"])
    assert kept == (0 if major == "7" else 1024)
    assert target.bandwidth == int(values["memory_bandwidth"])
    assert re.search(r"^# .*(data sheet|white paper|architecture brief)", text, re.M)


def test_description_without_memory_is_named(monkeypatch):
    monkeypatch.setattr(targets, "_description", lambda name: "gpu_device_info {}")
    with pytest.raises(ValueError, match=r"sm_42\.txtpb must state device_memory_size"):
        targets._cuda("cuda-sm42", "sm_42", 1, 1)


@pytest.mark.parametrize("family", ["cpu", "tpu", "cuda"])
def test_environment_forgets_the_shells_settings(family, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    monkeypatch.setenv("JAX_ENABLE_X64", "1")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "somewhere")
    monkeypatch.setenv("TPU_NAME", "a real one")
    monkeypatch.setenv("UNRELATED", "kept")
    env = targets.environment(family)
    assert env["JAX_PLATFORMS"] == "cpu"
    assert env["UNRELATED"] == "kept"
    assert "device_count" not in env.get("XLA_FLAGS", "")
    assert not {"JAX_ENABLE_X64", "JAX_COMPILATION_CACHE_DIR", "TPU_NAME"} & set(env)
    assert os.environ["TPU_NAME"] == "a real one"


def _without(*absent):
    found = targets.importlib.util.find_spec
    return lambda name: None if name.startswith(absent) else found(name)


def test_missing_packages_are_named_with_the_command(monkeypatch):
    monkeypatch.setattr(targets.importlib.util, "find_spec", _without("libtpu", "jax_plugins"))
    assert targets.missing("cpu") is None
    for family, package in (("tpu", "libtpu"), ("cuda", "jax-cuda12-plugin")):
        assert package in targets.missing(family)
        assert "pip install 'portable-jax[aot]'" in targets.missing(family)


def test_wrong_versions_are_named(monkeypatch):
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(targets, "_version", lambda package: "0.0.1")
    monkeypatch.setattr(targets, "_wanted_libtpu", lambda: "0.0.42.")
    assert "made for libtpu 0.0.42.*, got 0.0.1" in targets.missing("tpu")
    monkeypatch.setattr(targets, "_version", {"jaxlib": "2.0", "jax-cuda12-plugin": "1.0"}.get)
    assert "must have jaxlib's version 2.0, got 1.0" in targets.missing("cuda")


def test_jax_names_its_libtpu():
    assert re.fullmatch(r"0\.0\.\d+\.", targets._wanted_libtpu())


def test_compile_for_the_cpu_runs_the_right_program():
    x = jnp.arange(6.0).reshape(2, 3)
    compiled = parity.compile_for("cpu", lambda a, b: {"y": a["x"] @ b}, {"x": x}, x.T)
    assert jnp.array_equal(compiled({"x": x}, x.T)["y"], x @ x.T)


def test_arguments_keep_the_sharding_they_have():
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    x = jax.ShapeDtypeStruct((4,), jnp.float32, sharding=place)
    lowered = parity.lower_for("cpu", lambda a, n: a + n, x, jax.ShapeDtypeStruct((), jnp.int32))
    assert lowered.out_info.shape == (4,)
    with pytest.raises(ValueError, match="at least one array"):
        parity.lower_for("cpu", lambda: 1)


@pytest.mark.aot
@pytest.mark.full
@pytest.mark.parametrize("name", [t.name for t in parity.TARGETS.values() if t.family == "tpu"])
def test_memory_of_a_tpu_is_what_its_compiler_says(name):
    target = parity.TARGETS[name]
    if reason := parity.missing(target.family):
        pytest.skip(reason)
    [found] = parity.run([parity.Job("large", name, "tests.parity.builders:large", {"rows": 2**18})])
    assert found.status == "does not fit"
    stated = float(re.search(r"exceeds available HBM \(([\d.]+)G\)", found.message)[1])
    assert stated == pytest.approx(target.memory_bytes / 2**30, abs=0.005)
    # The product and its sorted copy are 256 GiB each.
    assert found.needed_bytes >= 512 * 2**30


@pytest.mark.aot
@pytest.mark.parametrize("name", ["tpu-v5e", "cuda-sm80"])
def test_a_real_compiler_says_by_how_much_a_program_is_too_big(name):
    target = parity.TARGETS[name]
    if reason := parity.missing(target.family):
        pytest.skip(reason)
    todo = [
        parity.Job("small", name, "tests.parity.builders:product", {"n": 128}),
        parity.Job("large", name, "tests.parity.builders:large", {"rows": 2**18}),
        parity.Job("abort", name, "tests.parity.builders:abort"),
        parity.Job("again", name, "tests.parity.builders:product", {"n": 256}),
    ]
    small, large, abort, again = parity.run(todo)
    assert small.fits
    assert again.fits
    assert again.argument_bytes == 2 * 256 * 512 * 4
    assert abort.message.startswith("the compiler ended with signal SIGABRT")
    assert large.status == "does not fit"
    assert large.spare_bytes == target.memory_bytes - large.needed_bytes < -400 * 2**30
