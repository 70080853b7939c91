"""Each patch of a library does what it promises, and the library still needs it.

A test named `..._is_still_needed` fails once the library does without: then delete the patch, its test and its calls.
"""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch
from golden.helpers import tiny_folder

from phi3v.model.adapters import load_quantized

PRODUCTS = """
import torch
from phi3v.model.compat import widen_float16_products

torch.manual_seed(0)
a, b, c = torch.randn(33, 65).half(), torch.randn(65, 17).half(), torch.randn(17).half()
x, w, d = torch.randn(2, 3, 28, 28), torch.randn(8, 3, 7, 7), torch.randn(8)


def conv(dtype):
    leaves = [t.detach().to(torch.float16).to(dtype).requires_grad_() for t in (x, w, d)]
    y = torch.nn.functional.conv2d(*leaves, stride=7)
    y.sum().backward()
    return [y, *(leaf.grad for leaf in leaves)]


wide = (a.float() @ b.float(), torch.bmm(a[None].float(), b[None].float()), torch.addmm(c.float(), a.float(), b.float()))
scaled = torch.addmm(c.float(), a.float(), b.float(), beta=0.5, alpha=2)
single, exact, plain = torch.randn(5, 7), conv(torch.float32), a @ b
before = single @ single.T, torch.addmm(single[0, :5], single, single.T, alpha=2)
widen_float16_products(torch.device("cpu"), torch.bfloat16)
widen_float16_products(torch.device("cuda"), torch.float16)
assert torch.equal(a @ b, plain)  # nothing happens for other types and devices
for _ in range(2):
    widen_float16_products(torch.device("cpu"), torch.float16)
narrow = (a @ b, torch.bmm(a[None], b[None]), torch.addmm(c, a, b))
for got, expected in zip(narrow, wide, strict=True):
    assert got.dtype == torch.float16
    assert torch.equal(got, expected.half())
assert torch.equal(torch.addmm(c, a, b, beta=0.5, alpha=2), scaled.half())
for got, expected in zip(conv(torch.float16), exact, strict=True):
    assert got.dtype == torch.float16
    torch.testing.assert_close(got.float(), expected, rtol=2e-3, atol=2e-3)
# Other types are left as they were.
assert torch.equal(single @ single.T, before[0])
assert torch.equal(torch.addmm(single[0, :5], single, single.T, alpha=2), before[1])
linear = torch.nn.Linear(65, 17).half()
linear(a).float().square().sum().backward()
reference = torch.nn.Linear(65, 17)
reference.load_state_dict({k: v.float() for k, v in linear.state_dict().items()})
reference(a.float()).square().sum().backward()
torch.testing.assert_close(linear.weight.grad.float(), reference.weight.grad, rtol=1e-2, atol=0.3)
"""


def test_float16_products_are_the_float32_products_rounded_once(root):
    # In a process of its own: the kernels stay for the life of a process.
    done = subprocess.run(
        [sys.executable, "-c", PRODUCTS],
        capture_output=True, text=True, check=False, env={"PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr


NATIVE = {"avx512_fp16", "amx_fp16", "fphp"}
"""Flags of CPUs that compute float16 themselves: there PyTorch may need no help."""
IS_EXACT = """
import torch

torch.manual_seed(0)
a, b = (torch.randn(256, 256).half() for _ in range(2))
print(torch.equal(a @ b, (a.float() @ b.float()).half()))
"""


def test_widening_float16_products_is_still_needed():
    """PyTorch's own kernel sums in another order than its float32 product; issue 146508 asks for that product."""
    # In a process of its own: another test may have widened the products of this one.
    done = subprocess.run([sys.executable, "-c", IS_EXACT], capture_output=True, text=True, check=True)
    flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    assert done.stdout.strip() == "False" or flags & NATIVE


KERNELS = """
import sys
from phi3v.model.adapters import add_lora, load_quantized

assert not {"bitsandbytes", "peft"} & set(sys.modules)
load_quantized(sys.argv[1])
print("bitsandbytes" in sys.modules)
"""


def test_no_kernel_of_a_hub_is_run(tmp_path):
    """A package `kernels` that is installed is not asked for one; without one, nothing is printed about it."""
    (tmp_path / "kernels.py").write_text("def get_kernel(*repository, **version):\n    print('asked')\n")
    code = "import bitsandbytes"
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    plain = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    assert "asked" in plain.stdout or "avx512_bf16" not in flags
    ours = [sys.executable, "-c", KERNELS, str(tiny_folder())]
    done = subprocess.run(ours, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True"]
    assert "kernels" not in done.stderr


def test_bitsandbytes_still_looks_for_a_kernel_on_a_hub():
    source = metadata.distribution("bitsandbytes").locate_file("bitsandbytes/backends/cpu/ops.py")
    assert "from kernels import get_kernel" in Path(str(source)).read_text(encoding="utf-8")


def answers(packing: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed weights of the first decoder projection before and after a forward pass in eval mode."""
    model = load_quantized(tiny_folder(), torch.bfloat16).eval()
    layer = model.model.layers[0].mlp.down_proj
    layer.support_avx512bf16_for_cpu |= packing
    before = layer.weight.data.clone()
    with torch.inference_mode():
        layer(torch.ones(1, layer.in_features, dtype=torch.bfloat16))
    return before, layer.weight.data


def test_nf4_weights_keep_their_layout_in_eval_mode():
    before, after = answers(packing=False)
    assert torch.equal(before, after)


def test_keeping_nf4_unpacked_is_still_needed():
    """bitsandbytes repacks weights on CPUs with AVX-512 BF16 only."""
    from bitsandbytes.functional import has_avx512bf16

    before, after = answers(packing=has_avx512bf16())
    assert (before.shape != after.shape) == has_avx512bf16()
