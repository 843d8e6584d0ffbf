"""Text generation: prefill and a decode loop that is compiled once and runs on the device."""

from portable.generation.loop import Generation as Generation
from portable.generation.loop import generate as generate
from portable.generation.programs import Decoder as Decoder
