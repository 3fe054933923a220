"""Copies between an engine's pool and memory. Knows tensors and addresses; no store and no request."""
