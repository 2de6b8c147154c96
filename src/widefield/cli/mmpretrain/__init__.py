"""Configurations of MMPretrain as ours: `widefield config convert`."""
