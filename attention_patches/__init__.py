"""Factories of attention patches: pure torch, no host."""
