"""A model's mathematics and files: families, spans, checkpoints, quantization."""
