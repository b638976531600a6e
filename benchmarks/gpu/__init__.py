"""Checks, times and reports on the experts of one GPU; ``__main__`` is the command, README.md what it prints."""
