"""The planner: quick, torch-free, and clear about what cannot run."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import yaml

from phi3v.planning.advice import advise
from phi3v.planning.fits import Choice, choices, mean_and_longest, runnable, setup_of, what_fits
from phi3v.planning.geometry import geometry_from_config
from phi3v.planning.hardware import find_hardware, hardware_of_device
from phi3v.planning.memory import memory
from phi3v.planning.plan import duration, plan_job, plan_run
from phi3v.planning.resources import check_disk, check_free_space, checkpoint_bytes, disk_needed, resources
from phi3v.planning.step_time import Constants, step_time
from phi3v.settings import Geometry, Hardware, SettingsError, load_run, model_key, read_entries


@pytest.fixture(scope="module")
def run(root):
    return load_run(root / "config/config.yaml", root)


@pytest.fixture(scope="module")
def entries(root):
    return read_entries(["config/hardware.yaml"], Hardware, root)


def test_all_rows_in_two_seconds_without_torch(root):
    code = (
        "import sys, resource; sys.argv = ['plan.py']; sys.path.insert(0, 'scripts'); import plan; plan.main([]);"
        "loaded = sorted({'torch', 'transformers', 'numpy'} & set(sys.modules));"
        "print('LOADED', loaded, file=sys.stderr);"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_utime, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root, env={"PYTHONPATH": "src"}
    )
    said = done.stderr.splitlines()
    assert said[-2] == "LOADED []"
    # Processor time: wall time is the machine's business when others use it too.
    assert float(said[-1]) < 2.0
    assert done.stdout.count("a100-80gb") >= 48


def test_every_row_is_planned(run):
    plan = plan_run(run)
    assert [row.status for row in plan.rows] == ["run"] * 68
    for row in plan.rows:
        assert sum(row.memory_gb.values()) == pytest.approx(row.allocated_gb)
        assert row.allocated_gb <= row.reserved_gb and row.context_gb > 0
        assert sum(row.step_seconds.values()) == pytest.approx(
            next(job.row.batch_size for job in (*run.accuracy, *run.speed) if job.row.row == row.row)
            / row.images_per_second
        )
        assert 0 < row.mfu < row.hfu < 1
        assert row.gpu_hours == pytest.approx(row.hours * row.devices)
    by_name = {row.row: row for row in plan.rows}
    full = by_name["phi35-nlvr2-full-bf16"]
    assert full.steps == 3 * 781
    assert full.price is None
    assert plan.totals()["price"] is None
    assert "price: not set" in plan.table()
    assert sum(full.parameters.values()) == 4_146_621_440
    lora = by_name["phi3-docvqa-lora-bf16"]
    assert lora.trainable["decoder"] == 0
    assert lora.trainable["adapters"] > 0
    values = plan.values()
    assert values["constants"]["link_efficiency"] == Constants().link_efficiency
    page = plan.page()
    assert page.startswith("<!doctype html>") and '<meta charset="utf-8">' in page
    assert all(f"\n{row.row}: run; " in f"\n{page}" for row in plan.rows[1:])
    assert "<script" not in page


def test_a_price_of_ones_own(root):
    """No price is shown that nobody set; with one, it is times the device-hours."""
    values = yaml.safe_load((root / "config/config.yaml").read_text())
    values["hardware"][0]["price_per_hour"] = 2.5
    plan = plan_run(load_run(values, root))
    by_name = {row.row: row for row in plan.rows}
    assert by_name["phi3-docvqa-lora-bf16"].price == pytest.approx(2.5 * by_name["phi3-docvqa-lora-bf16"].gpu_hours)
    assert by_name["phi3-v100-lora-eager-8gpu"].price is None
    assert "price: not set" in plan.table()
    values["hardware"][1]["price_per_hour"] = 1.0
    plan = plan_run(load_run(values, root))
    assert f"price: {plan.totals()['price']:.2f} in the currency of price_per_hour" in plan.table()
    values["hardware"][0]["price_per_hour"] = 0
    with pytest.raises(SettingsError, match="price_per_hour"):
        load_run(values, root)


def test_one_l40s_gets_the_rows_that_fit(root):
    values = yaml.safe_load((root / "config/config.yaml").read_text())
    values["hardware"] = [{"device": "l40s", "per_node": 1}]
    run = load_run(values, root)
    plan = plan_run(run)
    status = {row.row: row.status for row in plan.rows}
    assert status["phi3-docvqa-lora-bf16"] == "run"
    assert status["phi3-a100-full-flash-32gpu"] == "not run: hardware: needs 4 nodes with 8 a100-80gb each"
    missing = status["phi3-docvqa-full-bf16"]
    assert missing.startswith("not run: predicted peak ")
    assert "would fit: lora (" in missing
    assert "devices (" in missing
    assert status["phi3-docvqa-full-bf16"] in plan.page()
    assert f"phi3-docvqa-full-bf16: {missing}" in plan.table()

    # The workflow runs the rows that the plan runs, and the report gives the others the plan's reason.
    left = runnable(run)
    assert {job.row.row for job in (*left.accuracy, *left.speed)} == {r for r, s in status.items() if s == "run"}
    assert {job.row.method for job in left.accuracy} == {"lora", "qlora"}
    assert len(left.accuracy) + len(left.not_run) == len(plan.rows) == 68
    reasons = {skipped.row.row: skipped.reason for skipped in left.not_run}
    assert reasons["phi3-docvqa-full-bf16"] == missing.removeprefix("not run: ")


def with_memory(run, device, memory_gb):
    """The run with so much memory in a device."""
    entry = run.hardware[device].model_copy(update={"memory_gb": memory_gb})
    return run.model_copy(update={"hardware": {**run.hardware, device: entry}})


def test_a_row_that_fits_on_more_of_the_pools_devices_names_the_override(root):
    """The rows of full fine-tuning ask for 4 devices; what is printed plans them on 8."""
    values = yaml.safe_load((root / "config/config.yaml").read_text())
    values["hardware"] = [{"device": "rtx3090", "per_node": 8}]
    row = "phi3-docvqa-full-bf16"
    missing = {item.row: item.status for item in plan_run(load_run(values, root)).rows}[row]
    written = re.search(r"8 devices, which this run has: `(.+)` \(", missing).group(1)
    wider = load_run(values | yaml.safe_load(written), root)
    planned = plan_job(wider, wider.job(row))
    assert (planned.status, planned.nodes, planned.devices) == ("run", 1, 8)
    assert planned.fits in ("yes", "tight")
    assert wider.job(row).departures == {"gpus": (4, 8)}
    # Without four more of them there is nothing to write.
    values["hardware"] = [{"device": "rtx3090", "per_node": 4}]
    missing = {item.row: item.status for item in plan_run(load_run(values, root)).rows}[row]
    assert "overrides" not in missing


def test_what_would_fit_is_computed(root):
    """Cheaper methods that are tight are named as that, and the number of tiles is the largest that fits."""
    values = yaml.safe_load((root / "config/config.yaml").read_text())
    row = "phi3-docvqa-lora-fp16"
    values |= {"hardware": [{"device": "t4", "per_node": 4}], "rows": {"accuracy": [row], "speed": []}}
    run = load_run(values, root)
    need = memory(replace(setup_of(run, run.job(row))[0], method="qlora"))
    small = with_memory(run, "t4", (need.least_gb + need.device_gb) / 2)
    assert f"qlora (tight, {need.least_gb:.0f} GB at least)" in plan_job(small, small.job(row)).status
    small = with_memory(run, "t4", 13.0)
    said = plan_job(small, small.job(row)).status
    crops = int(re.search(r"num_crops (\d+) instead of 16", said).group(1))
    for number, state in ((crops, True), (crops + 1, False)):
        changed = with_memory(load_run(values | {"overrides": {row: {"num_crops": number}}}, root), "t4", 13.0)
        assert (plan_job(changed, changed.job(row)).fits != "no") == state


def test_rows_that_cannot_be_planned_are_not_in_the_sums_and_say_so(root):
    values = yaml.safe_load((root / "config/config.yaml").read_text())
    values |= {
        "hardware": [{"device": "rtx4090", "per_node": 2, "nodes": 2}],
        "rows": {"accuracy": ["phi3-docvqa-lora-*"]},
    }
    plan = plan_run(load_run(values, root))
    unplanned = [row for row in plan.rows if row.status.startswith("not planned")]
    assert unplanned and "field `network_gb_s`: empty; 2 machines need it" in unplanned[0].status
    assert "`files.hardware`" in unplanned[0].status
    assert f"could not be planned and are not in the totals: {len(unplanned)}" in plan.table()
    assert (
        "not in the totals"
        not in plan_run(load_run(values | {"hardware": [{"device": "rtx4090", "per_node": 2}]}, root)).table()
    )


def test_a_row_asked_for_by_name_is_tried(root):
    values = yaml.safe_load((root / "config/config.yaml").read_text())
    values["hardware"] = [{"device": "l40s", "per_node": 1}]
    values["rows"] = {"accuracy": ["phi3-docvqa-full-bf16", "*hateful*"], "speed": ["*"]}
    run = load_run(values, root)
    kept = {job.row.row for job in runnable(run).accuracy}
    assert "phi3-docvqa-full-bf16" in kept
    assert "phi3-hateful_memes-full-bf16" not in kept
    status = {row.row: row.status for row in plan_run(run).rows}
    assert status["phi3-docvqa-full-bf16"].startswith("running it anyway because you named this row: predicted peak ")


def test_rows_of_unknown_size_are_not_left_out(root):
    """What is only known after the download must not take a row away in the middle of a run."""
    values = yaml.safe_load((root / "config/config.yaml").read_text())
    values["hardware"] = [{"device": "t4", "per_node": 1}]
    run = load_run(values, root)
    known = {job.row.row for job in runnable(run).accuracy}
    bare = {name: entry.model_copy(update={"workload": None}) for name, entry in run.datasets.items()}
    unknown = run.model_copy(update={"datasets": bare})
    assert {job.row.row for job in runnable(unknown).accuracy} == {job.row.row for job in run.accuracy} != known


def test_every_published_row_fits_where_it_was_published(run):
    assert runnable(run) == run


def test_everything_about_one_row(run):
    plan = plan_run(run)
    said = plan.detail("phi35-nlvr2-full-bf16")
    assert re.search(r"parameters, millions +4147 = clip 303\.5, projector 22.03, .*decoder 3624, head 98\.5", said)
    assert re.search(r"allocated per device, GB +\d+\.\d+ = weights 8\.293, optimizer 12\.\d+, ", said)
    assert re.search(r"train job: runtime \d+, mem_mb \d+, cpus 32, nodes 1, gres gpu:4", said)
    assert "of these trained, millions" in said
    assert "qlora" in plan.detail("phi3-docvqa-qlora-bf16")
    assert said.splitlines()[1] in plan.page()
    with pytest.raises(
        SettingsError, match=r"row 'phi35-nlvr2-ful': not in the plan of published; .*phi35-nlvr2-full-bf16"
    ):
        plan.detail("phi35-nlvr2-ful")


def test_resources(run):
    accuracy = resources(run, run.job("phi35-nlvr2-full-bf16"))["train"]
    planned = plan_job(run, run.job("phi35-nlvr2-full-bf16"))
    assert accuracy.runtime > 60 * planned.hours * 1.2
    assert (accuracy.cpus, accuracy.gres, accuracy.nodes) == (32, "gpu:4", 1)
    speed = resources(run, run.job("phi3-v100-full-eager-32gpu"))["speed"]
    assert (speed.nodes, speed.gres) == (4, "gpu:8")
    assert resources(run, run.job("phi3-docvqa-lora-bf16"))["evaluate"].runtime < accuracy.runtime


def test_memory_of_a_job_without_zero_covers_a_whole_checkpoint_per_process(run):
    """25 GB for 4.13 billion weights: each of the 4 processes reads it to resume, beside 12 GB for its libraries."""
    job = run.job("phi35-nlvr2-full-bf16")
    coded = job.model_copy(update={"row": job.row.model_copy(update={"optimizer": "adamw_8bit"})})
    whole = checkpoint_bytes(setup_of(run, coded)[0].trained, 0, "adamw_8bit", False) / 1e6
    assert resources(run, coded)["train"].mem_mb >= 4 * (12_000 + whole) > resources(run, job)["train"].mem_mb


def test_resources_before_a_models_sizes_are_known(root, tmp_path):
    demo = yaml.safe_load((root / "config/demo.yaml").read_text())
    run = load_run({**demo, "rows": {"accuracy": ["phi3-docvqa-full-bf16"], "speed": []}}, root)
    bare = {name: entry.model_copy(update={"geometry": None}) for name, entry in run.models.items()}
    unknown = run.model_copy(update={"models": bare})
    asked = resources(unknown, unknown.accuracy[0], tmp_path)["train"]
    assert (asked.runtime, asked.gres) == (1440, "")
    assert "field `geometry`: empty" in plan_job(unknown, unknown.accuracy[0], tmp_path).status
    assert resources(run, run.accuracy[0], tmp_path)["train"].runtime == 60


def test_more_devices_and_smaller_batches_need_less(run):
    setup = setup_of(run, run.job("phi3-a100-full-flash-8gpu"))[0]
    here = memory(setup)
    assert memory(replace(setup, nodes=2)).allocated_gb < here.allocated_gb
    larger = memory(replace(setup, micro_batch=4)).moments["backward of the decoder"]
    assert larger["activations"] == pytest.approx(4 * here.moments["backward of the decoder"]["activations"])
    inputs = [
        memory(replace(setup, recompute=share)).moments["backward of the decoder"]["layer inputs"]
        for share in (1, 0.5, 0)
    ]
    assert inputs[2] > 5 * inputs[0]
    assert inputs[1] == pytest.approx((inputs[0] + inputs[2]) / 2)
    assert here.allocated_gb < here.least_gb < here.device_gb


def test_the_fastest_choice_fits_and_no_other_that_fits_is_faster(run):
    job = run.job("phi3-docvqa-lora-bf16")
    setup = replace(setup_of(run, job)[0], micro_batch=1)
    found = what_fits(setup, choices(setup))
    assert found.verdict == "yes"
    for other in (Choice(1, 1), Choice(1, 0), Choice(8, 1), Choice(16, 1)):
        if what_fits(other.applied(setup)).verdict == "yes":
            assert step_time(found.setup).seconds <= step_time(other.applied(setup)).seconds
    assert what_fits(setup, choices(setup, recompute=1.0)).setup.recompute == 1.0
    small = replace(setup, hardware=run.hardware["a100-80gb"].model_copy(update={"memory_gb": 5}))
    assert what_fits(small, choices(small)).setup == small
    assert what_fits(small).verdict == "no"


def test_a_row_without_checkpointing_is_planned_so(run):
    job = run.job("phi3-a100-lora-flash-8gpu")
    without = job.model_copy(update={"row": job.row.model_copy(update={"gradient_checkpointing": False})})
    here, there = plan_job(run, job), plan_job(run, without)
    assert there.images_per_second > 1.15 * here.images_per_second
    assert there.allocated_gb > 1.5 * here.allocated_gb


@pytest.fixture
def converted(root, tmp_path):
    """A run of one row on data of people's own that are converted and counted: one answer of 10,389 tokens."""
    values = yaml.safe_load((root / "config/config.yaml").read_text())
    row = "phi3-docvqa-lora-bf16"
    values |= {"rows": {"accuracy": [row], "speed": []}, "hardware": [{"device": "a6000", "per_node": 4}]}

    def load(with_workload=False, **overrides):
        run = load_run(values | {"overrides": {row: {"micro_batch_size": 1, **overrides}}}, root)
        entry = run.datasets["docvqa"]
        if not with_workload:
            entry = entry.model_copy(update={"workload": None})
        run = run.model_copy(update={"datasets": {**run.datasets, "docvqa": entry}})
        folder = tmp_path / run.data_folder("docvqa")
        folder.mkdir(parents=True, exist_ok=True)
        splits = {"train": {"examples": 100, "images": 100}, "val": {"examples": 10, "images": 10}}
        (folder / "dataset.json").write_text(json.dumps({"splits": splits}))
        return run, folder

    load.counts = {
        "examples": 100, "turns": 100, "num_crops": 16, "tokens": {"mean": 400.0}, "tiles": {"mean": 2.0},
        "answer_tokens": {"mean": 120.0}, "longest": {"tokens": 10389, "tiles": 2, "labels": 9800},
    }  # fmt: skip
    load.row, load.root = row, tmp_path
    return load


def test_the_peak_is_that_of_the_longest_example_that_was_counted(converted):
    run, folder = converted()
    job = run.job(converted.row)
    before = plan_job(run, job, converted.root)
    assert before.lengths == "estimated" and before.fits == "yes"
    (folder / "statistics.json").write_text(json.dumps({"train": converted.counts}))
    after = plan_job(run, job, converted.root)
    assert (after.lengths, after.longest_tokens) == ("counted", 10389)
    setup, _ = setup_of(run, job, converted.root)
    assert (setup.work.tokens, setup.work.labels) == (400, 120)
    logits = 9800 * setup.geometry.vocab_size * 16 / 1e9
    assert after.memory_gb["logits"] == pytest.approx(logits)
    assert after.allocated_gb > before.allocated_gb + 4
    assert after.images_per_second > before.images_per_second  # the others are short
    assert resources(run, job, converted.root)["train"].mem_mb > 0
    # Counted for another number of tiles, the figures say nothing about this row.
    (folder / "statistics.json").write_text(json.dumps({"train": converted.counts | {"num_crops": 4}}))
    assert plan_job(run, job, converted.root) == before


def test_longer_examples_that_are_left_out_decide_nothing(converted):
    run, folder = converted(finetune={"max_length": 2048})
    (folder / "statistics.json").write_text(json.dumps({"train": converted.counts}))
    planned = plan_job(run, run.job(converted.row), converted.root)
    assert (planned.lengths, planned.longest_tokens) == ("counted", 2048)


def test_a_bound_of_tokens_holds_for_the_longest_micro_batch(converted):
    (converted()[1] / "statistics.json").write_text(json.dumps({"train": converted.counts}))

    def tokens(**overrides):
        run, _ = converted(**overrides)
        return setup_of(run, run.job(converted.row), converted.root)[0].peak_work.tokens

    assert tokens(micro_batch_size=4) == 4 * 10389
    assert tokens(micro_batch_size=4, finetune={"max_tokens_per_micro_batch": 25000}) == 2 * 10389
    assert tokens(micro_batch_size=4, finetune={"max_tokens_per_micro_batch": 4096}) == 10389
    packed = {"batching": "packed", "tokens_per_pack": 16384}
    assert tokens(finetune=packed, gradient_checkpointing=True) == pytest.approx(16384)
    assert tokens(finetune=packed | {"tokens_per_pack": 4096}, gradient_checkpointing=True) == 10389


def test_an_example_that_is_too_long_is_named_with_the_max_length_that_fits(converted):
    counts = converted.counts | {"longest": {"tokens": 100_000, "tiles": 2, "labels": 90_000}}
    run, folder = converted(with_workload=True)
    (folder / "statistics.json").write_text(json.dumps({"train": counts}))
    job = run.job(converted.row)
    pattern = run.model_copy(update={"settings": run.settings.model_copy(update={"rows": type(run.settings.rows)()})})
    status = plan_job(pattern, job, converted.root).status
    # It was not left out: what conversion finds does not change which rows run.
    assert runnable(pattern).accuracy == pattern.accuracy
    assert status.startswith("likely to run out of memory: predicted peak ")
    assert "the longest example has 100000 tokens" in status
    length = int(re.search(r"max_length: (\d+)\}", status).group(1))
    for tokens, fits in ((length, True), (2 * length, False)):
        cut, _ = converted(with_workload=True, finetune={"max_length": tokens})
        assert (plan_job(cut, cut.job(converted.row), converted.root).fits != "no") == fits


def test_rows_are_planned_with_their_zero_stage(run):
    """Per weight of full fine-tuning on 4 GPUs; what stage 1 adds to stage 2 is a bfloat16 gradient for a shard of one
    in float32."""
    job = run.job("phi35-nlvr2-full-bf16")

    def with_stage(stage):
        row = job.row.model_copy(
            update={"finetune": {"zero_stage": stage}, "micro_batch_size": 1, "gradient_checkpointing": True}
        )
        return setup_of(run, job.model_copy(update={"row": row}))[0]

    setups = {stage: with_stage(stage) for stage in (0, 1, 2, 3)}
    need = {stage: memory(setup) for stage, setup in setups.items()}
    trained, held = setups[2].trained, sum(plan_job(run, job).parameters.values())
    step = {stage: of.moments["optimizer step"]["gradients"] for stage, of in need.items()}
    assert step == pytest.approx({0: 4 * trained, 1: 2 * trained, 2: trained, 3: trained})
    optimizer = {stage: of.resting["optimizer"] for stage, of in need.items()}
    assert optimizer == pytest.approx({0: 8 * trained, 1: 3 * trained, 2: 3 * trained, 3: 3 * trained})
    weights = {stage: of.resting["weights"] for stage, of in need.items()}
    assert weights == pytest.approx({0: 4 * held, 1: 2 * held, 2: 2 * held, 3: 2 * (held / 4 + 1e9)})
    seconds = {stage: step_time(setup).communication for stage, setup in setups.items()}
    assert seconds[0] <= seconds[1] <= seconds[2] < seconds[3]


@pytest.mark.parametrize(
    ("name", "finetune", "groups"),
    [
        ("phi35-nlvr2-full-bf16", {"freeze_decoder": True}, {"clip", "projector", "separators"}),
        ("phi3-docvqa-lora-bf16", {"lora_targets": ["img_projection"]}, {"adapters"}),
    ],
)
def test_rows_that_train_less_need_less_memory(run, name, finetune, groups):
    job = run.job(name)
    row = job.row.model_copy(update={"finetune": finetune, "micro_batch_size": 1, "gradient_checkpointing": True})
    whole, part = plan_job(run, job), plan_job(run, job.model_copy(update={"row": row}))
    assert {group for group, trained in part.trainable.items() if trained} == groups
    assert sum(part.trainable.values()) < sum(whole.trainable.values()) / 10
    setup, _ = setup_of(run, job.model_copy(update={"row": row}))
    held = "adapters" if setup.adapters else "optimizer"
    everything = replace(setup, frozen=frozenset(), lora_targets=())
    share = setup.trained / everything.trained
    assert memory(setup).resting[held] == pytest.approx(memory(everything).resting[held] * share)


def test_disk(run, tmp_path):
    plan = plan_run(run, tmp_path)
    assert plan.disk["models"] == pytest.approx(2 * 8.29, abs=0.1)
    assert plan.disk_missing == plan.disk
    # Two checkpoints kept and one being written: weights in 2 bytes, float32 copies and two moments of what trains.
    assert plan.disk["checkpoints of one row"] == pytest.approx(3 * (2 * 4.147 + 12 * 4.13), rel=0.01)
    assert "not written yet" in plan.table()


@pytest.mark.parametrize(
    ("own", "save_minutes", "count"),
    [
        ({}, 30, 3),
        ({"keep_checkpoints": 4}, 30, 5),
        ({"keep_best": True, "eval_steps": 10}, 30, 4),
        ({"save_minutes": 0}, 30, 1),
        ({"save_steps": 50}, 0, 3),
        ({}, 0, 1),
    ],
)
def test_as_many_checkpoints_are_counted_as_training_asks_for(root, run, own, save_minutes, count):
    row = "phi35-nlvr2-full-bf16"
    values = run.settings.model_dump(exclude={"demo"}) | {"overrides": {row: {"finetune": own}}}
    values |= {"rows": {"accuracy": [row], "speed": []}, "save_minutes": save_minutes}
    plan = plan_run(load_run(values, root))
    one = 2 * 4.147 + 12 * 4.13
    assert plan.disk["checkpoints of one row"] == pytest.approx(count * one, rel=0.01)
    (planned,) = [item for item in plan.rows if item.row == row]
    assert planned.disk_gb == pytest.approx(8.29 + count * one, rel=0.01)


def test_a_rows_own_number_of_steps_is_planned(root, run):
    row = "phi35-nlvr2-lora-bf16"
    values = run.settings.model_dump(exclude={"demo"}) | {"overrides": {row: {"finetune": {"max_steps": 7}}}}
    limited = load_run(values, root)
    short, whole = plan_job(limited, limited.job(row)), plan_job(run, run.job(row))
    assert short.steps == 7
    assert short.hours < whole.hours


def test_a_merged_model_is_counted_beside_its_adapter(root, run):
    row = "phi35-nlvr2-lora-bf16"
    values = run.settings.model_dump(exclude={"demo"}) | {"rows": {"accuracy": [row], "speed": []}}
    plain, merged = (
        plan_run(load_run({**values, "overrides": {row: {"finetune": {"merge": merge}}}}, root)).disk["final weights"]
        for merge in (False, True)
    )
    assert merged - plain == pytest.approx(8.29, abs=0.01) and plain < 1


def test_size_of_a_checkpoint():
    """Float32 weights and two moments: of 4 bytes each, or of one byte and 4/256 for the scale of its block."""
    assert checkpoint_bytes(1e9, 2e9, "adamw", is_sharded=False) == 12e9
    assert checkpoint_bytes(1e9, 2e9, "adamw", is_sharded=True) == 14e9
    assert checkpoint_bytes(1e9, 2e9, "paged_adamw_8bit", is_sharded=False) == pytest.approx(6.03e9, rel=1e-3)
    assert checkpoint_bytes(1e9, 2e9, "adamw_offload", is_sharded=True) == 14e9


def test_disk_that_is_written_already_is_not_needed_again(run, tmp_path):
    folder = tmp_path / "results" / "models" / model_key("phi35-vision", run.models["phi35-vision"])
    trained = tmp_path / "results" / "published" / "train"
    for path in (folder / "sources.lock.json", trained / "phi35-nlvr2-full-bf16" / "manifest.json"):
        path.parent.mkdir(parents=True)
        path.write_text("{}")
    before, after = plan_run(run).disk, plan_run(run, tmp_path).disk_missing
    assert after["models"] == pytest.approx(before["models"] / 2)
    assert before["final weights"] - after["final weights"] == pytest.approx(8.29, abs=0.01)


def test_checkpoints_that_are_there_need_no_more_room(run, tmp_path):
    """A row that goes on from them on a disk that was just large enough is not refused."""
    row = "phi35-nlvr2-full-bf16"
    before = disk_needed(run, {row}, tmp_path, missing_only=True)
    saved = tmp_path / "results/published/train" / row / "checkpoints/checkpoint-5/weights"
    saved.parent.mkdir(parents=True)
    with saved.open("wb") as file:
        file.truncate(int(50e9))  # takes no room
    after = disk_needed(run, {row}, tmp_path, missing_only=True)
    assert before.pop("checkpoints of one row") - after.pop("checkpoints of one row") == pytest.approx(50)
    assert after == before
    assert disk_needed(run, {row}, tmp_path)["checkpoints of one row"] > 150


def test_too_little_disk_is_refused_with_what_is_needed(run, tmp_path):
    with pytest.raises(SettingsError, match=r"GB free, .* about .* GB .* more than is free; select fewer rows"):
        check_disk({"models": 1e9}, tmp_path / "not" / "there")
    check_disk({"models": 0.0}, tmp_path)
    little = shutil._ntuple_diskusage(100, 90, int(10e9))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: little)
        row = "phi35-nlvr2-full-bf16"
        with pytest.raises(SettingsError, match=r"results: 10 GB free.*models 8, datasets 40, final weights 8"):
            check_free_space(run, {row}, tmp_path)
        with pytest.raises(SettingsError, match=r"10 GB free, .* about 49 GB"):
            check_free_space(run, {row}, tmp_path, downloads_only=True)
        check_free_space(run, set(), tmp_path)


def test_times_that_people_read():
    assert [duration(hours) for hours in (12.34, 1.5, 0.5, 0.004)] == ["12.3 h", "90 min", "30 min", "14 s"]


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("V100-32GB", "v100-32gb"),
        ("NVIDIA RTX 4090", "rtx4090"),
        ("h200", "h200"),
        ("A100 80GB", "a100-80gb"),
        ("MI300X", "mi300x"),
        ("A100-80", "a100-80gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("Tesla V100-SXM2-32GB", "v100-32gb"),
    ],
)
def test_gpu_names_of_people(entries, name, key):
    assert find_hardware(name, entries) == key


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA H100 PCIe MIG 1g.10gb", None),
        ("NVIDIA GH200 480GB", "gh200-480gb"),
        ("NVIDIA GH200 144G HBM3e", None),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None),
        ("Tesla V100-PCIE-32GB", None),
        ("NVIDIA A100 80GB PCIe", "a100-80gb-pcie"),
        ("NVIDIA A100-PCIE-40GB", "a100-40gb-pcie"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA A10G", "a10g"),
        ("NVIDIA A40", "a40"),
        ("NVIDIA A4000", None),
        ("NVIDIA RTX A6000", "a6000"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx6000ada"),
        ("Quadro RTX 6000", None),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", None),
        ("NVIDIA A100-SXM-64GB", "a100-64gb"),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 5090", "rtx5090"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA GB200", None),
        ("NVIDIA L40", "l40"),
        ("NVIDIA H200", "h200"),
        ("Tesla V100-SXM2-32GB", "v100-32gb"),
        ("Tesla T4", "t4"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA GeForce RTX 3090", "rtx3090"),
        ("Quadro RTX 8000", "rtx8000"),
        ("AMD Instinct MI300X", "mi300x"),
        ("AMD Instinct MI250X", "mi250x"),
        ("AMD Instinct MI250", None),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_gpu_names_of_drivers(entries, name, key):
    assert hardware_of_device(name, entries) == key


def test_unknown_gpu_is_refused_and_told_how_to_add(entries):
    with pytest.raises(SettingsError, match=r"GPU 'GTX1080': unknown; expected one of .*rtx4090.*files\.hardware"):
        find_hardware("GTX1080", entries)
    with pytest.raises(SettingsError, match=r"GPU '4090': unknown; did you mean rtx4090\?; expected one of"):
        find_hardware("4090", entries)
    for name, meant in (("RTX 6000", "rtx6000ada"), ("NVIDIA H20", "h200"), ("mi300", "mi300x")):
        with pytest.raises(SettingsError, match=f"unknown; did you mean .*{meant}\\?"):
            find_hardware(name, entries)
    with pytest.raises(SettingsError, match="matches several entries; expected one of a100-80gb, a100-40gb, a100-64gb"):
        find_hardware("A100", entries)


def test_every_entry_has_what_the_planner_needs(entries):
    assert len(entries) >= 16
    for key, entry in entries.items():
        assert entry.source, key
        assert entry.bandwidth_gb_s, key
        assert entry.peak_tflops.fp32, key
        assert (entry.peak_tflops.bf16 is not None) == entry.bf16, key


@pytest.mark.parametrize(
    ("gpu", "count", "method", "dtype", "flash"),
    [
        ("A100-80GB", 8, "full", "bf16", True),
        ("H100", 8, "full", "bf16", True),
        ("V100-32GB", 8, "full", "fp16", False),
        ("RTX 4090", 2, "lora", "bf16", True),
        ("L40S", 1, "lora", "bf16", True),
        ("T4", 2, "lora", "fp16", False),
    ],
)
def test_advice_is_the_recipes(run, entries, gpu, count, method, dtype, flash):
    geometry = run.models["phi35-vision"].geometry
    advice = advise(gpu, count, "hateful_memes", entries, geometry, run.datasets["hateful_memes"])
    chosen = advice.chosen
    assert (chosen.method, chosen.fit.setup.dtype, chosen.fit.setup.flash) == (method, dtype, flash)
    assert f"--{dtype}" in advice.command()
    assert ("--use_flash_attention" in advice.command()) == flash
    assert "recommended: " + method in advice.text()


@pytest.fixture(scope="module")
def advice(run, entries):
    """Advice for docvqa and the published model."""

    def asked(gpu, count=1, nodes=1, hardware=entries):
        return advise(
            gpu, count, "docvqa", hardware, run.models["phi35-vision"].geometry, run.datasets["docvqa"], nodes
        )

    return asked


def test_advice_for_several_machines_starts_torchrun_on_each(advice):
    command = advice("A100-80GB", 8, nodes=4).command()
    assert command.startswith(
        "torchrun --nnodes=4 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 --nproc_per_node=8 scripts/finetune.py "
    )
    said = advice("A100-80GB", 8, nodes=4).text()
    assert said.startswith("32 x NVIDIA A100 80 GB (4 machines with 8 each), docvqa:")
    assert "scripts/torchrun_nodes.sh 4 8 scripts/finetune.py" in said
    assert advice("A100-80GB", 8).command().startswith("torchrun --standalone --nproc_per_node=8 ")
    assert "torchrun_nodes" not in advice("A100-80GB", 8).text()


def test_more_devices_than_a_machine_has_are_refused(advice):
    with pytest.raises(SettingsError, match=r"field `count`: got 200: .* at most 16; .* --count 8 --nodes 25"):
        advice("H100", 200)
    assert advice("H100", 16).chosen.method == "full"


def test_a_number_of_devices_that_would_do_does(advice):
    lacking = advice("RTX5090", 2)
    devices = int(re.search(r"(\d+) devices would be enough", lacking.options[0].remark).group(1))
    entry = lacking.requested.hardware.model_copy(update={"network_gb_s": 12.5})
    assert advice("mine", 2, nodes=devices // 2, hardware={"mine": entry}).options[0].verdict != "no"
    assert advice("mine", 2, nodes=devices // 4, hardware={"mine": entry}).options[0].verdict == "no"


def test_a_cpu_is_for_the_demo(advice):
    asked = advice("cpu")
    said = asked.text()
    assert asked.chosen is None
    assert "recommended: none\n- the CPU is only meant for the demo (`make demo`" in said
    assert "flash" not in said and " 0.00 " not in said


def test_where_nothing_fits_the_number_of_tiles_that_does_is_computed(advice, run):
    small = with_memory(run, "v100-16gb", 13.0).hardware["v100-16gb"]
    asked = advice("small", 8, hardware={"small": small})
    crops = int(re.search(r"lora with --num_crops (\d+) instead of 16", asked.text()).group(1))
    lora = next(item.fit.setup for item in asked.options if item.method == "lora")
    load = run.datasets["docvqa"].workload
    for number, state in ((crops, True), (crops + 1, False)):
        mean, longest = mean_and_longest(load, lora.geometry, number)
        assert (what_fits(replace(lora, work=mean, longest=longest)).verdict != "no") == state


def test_what_advice_says_of_flash_attention_is_the_published_table(advice, run):
    rate = {job.row.row: job.row.published_images_per_second for job in run.speed}
    ratio = {
        method: rate[f"phi3-a100-{method}-eager-8gpu"] / rate[f"phi3-a100-{method}-flash-8gpu"]
        for method in ("full", "lora", "qlora")
    }
    assert {method: round(value, 2) for method, value in ratio.items()} == {"full": 0.58, "lora": 0.46, "qlora": 0.46}
    assert "0.58 of the throughput for full fine-tuning and 0.46 for LoRA and QLoRA" in advice("T4").text()
    assert "1.7 times the throughput for full fine-tuning, and 2.2 times for LoRA and QLoRA" in advice("H100").text()
    for gpu, older in (("T4", True), ("V100-32GB", True), ("H100", False)):
        assert ("memory-efficient kernel" in advice(gpu).text()) == older


def test_advice_says_what_else_is_not_as_published(advice):
    assert "batch 70: the recipe's 64 is not a multiple of 7 devices" in advice("H100", 7).text()
    assert "not a multiple" not in advice("H100", 8).text()
    for gpu, old in (("V100-32GB", True), ("T4", False)):
        assert ("the locked environment does not run on Volta" in advice(gpu, 8).text()) == old


def test_advice_command_line(root, tmp_path):
    command = [sys.executable, "scripts/plan.py", "--gpu", "V100-32GB", "--count", "8", "--dataset", "hateful_memes"]
    done = subprocess.run(
        [*command, "--output_dir", str(tmp_path)],
        capture_output=True, text=True, check=True, cwd=root, env={"PYTHONPATH": "src"},
    )  # fmt: skip
    assert "Volta does not support bf16" in done.stdout
    assert (tmp_path / "advice.txt").read_text() == done.stdout
    written = json.loads((tmp_path / "advice.json").read_text())
    assert (written["recommended"], written["count"], written["dtype"]) == ("full", 8, "fp16")
    assert [option["fits"] for option in written["options"]] == ["yes", "yes", "never"]
    assert written["command"] in done.stdout
    done = subprocess.run(
        [*command[:3], "GTX1080"], capture_output=True, text=True, cwd=root, env={"PYTHONPATH": "src"}
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: GPU 'GTX1080': unknown")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--gpu", "t4", "--row", "x", "--check_disk", "."], "--row, --check_disk: no effect with --gpu"),
        (["--count", "8", "--nodes", "2"], "--count, --nodes: no effect without --gpu"),
        (["--row", "x", "--dataset", "docvqa"], "--dataset: no effect without --gpu"),
        (["--gpu", "t4", "--count", "0"], "--count 0: expected >= 1"),
        (["--gpu", ""], "GPU '': unknown"),
    ],
)
def test_a_flag_without_effect_is_an_error(root, flags, said):
    done = subprocess.run(
        [sys.executable, "scripts/plan.py", *flags], capture_output=True, text=True, cwd=root,
        env={"PYTHONPATH": "src"},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr


def test_missing_peak_is_never_guessed(run):
    bare = run.hardware["a100-80gb"].model_copy(update={"bandwidth_gb_s": None})
    spoilt = run.model_copy(update={"hardware": {**run.hardware, "a100-80gb": bare}})
    assert "field `bandwidth_gb_s`: empty" in plan_job(spoilt, spoilt.accuracy[0]).status


def test_impossible_geometry(run):
    config = run.models["phi35-vision"].geometry.model_dump()
    with pytest.raises(SettingsError, match=r"my\.json: hidden_size|my\.json: .*expected a multiple"):
        geometry_from_config({**config, "hidden_size": 3073}, "my.json")
    with pytest.raises(SettingsError, match="image_size: got 300"):
        geometry_from_config({**config, "vision_config": {"image_size": 300}}, "my.json")
    with pytest.raises(SettingsError, match="field `vocab_size`: missing"):
        geometry_from_config({name: value for name, value in config.items() if name != "vocab_size"}, "my.json")
    assert isinstance(geometry_from_config(config), Geometry)


@pytest.mark.parametrize(
    ("gpu", "fitting"),
    [
        ("h100", {"adamw": "tight", "adamw_8bit": "yes", "paged_adamw_8bit": "yes", "adamw_offload": "yes"}),
        ("a6000", {"adamw": "no", "adamw_8bit": "no", "paged_adamw_8bit": "yes", "adamw_offload": "yes"}),
        ("l40s", {"adamw": "no", "adamw_8bit": "no", "paged_adamw_8bit": "yes", "adamw_offload": "yes"}),
        ("rtx4090", {"adamw": "no", "adamw_8bit": "no", "paged_adamw_8bit": "no", "adamw_offload": "yes"}),
        ("t4", {"adamw": "no", "adamw_8bit": "no", "paged_adamw_8bit": "no", "adamw_offload": "tight"}),
    ],
)
def test_advice_names_the_optimizers_that_full_fine_tuning_fits_one_gpu_with(advice, gpu, fitting):
    asked = advice(gpu)
    found = {name: what_fits(replace(asked.requested, optimizer=name)).verdict for name in fitting}
    assert found == fitting
    named = re.findall(r"--optimizer (\w+)", " ".join(asked.reasons))
    assert named == [name for name, verdict in fitting.items() if name != "adamw" and verdict != "no"]


def test_advice_says_that_no_optimizer_makes_full_fine_tuning_fit(advice, entries):
    small = entries["rtx4090"].model_copy(update={"memory_gb": 12})
    assert "full fine-tuning fits with none of the optimizers" in advice("small", hardware={"small": small}).text()


def test_memory_of_each_optimizer(advice):
    """Per trained weight: 18 bytes with AdamW (2 + 12 + 4), 12.03 with 8-bit states; the offload keeps 20 on the
    host."""
    setup = advice("h100").requested
    need = {
        name: memory(replace(setup, optimizer=name))
        for name in ("adamw", "adamw_8bit", "paged_adamw_8bit", "adamw_offload")
    }
    saved = (need["adamw"].allocated_gb - need["adamw_8bit"].allocated_gb) * 1e9 / setup.trained
    assert saved == pytest.approx(18 - 12.03, abs=0.3)
    paged = need["adamw_8bit"].allocated_gb - need["paged_adamw_8bit"].allocated_gb
    assert paged == pytest.approx(need["paged_adamw_8bit"].host_gb)
    assert need["adamw_offload"].host_gb == pytest.approx(20 * setup.trained / 1e9)
    assert need["adamw"].host_gb == need["adamw_8bit"].host_gb == 0
    # Traced on the fake GPU: python -m tests.fakegpu.measure full --set 'optimizer="adamw_8bit"'.
    assert need["adamw_8bit"].allocated_gb == pytest.approx(51.76, rel=0.03)
