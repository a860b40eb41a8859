"""The language model: a (4-bit) Llama with LoRA, a projector, and behaviour embeddings written in place."""
