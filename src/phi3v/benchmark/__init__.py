"""The speed of a row: timed windows of fine-tuning's own steps, and what they were measured on."""
