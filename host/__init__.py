"""Adapters between the pure rooms and ComfyUI."""
