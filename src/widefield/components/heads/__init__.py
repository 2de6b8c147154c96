"""What turns features into scores and a loss."""
