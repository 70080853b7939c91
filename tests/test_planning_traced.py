"""The planner's memory and traffic of this project's code, beside full-size jobs traced on the fake GPU."""

from __future__ import annotations

import pytest
from fakegpu.traced import Traced, read_traced

from phi3v.planning.geometry import quantised_parameters
from phi3v.planning.memory import memory
from phi3v.planning.step_time import traffic_of
from phi3v.settings import Geometry, Hardware, Model, read_entries

ROWS = read_traced()


@pytest.fixture(scope="module")
def geometry(root) -> Geometry:
    found = read_entries(["config/models.yaml"], Model, root)["phi35-vision"].geometry
    assert found is not None
    return found


@pytest.fixture(scope="module")
def gpu(root) -> Hardware:
    return read_entries(["config/hardware.yaml"], Hardware, root)["a100-80gb"]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_peak_is_predicted_within_5_percent_or_700_mb(row: Traced, geometry: Geometry, gpu: Hardware) -> None:
    need = memory(row.setup(geometry, gpu))
    assert sum(need.resting.values()) / 1e9 == pytest.approx(row.resting_gb, abs=0.01)
    assert need.allocated_gb == pytest.approx(row.peak_gb, rel=0.05, abs=0.7), need.parts()


def test_the_rows_cover_methods_devices_micro_batches_and_recomputation() -> None:
    assert {row.method for row in ROWS} == {"full", "frozen", "lora", "qlora"}
    assert {1, 4, 8, 32} <= {row.world for row in ROWS}
    assert {1, 4, 8} <= {row.micro_batch for row in ROWS}
    assert {0, 1} <= {row.recompute_every for row in ROWS}


@pytest.mark.parametrize("row", [row for row in ROWS if row.elementwise_gb is not None], ids=lambda row: row.name)
def test_elementwise_bytes_are_those_that_operators_move(row: Traced, geometry: Geometry, gpu: Hardware) -> None:
    traffic = traffic_of(row.setup(geometry, gpu))
    # The planner's bytes of a score include the products that write and read it.
    counted = traffic.elementwise + 0.845 * traffic.scores
    if row.method == "qlora":  # nf4 and its scale read, bf16 written, once per backward pass
        counted += 2.6 * quantised_parameters(geometry) / row.micro_batch
    assert row.micro_batch * counted / 1e9 == pytest.approx(row.elementwise_gb, rel=0.1)
