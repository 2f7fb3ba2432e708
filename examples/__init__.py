"""Scripts around sokd: plain PyTorch, Lightning, Hugging Face, a pretrained pair, experiments."""
