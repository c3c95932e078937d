"""nibble: train large language models on the GPUs that people own."""

__version__ = "0.1.0"
