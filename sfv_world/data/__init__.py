"""Data: recording real environments, and reading what was recorded as clips."""
