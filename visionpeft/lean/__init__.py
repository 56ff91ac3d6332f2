"""Exact training with the least memory: knows blocks of layers, not methods."""
