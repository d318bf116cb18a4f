"""fp8kernels: PyTorch models that train and serve on 8-bit floats (HiF8, E4M3, E5M2), on a GPU or a plain CPU."""
