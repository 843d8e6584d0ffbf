"""Flax NNX layers over `portable.ops`, written for NNX's tree mode: no shared Variables, no mutation in a call."""

from portable.nn.attention import Attention as Attention
from portable.nn.attention import AttentionState as AttentionState
from portable.nn.cache import fresh_state as fresh_state
from portable.nn.conv import CausalConv1d as CausalConv1d
from portable.nn.latent_attention import LatentAttention as LatentAttention
from portable.nn.latent_attention import LatentState as LatentState
from portable.nn.linear import dot_general as dot_general
from portable.nn.linear import linear as linear
from portable.nn.mamba2 import Mamba2 as Mamba2
from portable.nn.mamba2 import Mamba2State as Mamba2State
from portable.nn.mlp import GatedMLP as GatedMLP
from portable.nn.moe import MoE as MoE
from portable.nn.moe import moe_from_dense as moe_from_dense
from portable.nn.neighborhood_attention import NeighborhoodAttention as NeighborhoodAttention
from portable.nn.neighborhood_attention import NeighborhoodState as NeighborhoodState
from portable.nn.norm import RMSNorm as RMSNorm
from portable.nn.padding import align_left as align_left
from portable.nn.padding import right_padded as right_padded
from portable.nn.rotary import Rotary as Rotary
from portable.nn.rotary import rotary as rotary
from portable.nn.short_conv import ShortConv as ShortConv
from portable.nn.stack import Stack as Stack
from portable.nn.stack import checkpointed as checkpointed
from portable.nn.stack import stack as stack
from portable.nn.stack import unstack as unstack
