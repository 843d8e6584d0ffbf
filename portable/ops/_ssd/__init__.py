"""State-space duality: the chunked linear recurrence of Mamba-2."""

# A CPU keeps one chunk's scores in cache, so it walks the chunks; an accelerator wants large batched GEMMs and few
# kernel launches, so it takes all the chunks at once and walks only their states.
XLA = {"cpu": "xla_scan", "default": "xla_chunks"}
