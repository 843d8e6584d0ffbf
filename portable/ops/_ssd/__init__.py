"""State-space duality: the chunked linear recurrence of Mamba-2."""

XLA = {"cpu": "xla_scan", "tpu": "xla_lanes", "default": "xla_chunks"}
WHY = {
    "xla_scan": "walks the chunks: one chunk's scores stay in a processor's cache.",
    "xla_chunks": "takes all chunks at once, in few and large products, and walks only their states.",
    "xla_lanes": "keeps heads side by side in the lanes of a TPU's vectors: by its compiler's estimate the fastest.",
}
