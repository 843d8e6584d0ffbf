"""Decoder-only language models with attention, dense or with experts: Llama, Qwen, Mixtral, DeepSeek, gpt-oss, LFM2."""

from portable.models.decoder.config import DecoderConfig as DecoderConfig
from portable.models.decoder.families import FAMILIES as FAMILIES
from portable.models.decoder.model import Decoder as Decoder
from portable.models.decoder.weights import check_tensors as check_tensors
from portable.models.decoder.weights import weight_map as weight_map
