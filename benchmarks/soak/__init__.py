"""`make soak`: tries to bring a real server down, and counts what it answers; reproducers of faults that were found."""
