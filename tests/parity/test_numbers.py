"""The numbers of models, held against the definition in float64."""

import jax
import numpy as np
import pytest

from portable.ops._ssd import xla_scan
from portable.parity import numbers, plan


def test_a_models_numbers_are_run_where_it_runs():
    jobs = plan.number_jobs(["cpu"], models=plan.MODELS[:3])
    assert [(j.labels["dtype"], j.labels["part"]) for j in jobs] == [
        (dtype, work) for dtype in ("float32", "bfloat16") for work in ("prefill", "decode", "train")
    ]
    for job in jobs[:2]:
        found = numbers.compare_model(**job.kwargs)
        assert found["status"] == "ran", found
        assert 0 < found["error"] < numbers.MODEL_BARS["float32"]
        assert found["ulps"] == found["error"] / np.finfo(np.float32).eps


@pytest.mark.parametrize("config", ["digits_dinat", pytest.param("nat_mini", marks=pytest.mark.full)])
def test_the_numbers_of_a_model_of_images(config):
    [job] = [j for j in plan.number_jobs(["cpu"]) if j.labels["name"] == config]
    found = numbers.compare_model(**job.kwargs)
    assert found["status"] == "ran", found
    assert 0 < found["error"] < numbers.MODEL_BARS["float32"]


def test_a_wrong_model_is_found(monkeypatch):
    [job] = [j for j in plan.number_jobs(["cpu"]) if j.name.startswith("mamba2_130m/float32/prefill")]
    right = xla_scan.chunk.update
    monkeypatch.setattr(xla_scan.chunk, "update", lambda c, d: right(c, d) * 1.001)
    jax.clear_caches()
    found = numbers.compare_model(**job.kwargs)
    jax.clear_caches()
    assert found["status"] == "failed"
    assert "is above 2e-05" in found["message"]
