"""Serving: many requests on one GPU, and many GPUs."""
