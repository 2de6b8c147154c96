"""`widefield demo`."""
