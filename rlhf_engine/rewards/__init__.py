"""Functions that score responses: which, what each is called with, and where it runs. No torch."""
