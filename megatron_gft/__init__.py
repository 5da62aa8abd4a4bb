"""Group Fine-Tuning (GFT, arXiv 2604.14258) on Megatron-Core."""

__version__ = "0.1.0"
