"""dequantize: codes and their scales back to numbers."""
