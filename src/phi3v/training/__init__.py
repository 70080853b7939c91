"""Fine-tuning: a loop over accelerate, and what surrounds it."""
