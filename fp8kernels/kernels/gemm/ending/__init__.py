"""What becomes of a sum before it is written; see kernels.gemm.Epilogue."""
