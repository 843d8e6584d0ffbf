"""Pure functions, each with one contract and several implementations; see `portable.selection`."""

from portable.ops._attention.api import attention as attention
from portable.ops._attention.merge import merge_attentions as merge_attentions
from portable.ops._causal_conv1d.api import causal_conv1d as causal_conv1d
from portable.ops._grouped_matmul.api import grouped_matmul as grouped_matmul
from portable.ops._linear.api import linear as linear
from portable.ops._neighborhood_attention.api import neighborhood_attention as neighborhood_attention
from portable.ops._neighborhood_attention.plan import NeighborhoodPlan as NeighborhoodPlan
from portable.ops._neighborhood_attention.plan import neighborhood_plan as neighborhood_plan
from portable.ops._rms_norm.api import rms_norm as rms_norm
from portable.ops._ssd.api import ssd as ssd
from portable.ops._ssd_step.api import ssd_step as ssd_step
