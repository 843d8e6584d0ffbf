"""Weights to and from files: safetensors folders by a weight map per model."""

from portable.checkpoint.folder import Checkpoint as Checkpoint
from portable.checkpoint.folder import read_json as read_json
from portable.checkpoint.folder import write as write
from portable.checkpoint.hub import locate as locate
from portable.checkpoint.params import load_params as load_params
from portable.checkpoint.params import tensors_of as tensors_of
from portable.checkpoint.weight_map import Rule as Rule
from portable.checkpoint.weight_map import WeightMap as WeightMap
from portable.checkpoint.weight_map import conv2d as conv2d
from portable.checkpoint.weight_map import depthwise as depthwise
from portable.checkpoint.weight_map import flat as flat
from portable.checkpoint.weight_map import row as row
from portable.checkpoint.weight_map import same as same
from portable.checkpoint.weight_map import transposed as transposed
