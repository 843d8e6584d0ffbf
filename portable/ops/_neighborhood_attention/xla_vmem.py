"""Large tiles and small steps, for TPUs; see `halo`.

The setting is by the estimates of their compiler (`portable bench neighborhood_attention --estimate tpu-v6e`): scores
that a step keeps in vector memory never reach the device's main one, which would take longer than their products.
"""

from portable.ops._neighborhood_attention.halo import form
from portable.ops._neighborhood_attention.tables import Setting

SETTING = Setting(rows=256, mask=1.0, tile=24 << 20, budget=24 << 20, unroll=32)
IMPL = form(SETTING)
