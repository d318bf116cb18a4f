"""Benchmarks: correctness first, then ours and the baseline interleaved in one run; results are rows kept in git."""
