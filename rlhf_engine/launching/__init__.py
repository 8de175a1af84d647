"""From a command line to ranks."""
