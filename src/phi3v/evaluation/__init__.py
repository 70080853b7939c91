"""Answers of a model on a dataset, their scores, and what the scores can and cannot tell."""
