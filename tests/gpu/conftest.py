"""Tests that need a CUDA device; on a machine without one they are not collected."""

import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]
