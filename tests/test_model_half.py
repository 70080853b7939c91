"""float16 on a CPU: products with float32 sums equal the float32 product of the same operands, rounded once."""

import subprocess
import sys

CODE = """
import torch
from phi3v.model.half import use_float32_sums

torch.manual_seed(0)
a, b, c = torch.randn(33, 65).half(), torch.randn(65, 17).half(), torch.randn(17).half()
x, w, d = torch.randn(2, 3, 28, 28), torch.randn(8, 3, 7, 7), torch.randn(8)


def conv(dtype):
    leaves = [t.detach().to(torch.float16).to(dtype).requires_grad_() for t in (x, w, d)]
    y = torch.nn.functional.conv2d(*leaves, stride=7)
    y.sum().backward()
    return [y, *(leaf.grad for leaf in leaves)]


wide = (a.float() @ b.float(), torch.bmm(a[None].float(), b[None].float()), torch.addmm(c.float(), a.float(), b.float()))
single, exact = torch.randn(5, 7), conv(torch.float32)
before = single @ single.T
use_float32_sums()
use_float32_sums()
narrow = (a @ b, torch.bmm(a[None], b[None]), torch.addmm(c, a, b))
for got, expected in zip(narrow, wide, strict=True):
    assert got.dtype == torch.float16
    assert torch.equal(got, expected.half())
for got, expected in zip(conv(torch.float16), exact, strict=True):
    assert got.dtype == torch.float16
    torch.testing.assert_close(got.float(), expected, rtol=2e-3, atol=2e-3)
assert torch.equal(single @ single.T, before)  # other types are left as they were
linear = torch.nn.Linear(65, 17).half()
linear(a).float().square().sum().backward()
reference = torch.nn.Linear(65, 17)
reference.load_state_dict({k: v.float() for k, v in linear.state_dict().items()})
reference(a.float()).square().sum().backward()
torch.testing.assert_close(linear.weight.grad.float(), reference.weight.grad, rtol=1e-2, atol=0.3)
"""


def test_products_and_gradients(root):
    # In a process of its own: the kernels stay for the life of a process.
    done = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, check=False, env={"PYTHONPATH": str(root / "src")}
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
