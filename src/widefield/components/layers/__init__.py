"""Layers that components build from descriptions."""
