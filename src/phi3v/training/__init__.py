"""Fine-tuning and its speed: the Hugging Face Trainer with what the recipe needs beside it."""
