"""norm_backward: the gradients of RMSNorm and LayerNorm, from x and the rstd and mean that norm_quantize kept."""
