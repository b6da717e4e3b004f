"""Good images → model."""
