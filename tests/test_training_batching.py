"""The order of examples, and how a step's examples are dealt to processes and micro-steps."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phi3v.model import Phi3VConfig
from phi3v.training.batches import BatchPlan, Collator, Pick, TensorBundle


def steps_of(plan: BatchPlan, epoch: int) -> list[set[int]]:
    """The counted examples of each optimizer step, put together from what every process does."""
    steps: list[set[int]] = []
    for rank in range(plan.processes):
        number = 0
        for batch in plan.epoch(epoch, rank):
            assert len({pick.ends_step for pick in batch}) == 1
            steps += [set()] * (number == len(steps))
            steps[number] = steps[number] | {pick.index for pick in batch if pick.counted}
            number += batch[0].ends_step
        assert number == plan.steps_per_epoch
    return steps


@settings(max_examples=60, deadline=None)
@given(
    examples=st.integers(1, 70), processes=st.integers(1, 5), micro=st.integers(1, 4), accumulation=st.integers(1, 3),
    grouping=st.sampled_from(["fixed", "length", "packed"]), epoch=st.integers(0, 3),
)  # fmt: skip
def test_every_example_once_and_every_process_in_step(examples, processes, micro, accumulation, grouping, epoch):
    lengths = [random.Random(i).randrange(5, 60) for i in range(examples)]
    plan = BatchPlan(
        examples=examples, batch_size=processes * micro * accumulation, micro_batch_size=micro, processes=processes,
        seed=1, grouping=grouping, lengths=lengths, max_tokens=100 if grouping == "packed" else None,
    )  # fmt: skip
    order = plan.order(epoch)
    steps = steps_of(plan, epoch)
    # The same examples make a step, whatever the processes and the grouping: those of the seed's order.
    assert steps == [set(order[s : s + plan.batch_size]) for s in range(0, examples, plan.batch_size)]
    per_rank = [list(plan.epoch(epoch, rank)) for rank in range(processes)]
    assert len({len(own) for own in per_rank}) == 1
    if grouping != "packed":
        assert len(per_rank[0]) == sum(plan.micro_steps(len(step)) for step in steps)
    assert all(batch for own in per_rank for batch in own)
    counted = [pick.index for own in per_rank for batch in own for pick in batch if pick.counted]
    assert sorted(counted) == list(range(examples))
    for own in per_rank:
        for batch in own:
            assert len({pick.in_step for pick in batch}) == 1
            if grouping == "packed" and len(batch) > 1:
                assert sum(lengths[pick.index] for pick in batch) <= 100
            if grouping != "packed":
                assert len(batch) <= micro


def test_order_depends_on_seed_and_epoch_only():
    seven, eight = (BatchPlan(20, 4, 1, 1, seed) for seed in (7, 8))
    assert seven.order(0) == BatchPlan(20, 8, 2, 2, 7).order(0)
    assert seven.order(0) != seven.order(1) != eight.order(1)


def test_length_grouping_pads_less_than_fixed():
    lengths = [random.Random(f"l{i}").randrange(10, 400) for i in range(256)]

    def padding(grouping: str) -> int:
        plan = BatchPlan(256, 64, 8, 2, 3, grouping, lengths)
        batches = [batch for rank in range(2) for batch in plan.epoch(0, rank)]
        return sum(len(b) * max(lengths[p.index] for p in b) - sum(lengths[p.index] for p in b) for b in batches)

    assert padding("length") < padding("fixed") / 4


def test_packs_are_few_and_keep_to_the_budget():
    lengths = [random.Random(f"p{i}").randrange(10, 400) for i in range(256)]
    plan = BatchPlan(256, 64, 1, 2, 3, "packed", lengths, max_tokens=2048)
    for start in range(0, 256, 64):
        members = plan.order(0)[start : start + 64]
        packs = len(plan.spread(members)[0])
        by_tokens = sum(lengths[index] for index in members) / (2 * 2048)
        assert by_tokens <= packs <= by_tokens * 1.35 + 1


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 100) | st.sampled_from([50, 51]), min_size=1, max_size=30),
    processes=st.integers(1, 4), bound=st.sampled_from([1, 40, 100]),
)  # fmt: skip
def test_no_pack_fewer_would_have_done(lengths, processes, bound):
    plan = BatchPlan(len(lengths), len(lengths), 1, processes, 0, "packed", lengths, max_tokens=bound)
    members, packs = range(len(lengths)), len(plan.spread(range(len(lengths)))[0])
    for count in range(1, packs):  # longest first into the emptiest, one count after the other
        bins: list[list[int]] = [[] for _ in range(processes * count)]
        for length in sorted((lengths[index] for index in members), reverse=True):
            min(bins, key=sum).append(length)
        assert any(len(each) > 1 and sum(each) > bound for each in bins)


def test_an_example_longer_than_the_budget_is_a_pack_by_itself():
    plan = BatchPlan(4, 4, 1, 1, 0, "packed", [500, 10, 10, 10], max_tokens=100)
    packs = [sorted(pick.index for pick in batch) for batch in plan.epoch(0, 0)]
    assert [0] in packs
    assert sorted(i for pack in packs for i in pack) == [0, 1, 2, 3]


@settings(max_examples=60, deadline=None)
@given(
    examples=st.integers(1, 40), processes=st.integers(1, 3), micro=st.integers(1, 6), bound=st.integers(1, 300),
    grouping=st.sampled_from(["fixed", "length"]), seed=st.integers(0, 3),
)  # fmt: skip
def test_micro_batches_keep_to_their_tokens_and_steps_to_their_examples(
    examples, processes, micro, bound, grouping, seed
):
    """One example of 900 tokens among short ones, which alone exceeds every bound."""
    lengths = [random.Random(f"{seed}/{index}").randrange(5, 60) for index in range(examples)]
    lengths[seed % examples] = 900
    plan = BatchPlan(examples, processes * micro, micro, processes, seed, grouping, lengths, max_tokens=bound)
    order = plan.order(0)
    assert steps_of(plan, 0) == [set(order[s : s + plan.batch_size]) for s in range(0, examples, plan.batch_size)]
    batches = [list(plan.epoch(0, rank)) for rank in range(processes)]
    assert len({len(own) for own in batches}) == 1
    for batch in (batch for own in batches for batch in own):
        assert len(batch) == 1 or len(batch) * max(lengths[pick.index] for pick in batch) <= bound
    counted = [pick.index for own in batches for batch in own for pick in batch if pick.counted]
    assert sorted(counted) == list(range(examples))


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_fillers_weigh_nothing_and_keep_processes_together(processes):
    plan = BatchPlan(7, 6, 1, processes, 0)
    last = [list(plan.epoch(0, rank))[-1] for rank in range(processes)]
    assert [batch[0].counted for batch in last] == [True] + [False] * (processes - 1)
    assert {batch[0].in_step for batch in last} == {1}


@pytest.mark.parametrize(("grouping", "slots"), [("fixed", 20), ("length", 20), ("packed", 14)])
def test_padding_is_what_the_tokens_leave_of_the_slots(grouping, slots):
    """Two examples of 10 and 4 tokens: padded to 2 x 10, or packed to 14."""
    config = Phi3VConfig(vocab_size=40, image_token_id=39, pad_token_id=0)

    def example(tokens):
        ids = torch.arange(1, tokens + 1)
        empty = {"pixel_values": torch.empty(0, 3, 0, 0), "image_sizes": torch.empty(0, 2, dtype=torch.int64)}
        return {"id": str(tokens), "input_ids": ids, "labels": ids, **empty}

    batch = Collator(0, grouping, config)([(example(10), Pick(0, True, 2, True)), (example(4), Pick(1, True, 2, True))])
    counts = batch.counts
    assert (counts.ids, counts.work.tokens, counts.slots, counts.work.labels) == (("10", "4"), 14, slots, 14)


def test_a_bundle_gives_every_tensor_back():
    tensors = {
        "ids": torch.arange(7), "weights": torch.rand(3, 1), "tiles": torch.arange(30, dtype=torch.uint8).view(2, 3, 5),
        "flags": torch.tensor([True, False]), "none": None, "ends": torch.tensor([0, 4], dtype=torch.int32),
        "empty": torch.empty(0, dtype=torch.int64),
    }  # fmt: skip
    bundle = TensorBundle.of(tensors)
    found = bundle.on(torch.device("cpu"))
    assert found.keys() == tensors.keys() - {"none"}
    for name, tensor in found.items():
        assert torch.equal(tensor, tensors[name]) and tensor.dtype == tensors[name].dtype
        assert tensor.untyped_storage().data_ptr() == bundle.buffer.untyped_storage().data_ptr()
