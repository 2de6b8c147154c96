"""What self-supervised learning predicts."""
