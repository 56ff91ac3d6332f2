"""Adapters as HF peft writes them, ``adapter_config.json`` and ``adapter_model.safetensors``: written and read without peft.

https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

from .folder import Adapter, read
from .reading import adopt
from .writing import write

__all__ = ["Adapter", "adopt", "read", "write"]
