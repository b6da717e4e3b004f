"""Model and image → verdict."""
