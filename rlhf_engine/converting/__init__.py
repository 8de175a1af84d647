"""Checkpoints of Hugging Face made of ours, and ours of theirs."""
