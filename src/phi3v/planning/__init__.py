"""What a row costs before it runs: FLOP, memory, time, money, and which hardware can do it. Imports no torch."""
