"""On-policy distillation at Megatron scale, in one torchrun."""

__version__ = "0.1.0"
