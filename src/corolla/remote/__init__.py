"""The PyTorch client: hidden states go through remote blocks, with gradients; it keeps embeddings, head and soft prompts."""
