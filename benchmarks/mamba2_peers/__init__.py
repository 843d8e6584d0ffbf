"""The programs that `benchmarks/mamba2.py` measures: one module a peer, each with `build(spec)`."""
