"""The arithmetic of a sampling step: pure torch, no host."""
