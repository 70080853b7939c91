"""`--batch_size_per_gpu auto` at full size."""

from __future__ import annotations

import pytest

from fakegpu.auto import CONSTANTS, Chosen, Search, searched

pytestmark = pytest.mark.verify
SEARCHES = [Search("lora", 12), Search("lora", 24), Search("lora", 80), Search("lora", 24, optimistic=True)]


@pytest.fixture(scope="module")
def found() -> list[Chosen]:
    return searched(SEARCHES)


@pytest.mark.parametrize("at", range(len(SEARCHES)))
def test_nothing_of_the_search_stays_alive(found: list[Chosen], at: int) -> None:
    assert found[at].live_after == found[at].live_before + CONSTANTS


@pytest.mark.parametrize("at", range(len(SEARCHES)))
def test_the_chosen_way_fits(found: list[Chosen], at: int) -> None:
    chosen = found[at]
    way = {"micro_batch_size": chosen.size, "recompute_every": chosen.interval}
    (peak,) = [probe["peak_bytes"] for probe in chosen.probes if way.items() <= probe.items()]
    assert peak is not None and peak <= chosen.capacity


def test_more_memory_takes_larger_micro_batches(found: list[Chosen]) -> None:
    sizes = [chosen.size for chosen in found[:3]]
    assert sizes == sorted(sizes) and sizes[0] < sizes[2]


def test_a_search_survives_running_out_of_memory(found: list[Chosen]) -> None:
    """The planner expects a hundredth of the bytes, so the first passes end in out-of-memory errors."""
    assert None in [probe["peak_bytes"] for probe in found[-1].probes]
