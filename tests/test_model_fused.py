"""The fused kernels' formulas against the plain operators and autograd, and compiled against not compiled."""

import pytest
import torch
from golden.helpers import tiny_model
from test_model_modeling import LONG, example, joined

from phi3v.model import fused
from phi3v.model.fused import RMSNorm

GENERATOR = torch.Generator().manual_seed(0)


def random(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64).to(dtype)


@pytest.fixture
def not_compiled(monkeypatch):
    """Each kernel runs as the plain function that it is compiled from."""
    monkeypatch.setattr(fused._Compiled, "compiled", property(lambda self: self.function))


def plain_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5))


def plain_gate(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return up * torch.nn.functional.silu(gate)


def plain_split_and_rotate(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    query, key, value = fused.split_heads(qkv, 4, 2)
    return torch.cat((fused.rotate(query, cos, sin), fused.rotate(key, cos, sin), value), dim=1)


def fused_split_and_rotate(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return torch.cat(fused.split_and_rotate(qkv, cos, sin, 4, 2), dim=1)


KERNELS = {
    "RMSNorm": (lambda x, w: fused.rms_norm(x, w, 1e-5), plain_norm, [(2, 5, 24), (24,)]),
    "SwiGLU": (fused.swiglu, plain_gate, [(2, 5, 24)]),
    "quick GELU": (fused.quick_gelu, lambda x: x * torch.sigmoid(1.702 * x), [(2, 5, 24)]),
    "rotation": (fused_split_and_rotate, plain_split_and_rotate, [(2, 5, 64), (2, 1, 5, 4), (2, 1, 5, 4)]),
}


@pytest.mark.parametrize("name", KERNELS)
def test_formulas_equal_autograd(name, not_compiled):
    kernel, plain, shapes = KERNELS[name]
    trained = 2 if name == "RMSNorm" else 1  # the rotation's tables take no gradient
    results = []
    inputs = [random(*shape, dtype=torch.float32) for shape in shapes]
    if name == "rotation":  # a table's second half repeats its first
        inputs[1:] = [table.repeat(1, 1, 1, 2) for table in inputs[1:]]
    for function in (kernel, plain):
        own = [x.clone().requires_grad_(place < trained) for place, x in enumerate(inputs)]
        output = function(*own)
        output.backward(torch.cos(torch.arange(output.numel(), dtype=output.dtype)).view_as(output))
        results.append([output.detach(), *(x.grad for x in own[:trained])])
    for mine, reference in zip(*results, strict=True):
        torch.testing.assert_close(mine, reference, atol=2e-6, rtol=2e-6)


def test_a_model_trains_alike_with_and_without(monkeypatch, not_compiled):
    batch = joined([example(i) for i in range(3)])
    losses, gradients = [], []
    for available in (False, True):
        monkeypatch.setattr(fused, "available", lambda x, answer=available: answer)
        model = tiny_model(**LONG).train()
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*losses)
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, atol=1e-6, rtol=1e-4, msg=name)


def test_nothing_is_fused_in_evaluation_or_on_a_cpu(monkeypatch, not_compiled):
    assert not fused.available(torch.zeros(1))
    norm, x = RMSNorm(24), random(3, 24, dtype=torch.float32)
    assert norm(x).grad_fn.name() != "_RMSNormBackward"
    monkeypatch.setattr(fused, "available", lambda x: True)
    assert norm(x).grad_fn.name() == "_RMSNormBackward"
    assert norm.eval()(x).grad_fn.name() != "_RMSNormBackward"


@pytest.mark.verify
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_compiled_kernels_equal_the_functions(dtype):
    """Inductor keeps float32 between the operators of a kernel, so results differ by a rounding of the type."""
    x, gradient, weight = random(3, 7, 48, dtype=dtype), random(3, 7, 48, dtype=dtype), random(48, dtype=dtype)
    wide = random(3, 7, 96, dtype=dtype)
    heads, tables = [random(3, 4, 7, 8, dtype=dtype) for _ in range(3)], [random(3, 1, 7, 8, dtype=dtype)] * 2
    inverse = random(3, 7, 1, dtype=torch.float32).abs()
    calls = {
        fused.rms_norm_forward: (x, weight, 1e-5),
        fused.rms_norm_backward: (gradient, x, weight, inverse),
        fused.rms_norm_weight_backward: (gradient, x, inverse),
        fused.swiglu_forward: (wide,),
        fused.swiglu_backward: (gradient, wide),
        fused.quick_gelu_forward: (x,),
        fused.quick_gelu_backward: (gradient, x),
        fused.rotate_forward: (*heads[:2], *tables),
        fused.rotate_backward: (*heads, *tables),
    }
    for kernel, arguments in calls.items():
        torch.testing.assert_close(kernel(*arguments), kernel.function(*arguments), atol=0.06, rtol=0.02)


@pytest.mark.verify
@pytest.mark.parametrize("adapters", [False, True])
def test_a_checkpointed_training_step_compiles_every_kernel(adapters, monkeypatch):
    """Compiled for real, on the CPU: after a pass that the observer watched, under recomputation and autograd."""
    from torch._dynamo.utils import counters

    from phi3v.model.adapters import add_lora
    from phi3v.model.runtime import Observer

    torch._dynamo.reset()
    kernels = [kernel for kernel in vars(fused).values() if isinstance(kernel, fused._Compiled)]
    for kernel in kernels:
        vars(kernel).pop("compiled", None)
    batch = joined([example(i) for i in range(3)])
    losses = []
    for available in (False, True):
        monkeypatch.setattr(fused, "available", lambda x, answer=available: answer)
        model = tiny_model(**LONG)
        model.activation_checkpointing_enable()
        model = (add_lora(model, 4, 8, seed=0) if adapters else model).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        counters.clear()
        observer = Observer(model)
        for _ in range(3):
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            observer.remove()
        losses.append(loss.item())
    used = len(kernels) - adapters  # frozen norms have no weight gradient
    assert used <= counters["frames"]["ok"] == counters["frames"]["total"] <= used + 2  # few are compiled twice
    assert not counters["graph_break"]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
