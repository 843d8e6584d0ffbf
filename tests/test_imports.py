"""What `import portable` costs: a fresh process shows what came in."""

import json

import pytest

from tests.oracles import child

OPTIONAL = (
    "grain",
    "huggingface_hub",
    "jax.experimental.pallas",
    "jax_triton",
    "matplotlib",
    "orbax",
    "rich",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
    "triton",
)


def _loaded(code: str) -> set[str]:
    modules = json.loads(child(f"import json, sys\n{code}\nprint(json.dumps(sorted(sys.modules)))"))
    return {name for name in OPTIONAL if any(m == name or m.startswith(f"{name}.") for m in modules)}


@pytest.mark.parametrize("code", ["import portable", "import portable; portable.ops.ssd; portable.explain('ssd')"])
def test_import_brings_in_nothing_optional(code):
    assert _loaded(code) == set()


def test_the_check_above_can_see():
    assert _loaded("import rich.table, matplotlib") == {"rich", "matplotlib"}
