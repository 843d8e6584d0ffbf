"""A frozen linear layer with a low-rank update, weight-decomposed (DoRA) or not (LoRA), in one epilogue."""

XLA: dict[str, str] = {}
WHY = {"xla": "XLA's products and one pass over their sum; a backward that keeps that sum and the r inner channels."}
