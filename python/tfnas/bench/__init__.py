"""Microbenchmarks of the fused block: against the same modules in plain PyTorch, checked before they are timed."""
