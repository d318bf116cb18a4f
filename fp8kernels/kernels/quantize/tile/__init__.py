"""What the Triton kernels that write codes do with one tile: make it, round it, count, and finish together."""
