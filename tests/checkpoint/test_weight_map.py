"""The rules between tensors and parameters, on made-up models whose answers are written out by hand."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from portable.checkpoint import (
    Checkpoint,
    Rule,
    WeightMap,
    depthwise,
    flat,
    load_params,
    tensors_of,
    transposed,
    write,
)
from portable.checkpoint.weight_map import Block


def _by_name(weight_map, shapes):
    return {tensor.name: tensor for tensor in weight_map.tensors(shapes)}


def test_template_gives_one_tensor_for_each_layer():
    weight_map = WeightMap((Rule("net.{i}.w", "layers.{i}.out.kernel", transposed),))
    tensors = _by_name(weight_map, {"layers.0.out.kernel": (2, 3), "layers.11.out.kernel": (2, 3)})
    assert {name: tensor.shape for name, tensor in tensors.items()} == {"net.0.w": (3, 2), "net.11.w": (3, 2)}
    assert tensors["net.11.w"].blocks == (Block("layers.11.out.kernel", None, axis=0, period=3, start=0, stop=3),)


def test_dot_of_a_template_is_a_dot():
    with pytest.raises(ValueError, match="no rule covers aXb"):
        WeightMap((Rule("t", "a.b"),)).tensors({"a.b": (1,), "aXb": (1,)})


def test_fused_tensor_is_the_row_blocks_of_its_parameters_in_order():
    rule = Rule("qkv.weight", ("q.kernel", "k.kernel", "v.kernel"), transposed)
    tensor = _by_name(WeightMap((rule,)), {"k.kernel": (4, 2), "v.kernel": (4, 1), "q.kernel": (4, 3)})["qkv.weight"]
    assert tensor.shape == (6, 4)
    assert [(b.path, b.start, b.stop) for b in tensor.blocks] == [
        ("q.kernel", 0, 3),
        ("k.kernel", 3, 5),
        ("v.kernel", 5, 6),
    ]


def test_tensors_stacked_along_the_first_axis_of_a_parameter():
    rule = Rule("layers.{i}.experts.{e}.w.weight", "blocks.{i}.moe.w", transposed)
    tensors = _by_name(WeightMap((rule,)), {"blocks.5.moe.w": (3, 4, 2)})
    assert [*tensors] == [f"layers.5.experts.{e}.w.weight" for e in range(3)]
    tensor = tensors["layers.5.experts.2.w.weight"]
    assert tensor.shape == (2, 4)
    parameter = np.zeros((3, 4, 2))
    tensor.view(parameter, tensor.blocks[0])[:] = np.arange(8).reshape(2, 4)
    np.testing.assert_array_equal(parameter[2], np.arange(8).reshape(2, 4).T)
    assert not parameter[:2].any()


@pytest.mark.parametrize(
    "axis, turns, places",
    [(0, (2, 1), ([0, 1, 3, 4], [2, 5])), (1, (1, 1), ([0, 2, 4], [1, 3, 5])), (1, None, ([0, 1, 2], [3, 4, 5]))],
    ids=["head by head", "interleaved", "blocks of columns"],
)
def test_parameters_that_take_turns(axis, turns, places, tmp_path):
    """Written into a file and read from it again, in pieces of a few rows."""
    whole = np.arange(36, dtype=np.float32).reshape(6, 6)
    a, b = (np.take(whole, place, axis) for place in places)

    class Two(nnx.Module):
        def __init__(self, a, b):
            self.a, self.b = nnx.Param(jnp.asarray(a)), nnx.Param(jnp.asarray(b))

    weight_map = WeightMap((Rule("fused", ("a", "b"), axis=axis, turns=turns),))
    tensors = tensors_of(Two(a, b), weight_map)
    np.testing.assert_array_equal(tensors["fused"].fetch(), whole)
    write(tmp_path, {}, tensors, 10**9)

    class InPieces(Checkpoint):
        def rows(self, name, start, stop):
            for row, block in super().rows(name, start, stop):
                yield from ((row + i, block[i : i + 4]) for i in range(0, len(block), 4))

    found = load_params(lambda dtype: Two(np.zeros_like(a), np.zeros_like(b)), InPieces(tmp_path), weight_map)
    np.testing.assert_array_equal(found.a[...], a)
    np.testing.assert_array_equal(found.b[...], b)


@pytest.mark.parametrize(
    "layout, parameter, tensor",
    [
        (transposed, [[1, 2, 3], [4, 5, 6]], [[1, 4], [2, 5], [3, 6]]),
        (depthwise, [[1, 2], [3, 4], [5, 6]], [[[1, 3, 5]], [[2, 4, 6]]]),
        (flat, [[1, 2], [3, 4]], [1, 2, 3, 4]),
        (flat, [1, 2], [1, 2]),
    ],
    ids=["transposed", "depthwise", "flat", "flat of one axis"],
)
def test_layouts_are_views_and_so_run_both_ways(layout, parameter, tensor):
    parameter, tensor = np.array(parameter), np.array(tensor)
    np.testing.assert_array_equal(layout(parameter), tensor)
    written = np.zeros_like(parameter)
    layout(written)[:] = tensor
    np.testing.assert_array_equal(written, parameter)


def test_other_spellings_and_a_prefix_that_may_be_missing():
    rule = Rule("backbone.embeddings.weight", "embed", also=("backbone.embedding.weight",))
    (tensor,) = WeightMap((rule,), prefix="backbone.").tensors({"embed": (4, 2)})
    assert tensor.also == ("backbone.embedding.weight", "embeddings.weight", "embedding.weight")


def test_scalar_parameter():
    (tensor,) = WeightMap((Rule("scale", "scale"),)).tensors({"scale": ()})
    assert tensor.shape == ()
    parameter = np.zeros(())
    tensor.view(parameter, tensor.blocks[0])[:] = 3
    assert parameter == 3


def test_every_parameter_needs_a_rule():
    with pytest.raises(ValueError, match=r"no rule covers b, c; add one"):
        WeightMap((Rule("a", "a"),)).tensors({"a": (1,), "b": (1,), "c": (1,)})
