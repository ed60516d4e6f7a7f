"""What every run shares: command lines, rows and records of results, locks, processes."""
