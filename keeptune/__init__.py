"""Fine-tune a pre-trained language model on instruction data, and keep what it had."""

__version__ = "0.1.0"
