"""Necks, which stand between a backbone and a head."""
