"""linear: x rounded to codes and multiplied with those of a weight in one call; quantize and gemm say what it means."""
