"""A GPU that holds no data: the CUDA paths of this project run on a CPU-only PyTorch, at full size, in seconds.

`guard.cpp` registers a CUDA device guard and hooks that do nothing, so that autograd accepts fake CUDA tensors in the
forward and the backward pass. `device.FakeGpu` is a dispatch mode over PyTorch's FakeTensor: it keeps the values of
small integer tensors, refuses CPU tensors among CUDA ones, and records host waits, copies, operators, bytes moved and
memory. What it cannot show: numerics of kernels, NCCL, real time, fragmentation of the allocator.

The guard must be loaded before torch, so every walk runs in a process of its own (see `walk.py` and `measure.py`).
"""
