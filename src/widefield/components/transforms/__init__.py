"""Transforms of images, and masks of their patches."""
