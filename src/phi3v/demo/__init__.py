"""Demo: synthetic sources in the hub's formats, real digits as a user's own files, and a tiny random model."""
