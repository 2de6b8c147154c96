"""Heads, which turn features into scores and a loss."""
