"""Weight quantization: what a scheme is. Schemes come from plugins, kernels for them from platforms."""
