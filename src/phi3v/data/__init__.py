"""Data: fetch sources, convert them to the conversations jsonl, check, and load them for training and evaluation."""
