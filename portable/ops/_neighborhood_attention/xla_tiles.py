"""Large tiles, for matrix units; see `halo`.

The setting is by the estimates of a TPU's compiler (`portable bench neighborhood_attention --estimate tpu-v6e`). For
GPUs it is reasoned, not measured: so many queries fill their matrix units too.
"""

from portable.ops._neighborhood_attention.halo import form
from portable.ops._neighborhood_attention.tables import Setting

SETTING = Setting(rows=256, mask=1.0, tile=24 << 20, budget=24 << 20, unroll=32)
IMPL = form(SETTING)
