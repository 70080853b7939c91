"""phi3v: fine-tune Phi-3.5-vision with Microsoft's recipe, reproducibly, and compare with its published numbers."""

__version__ = "0.2.0"
