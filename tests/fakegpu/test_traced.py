"""The stored peaks of full-size jobs are still what the code takes."""

from __future__ import annotations

import pytest

from fakegpu.traced import read_traced, traced_again

# Full fine-tuning on one GPU needs torchrun; the others are the tables' methods, many examples, and no recomputation.
ROWS = [
    row
    for row in read_traced()
    if (row.method, row.attention, row.world, row.micro_batch) in {
        ("full", "flash", 8, 1), ("frozen", "flash", 8, 1), ("lora", "eager", 8, 1), ("lora", "flash", 1, 8),
        ("qlora", "flash", 1, 1),
    }
]  # fmt: skip


@pytest.mark.verify
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_traced_row_is_measured_again(row) -> None:
    (found,) = traced_again([row])
    assert found.peak_gb == pytest.approx(row.peak_gb, rel=0.01)
    assert found.resting_gb == pytest.approx(row.resting_gb, rel=0.001)
    if row.elementwise_gb is not None:
        assert found.elementwise_gb == pytest.approx(row.elementwise_gb, rel=0.02)
