"""Target generators, which make what self-supervised learning predicts."""
