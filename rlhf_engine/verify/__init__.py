"""Checks of what the engine computes, on the user's own model, rows and mesh (`python launch/verify.py`)."""
