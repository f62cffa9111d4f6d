"""Measures of pictures: pure torch, no host; networks and embeddings are passed in."""
