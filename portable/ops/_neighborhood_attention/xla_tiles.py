"""Tiles that fill a matrix unit and large steps that fill a device, for GPUs; see `halo`.

The setting is reasoned, not measured: tensor cores want 64 rows and more, a GPU some thousand tiles of a product at a
time, and a step's scores go through its memory whatever their number.
"""

from portable.ops._neighborhood_attention.halo import form
from portable.ops._neighborhood_attention.tables import Setting

SETTING = Setting(rows=64, mask=1.0, tile=64 << 20, budget=512 << 20, unroll=32)
IMPL = form(SETTING)
