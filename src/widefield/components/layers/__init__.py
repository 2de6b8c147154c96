"""Layers of vision transformers."""
