"""Mamba-2 language models (https://arxiv.org/abs/2405.21060)."""

from portable.models.mamba2.config import Mamba2Config as Mamba2Config
from portable.models.mamba2.model import Mamba2LM as Mamba2LM
from portable.models.mamba2.weights import weight_map as weight_map
