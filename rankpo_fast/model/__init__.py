"""The encoder: a transformers backbone, its tokenizer, pooling, and the directory it lives in."""
