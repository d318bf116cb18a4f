"""act_quantize: activation(x), or activation(gate) * up, straight to 8-bit codes; the product is never written.

x is [M, K]. `other` is None, or [M, K]: y = activation(x) * other, which with "silu" is SwiGLU. Activations are those
of kernels.gemm.ACTIVATIONS but "none", computed in fp32.
"""
