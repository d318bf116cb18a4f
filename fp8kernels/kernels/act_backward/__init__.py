"""act_backward: the gradients of activation(x), or of activation(gate) * up, from x (gate and up) themselves."""
