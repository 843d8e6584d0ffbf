"""Image models of neighborhood attention: NAT (arXiv:2204.07143) and, with dilation, DiNAT (arXiv:2209.15001)."""

from portable.models.nat.config import NATConfig as NATConfig
from portable.models.nat.model import NAT as NAT
from portable.models.nat.weights import format_of as format_of
from portable.models.nat.weights import weight_map as weight_map
