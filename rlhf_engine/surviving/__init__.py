"""What keeps a run alive, and what is left of it when it ends."""
