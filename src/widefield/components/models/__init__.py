"""Whole models: what a configuration trains."""
