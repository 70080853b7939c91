"""Settings: the tables hold the recipe's numbers, and a wrong value is refused with file, row, field and expectation."""

import re
import shutil
import subprocess
import sys

import pytest
import yaml

from phi3v import settings
from phi3v.settings import Dataset, SettingsError, jobs, load_run, validate

# RECIPE: method -> (bf16, fp16), as published.
DOCVQA = {"full": (83.65, 82.60), "frozen": (79.19, 78.74), "lora": (82.46, 82.34), "qlora": (81.85, 81.85)}
HATEFUL_MEMES = {"full": (86.4, 85.4), "frozen": (79.4, 78.6), "lora": (86.6, 85.2), "qlora": (84.0, 83.8)}


@pytest.fixture
def published(root):
    return load_run(root / "config/config.yaml", root)


@pytest.fixture
def tree(root, tmp_path):
    """A copy of config/ to spoil, and a function that loads a run from it."""
    shutil.copytree(root / "config", tmp_path / "config")

    def load(**changes):
        values = yaml.safe_load((tmp_path / "config/config.yaml").read_text())
        return load_run({**values, **changes}, tmp_path)

    load.root = tmp_path
    return load


def test_published_values_are_the_recipes(published):
    rows = {job.row.row: job.row for job in published.accuracy}
    found = {name: row.published for name, row in rows.items() if row.origin == "published"}
    expected = {"phi35-nlvr2-full-bf16": 89.40, "phi35-nlvr2-frozen-bf16": 89.20}
    for dataset, table in (("docvqa", DOCVQA), ("hateful_memes", HATEFUL_MEMES)):
        for method, values in table.items():
            for dtype, value in zip(("bf16", "fp16"), values, strict=True):
                expected[f"phi3-{dataset}-{method}-{dtype}"] = value
    assert found == expected
    assert len(found) == 18


def test_unpublished_rows_are_marked_ours_and_repeat_the_tables_on_phi35(published):
    ours = {job.row.row: job.row for job in published.accuracy if job.row.origin == "ours"}
    published_rows = {job.row.row: job.row for job in published.accuracy if job.row.origin == "published"}
    assert len(ours) == 20
    for name, row in ours.items():
        assert row.published is None
        twin = published_rows.get(name.replace("phi35-", "phi3-"))
        if twin:
            same = ("dataset", "method", "dtype", "learning_rate", "epochs", "lora_rank", "lora_alpha", "batch_size")
            assert [getattr(row, field) for field in same] == [getattr(twin, field) for field in same]


def test_speed_rows(published):
    rows = [job.row for job in published.speed if not job.row.accompanies]
    assert len(rows) == 15
    by_name = {row.row: row for row in rows}
    assert by_name["phi3-a100-full-flash-32gpu"].published_images_per_second == 33.433
    assert by_name["phi3-a100-qlora-flash-8gpu"].published_memory_gb == 10
    assert by_name["phi3-v100-full-eager-32gpu"].published_speedup == 2.22
    for row in rows:
        first = by_name[f"phi3-{row.hardware.split('-')[0]}-full-eager-8gpu"]
        ratio = row.published_images_per_second / first.published_images_per_second
        assert ratio == pytest.approx(row.published_speedup, abs=0.01)


def test_every_published_speed_row_has_one_of_ours_beside_it(published):
    by_name = {job.row.row: job.row for job in published.speed}
    ours = [row for row in by_name.values() if row.accompanies]
    assert sorted(row.accompanies for row in ours) == sorted(by_name.keys() - {row.row for row in ours})
    chosen = {"micro_batch_size", "gradient_checkpointing"}
    for row in ours:
        assert {getattr(row, field) for field in chosen} == {"auto"}
        beside = by_name[row.accompanies]
        assert (beside.micro_batch_size, beside.gradient_checkpointing) == (1, True)
        for field in ("model", "dataset", "method", "dtype", "flash_attention", "batch_size", "hardware", "nodes"):
            assert getattr(row, field) == getattr(beside, field)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("\tphi3-a100-full-flash-8gpu\n", "\tphi3-none\n", "field `accompanies`: got 'phi3-none'"),
        ("auto\tauto\ta100-80gb\t1\t8\t", "auto\tauto\ta100-80gb\t1\t8\t5", "published_images_per_second: set, but"),
    ],
)
def test_a_row_of_ours_names_a_published_row_and_has_no_figures(tree, old, new, said):
    spoil(tree, "speed.tsv", old, new)
    with pytest.raises(SettingsError, match=said):
        tree()


def test_settings_import_no_torch(root):
    code = "import sys, phi3v.settings, phi3v.provenance.manifest; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": str(root / "src")}
    )
    assert done.stdout.strip() == "[]"


def spoil(tree, file, old, new):
    path = tree.root / "config" / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


ROW = "phi35-nlvr2-full-bf16\tphi35-vision\tnlvr2\tfull\tbf16\tyes\t1e-5\t3\t\t\t\t64\t4"


@pytest.mark.parametrize(
    ("new", "said"),
    [
        (ROW.replace("\tfull\t", "\tfool\t"), ["field `method`", "'fool'", "'full', 'frozen', 'lora' or 'qlora'"]),
        (ROW.replace("\tnlvr2\t", "\tnlvr3\t"), ["field `dataset`", "'nlvr3'", "expected one of", "hateful_memes"]),
        (ROW.replace("\tphi35-vision\t", "\tphi4\t"), ["field `model`", "'phi4'", "expected one of"]),
        (ROW.replace("\t1e-5\t", "\t-1e-5\t"), ["field `learning_rate`", "'-1e-5'", "greater than 0"]),
        (ROW.replace("\tfull\t", "\tlora\t"), ["lora_rank: empty", "method is lora"]),
        (ROW.replace("\t64\t4", "\t62\t4"), ["field `batch_size`", "got 62", "multiple of 4 processes"]),
        (ROW.replace("\t", " "), ["line 3", "expected 21"]),
    ],
)
def test_wrong_row_is_refused(tree, new, said):
    spoil(tree, "accuracy.tsv", ROW, new)
    with pytest.raises(SettingsError) as error:
        tree()
    for words in ("config/accuracy.tsv", *said):
        assert words in str(error.value)


def test_official_splits_are_entries_that_are_only_evaluated(tree, monkeypatch, tmp_path):
    run = tree()
    job = next(job for job in run.accuracy if job.row.dataset == "docvqa")
    assert run.official(job, tmp_path) is None
    assert run.datasets["docvqa_official"].missing_source(tmp_path) == "results/official/docvqa"
    (tmp_path / "results/official/docvqa").mkdir(parents=True)
    assert run.official(job, tmp_path) == "docvqa_official"
    spoil(tree, "accuracy.tsv", ROW, ROW.replace("\tnlvr2\t", "\tnlvr2_official\t"))
    with pytest.raises(SettingsError, match=r"field `dataset`: got 'nlvr2_official': .*`train`"):
        tree()
    spoil(tree, "datasets.yaml", "official: docvqa_official", "official: docvqa_unofficial")
    with pytest.raises(
        SettingsError, match=r"dataset `docvqa`: field `official`: got 'docvqa_unofficial': expected one"
    ):
        tree()
    spoil(tree, "datasets.yaml", "    val: {", "    test: {")
    with pytest.raises(SettingsError, match=r"expected at least val"):
        tree()


def test_line_and_row_are_named(tree):
    spoil(tree, "accuracy.tsv", ROW, ROW.replace("\t3\t", "\tmany\t"))
    with pytest.raises(
        SettingsError, match=r"accuracy\.tsv: line 3: row `phi35-nlvr2-full-bf16`: field `epochs`: got 'many'"
    ):
        tree()


@pytest.mark.parametrize("name", ["epoch", "finetune"])
def test_unknown_column(tree, name):
    """`finetune` is a field of overrides alone."""
    spoil(tree, "accuracy.tsv", "\tepochs\t", f"\t{name}\t")
    with pytest.raises(SettingsError, match=rf"accuracy\.tsv: line 2: column '{name}': unknown; .*row, model"):
        tree()


def test_duplicate_row(tree):
    path = tree.root / "config/accuracy.tsv"
    path.write_text(path.read_text() + path.read_text().splitlines()[2] + "\n")
    with pytest.raises(SettingsError, match=r"accuracy\.tsv: row `phi35-nlvr2-full-bf16`: field `row`: already used"):
        tree()


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "cannot be read"), ("", "empty; expected a header"), ("row\tmodel\n", "got a header without rows")],
)
def test_missing_or_empty_table(tree, content, said):
    path = tree.root / "config/accuracy.tsv"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(SettingsError, match=rf"config/accuracy\.tsv: {said}"):
        tree()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read"),
        ("", "got an empty file"),
        ("a: [", "not valid YAML"),
        ("- a\n", "got list"),
        ("a: 1\na: 2\n", "not valid YAML: field `a`"),
    ],
)
def test_missing_or_malformed_yaml(tree, content, said):
    path = tree.root / "config/models.yaml"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(SettingsError, match=rf"config/models\.yaml: {said}"):
        tree()


V100 = [{"device": "v100-32gb", "per_node": 4}]


def test_pattern_takes_what_the_hardware_can_do(tree):
    run = tree(hardware=V100)
    assert {job.row.dtype for job in run.accuracy} == {"fp16"}
    reasons = {skipped.row.row: skipped.reason for skipped in run.not_run}
    assert reasons["phi35-nlvr2-full-bf16"].startswith("dtype: bf16, ")
    assert reasons["phi3-a100-full-flash-32gpu"].startswith("dtype: bf16")
    assert reasons["phi3-v100-full-eager-8gpu"] == "hardware: needs 1 node with 8 v100-32gb"


def test_row_by_name_must_be_possible(tree):
    with pytest.raises(SettingsError, match=r"phi35-nlvr2-full-bf16`: .*field dtype: bf16"):
        tree(hardware=V100, rows={"accuracy": ["phi35-nlvr2-full-bf16"], "speed": []})


def test_a_row_that_asks_for_flash_attention_runs_where_there_is_none(tree):
    """PyTorch's memory-efficient kernel takes its place there."""
    spoil(
        tree,
        "accuracy.tsv",
        "phi3-docvqa-full-fp16\tphi3-vision\tdocvqa\tfull\tfp16\tno",
        "phi3-docvqa-full-fp16\tphi3-vision\tdocvqa\tfull\tfp16\tyes",
    )
    run = tree(hardware=V100, rows={"accuracy": ["phi3-docvqa-full-fp16"], "speed": []})
    assert run.job("phi3-docvqa-full-fp16").pool.device == "v100-32gb"
    assert "--flash_attention" in settings.flags(jobs.finetune(run, run.job("phi3-docvqa-full-fp16")))


def test_overrides_are_recorded_and_checked(tree):
    run = tree(overrides={"*-nlvr2-full-*": {"learning_rate": 1e-3, "epochs": 3}})
    assert run.job("phi35-nlvr2-full-bf16").departures == {"learning_rate": (1e-5, 1e-3)}
    assert run.job("phi35-nlvr2-frozen-bf16").departures == {}
    with pytest.raises(SettingsError, match=r"pattern .\*-nlvr9-\*.*matches no row"):
        tree(overrides={"*-nlvr9-*": {"epochs": 3}})
    with pytest.raises(SettingsError, match="field `learning_rate`: got -1"):
        tree(overrides={"*-nlvr2-full-*": {"learning_rate": -1}})
    with pytest.raises(SettingsError, match="`published` cannot be overridden"):
        tree(overrides={"*-nlvr2-full-*": {"published": 99}})
    with pytest.raises(SettingsError, match="`published_speedup` cannot be overridden"):
        tree(overrides={"phi3-a100-full-flash-8gpu": {"published_speedup": 9}})


def test_unknown_setting_and_selection(tree):
    with pytest.raises(SettingsError, match=r"field `sed`: got 3: unknown field; did you mean `seed`\?"):
        tree(sed=3)
    with pytest.raises(SettingsError, match=r"`speed.warmup`: got 3: unknown field; did you mean `warmup_steps`\?"):
        tree(speed={"warmup": 3})
    with pytest.raises(SettingsError, match="field `xyzzy`: got 3: unknown field; remove it or correct its name"):
        tree(xyzzy=3)
    with pytest.raises(SettingsError, match=r"field `rows.accuracy`: got 'phi9-\*': matches no row"):
        tree(rows={"accuracy": ["phi9-*"]})
    with pytest.raises(SettingsError, match=r"field `hardware.device`: got 'a1000': expected one of a10, a100-40gb"):
        tree(hardware=[{"device": "a1000", "per_node": 1}])


def test_one_gpu_keeps_the_batch(tree):
    run = tree(hardware=[{"device": "h100", "per_node": 1}])
    job = run.job("phi35-nlvr2-full-bf16")
    assert (job.processes, job.row.batch_size) == (1, 64)
    assert {skipped.reason for skipped in run.not_run if hasattr(skipped.row, "nodes")} >= {
        "hardware: needs 1 node with 8 a100-80gb"
    }


@pytest.mark.parametrize(
    ("per_node", "nodes", "placed"), [(8, 4, (1, 4)), (2, 4, (2, 2)), (2, 1, (1, 2)), (1, 2, (2, 1)), (4, 4, (1, 4))]
)
def test_an_accuracy_row_takes_several_machines_where_one_is_too_small(tree, per_node, nodes, placed):
    run = tree(hardware=[{"device": "a100-80gb", "per_node": per_node, "nodes": nodes}])
    job = run.job("phi35-nlvr2-full-bf16")  # published on 4 GPUs
    assert (job.nodes, job.processes_per_node) == placed


def test_flags_are_the_recipes(published):
    job = published.job("phi3-docvqa-qlora-bf16")
    model, data = published.model_folder("phi3-vision"), published.data_folder("docvqa")
    assert " ".join(settings.flags(jobs.finetune(published, job))) == (
        f"--model_name_or_path {model} --output_dir results/published/train/phi3-docvqa-qlora-bf16 --data_dir {data} "
        "--dataset docvqa --row phi3-docvqa-qlora-bf16 --use_lora --use_qlora --lora_rank 32 --lora_alpha_ratio 0.5 "
        "--batch_size 64 --learning_rate 0.0002 --epochs 2 --num_crops 16 --bf16 --flash_attention "
        "--micro_batch_size auto --gradient_checkpointing auto --expect_device cuda --no-tqdm --save_minutes 30"
    )


BASE = ["--model_name_or_path", "m", "--data_dir", "d", "--output_dir", "o"]


def test_a_timing_depends_on_its_machines_and_a_training_does_not(published):
    for kept, job, of in (
        (True, published.job("phi3-docvqa-qlora-bf16"), jobs.finetune),
        (False, published.job("phi3-a100-full-eager-8gpu"), jobs.speed),
    ):
        settings_of = of(published, job)
        pool = job.pool.model_copy(update={"device": "h100-80gb"})
        for change in ({"nodes": 2, "processes_per_node": 4}, {"pool": pool}):
            other = job.model_copy(update=change)
            assert (jobs.result_flags(other, settings_of) == jobs.result_flags(job, settings_of)) == kept


def test_command_line_round_trip(published):
    for job in published.accuracy:
        written = jobs.finetune(published, job)
        parsed = settings.parse(settings.FinetuneSettings, "", settings.flags(written))
        assert parsed == written
        assert parsed.dtype == job.row.dtype
        assert parsed.learning_rate == job.row.learning_rate
        assert parsed.use_lora == (job.row.method in ("lora", "qlora"))
        assert (parsed.freeze_vision_model != "no") == (job.row.method == "frozen")
        if parsed.use_lora:
            assert parsed.lora_rank * parsed.lora_alpha_ratio == job.row.lora_alpha


def test_evaluations_and_timings_are_read_back_from_their_flags(published):
    for job in published.accuracy[::6]:
        for what in ("base", "trained"):
            written = jobs.evaluate(published, job, what)
            assert settings.parse(settings.EvaluateSettings, "", settings.flags(written)) == written
    for job in published.speed[::6]:
        timing = jobs.speed(published, job)
        assert settings.parse(settings.SpeedSettings, "", settings.flags(timing)) == timing
    official = jobs.evaluate(published, published.job("phi3-docvqa-lora-bf16"), "official")
    assert (official.dataset, official.train_dir) == ("docvqa_official", published.data_folder("docvqa"))


def test_texts_and_numbers_are_read_back_as_they_are():
    texts = {"output_dir": "v2.0", "row": "phi3-v1.0", "dataset": "None", "report_to": ['a"b\\', "c, d\n", "3.0"]}
    numbers = {"epochs": 3.0, "learning_rate": 3e-7, "lora_alpha_ratio": 1 / 3, "weight_decay": 0.0}
    written = settings.FinetuneSettings.model_validate({"model_name_or_path": "m-1.0", **texts, **numbers})
    assert settings.parse(settings.FinetuneSettings, "", settings.flags(written)) == written
    assert "3" in settings.flags(written)


def test_environment_variables_are_no_settings(monkeypatch):
    monkeypatch.setenv("seed", "7")
    monkeypatch.setenv("SEED", "7")
    assert settings.parse(settings.FinetuneSettings, "", BASE).seed == 42


def test_a_list_takes_several_values_and_a_comma_is_part_of_one():
    question = ["--model_name_or_path", "m", "--question", "What?"]
    parsed = settings.parse(settings.PredictSettings, "", [*question, "--image", "a, b.png", "ü.png", "3.0"])
    assert parsed.image == ["a, b.png", "ü.png", "3.0"]


@pytest.mark.parametrize(
    "flags",
    [
        ["--epochs", "2", "--weight_decay", "0.1", "--micro_batch_size", "4", "--flash_attention"],
        ["--num_train_epochs", "2", "--wd", "0.1", "--batch_size_per_gpu", "4", "--use_flash_attention"],
    ],
)
def test_flags_have_the_tables_names_and_the_recipes(flags):
    parsed = settings.parse(settings.FinetuneSettings, "", [*BASE, *flags])
    assert (parsed.epochs, parsed.weight_decay, parsed.micro_batch_size) == (2, 0.1, 4)
    assert parsed.flash_attention


def test_help_groups_the_flags_and_gives_type_limits_and_default(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        settings.parse(settings.FinetuneSettings, "Fine-tune.", ["--help"])
    assert stop.value.code == 0
    page = capsys.readouterr().out
    assert re.search(r"--lora_rank int +Rank of the adapters\. \(integer ≥ 1; default: 64\)", page)
    assert re.search(r"--zero_stage \{0,1,2,3\}\s", page)
    assert page.index("--model_name_or_path") < page.index("--lora_rank") < page.index("--bf16") < page.index("--tqdm")


def test_bare_flags_mean_what_the_recipe_means():
    parsed = settings.parse(settings.FinetuneSettings, "", [*BASE, "--freeze_vision_model", "--no-tqdm"])
    assert parsed.freeze_vision_model == "vision"
    assert parsed.dtype == "fp16"  # the recipe: no --bf16 is fp16
    assert not parsed.tqdm


@pytest.mark.parametrize("adapters", [{"use_qlora": True}, {"use_qlora": True, "use_lora": False}, {"use_qlora": "on"}])
def test_qlora_is_lora_however_the_settings_are_made(adapters):
    values = {"model_name_or_path": "m", "output_dir": "o", **adapters}
    assert settings.FinetuneSettings(**values).use_lora
    assert settings.FinetuneSettings.model_validate(values).use_lora
    assert settings.parse(settings.FinetuneSettings, "", [*BASE, "--use_qlora"]).use_lora


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--learning_rate", "-1"], "field `learning_rate`: got '-1'"),
        (["--bf16", "--fp16"], "expected only one of bf16, fp16, fp32"),
        (["--lerning_rate", "1"], "unrecognized arguments: --lerning_rate"),
        (["--batch_size", "many"], "field `batch_size`: got 'many'"),
        (["--wd", "x"], "field `weight_decay` (given as --wd): got 'x'"),
        (["--weight_decay", "x"], "field `weight_decay`: got 'x'"),
        (
            ["--batch_size_per_gpu=auto", "--batching", "packed"],
            "micro_batch_size (given as --batch_size_per_gpu): auto",
        ),
    ],
)
def test_wrong_command_line_exits(flags, said, capsys):
    with pytest.raises(SystemExit) as stop:
        settings.parse(settings.FinetuneSettings, "", [*BASE, *flags])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_a_fields_role_decides_what_must_agree_and_what_may_depart():
    """A new field without a role is the recipe's: it is compared, and a departure in it is reported."""
    from phi3v.settings import FinetuneSettings, Role, SpeedRow, fields_with

    roles = [set(fields_with(FinetuneSettings, role)) for role in Role]
    assert sum(map(len, roles)) == len(FinetuneSettings.model_fields)
    assert {"learning_rate", "use_lora", "eval_steps"} <= set(fields_with(FinetuneSettings, Role.RECIPE))
    assert {"output_dir", "dataset", "full_train"} <= set(fields_with(FinetuneSettings, Role.IDENTITY))
    assert {"tqdm", "save_minutes", "report_to"} <= set(fields_with(FinetuneSettings, Role.RUNTIME))
    assert set(fields_with(settings.AccuracyRow, Role.EQUIVALENT)) == {
        "micro_batch_size", "gradient_checkpointing", "recompute_every", "gpus", "seeds"
    }  # fmt: skip
    assert set(fields_with(SpeedRow, Role.NUMERICS)) == {"dtype", "flash_attention"}


def test_generated_pages_agree_with_the_settings(root):
    command = [sys.executable, root / "scripts/settings_docs.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(root / "src")})
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_the_first_pool_whose_count_divides_takes_the_row(tree):
    pools = [{"device": "a100-80gb", "per_node": 3}, {"device": "h100", "per_node": 4}]
    assert tree(hardware=pools).job("phi35-nlvr2-full-bf16").pool.device == "h100"


def test_a_pool_takes_the_rows_that_it_names(tree):
    pools = [{"device": "h100", "per_node": 4, "rows": ["phi35-nlvr2-full-*"]}, {"device": "a100-80gb", "per_node": 4}]
    run = tree(hardware=pools)
    assert run.job("phi35-nlvr2-full-bf16").pool.device == "h100"
    assert run.job("phi35-nlvr2-frozen-bf16").pool.device == "a100-80gb"
    assert [found.row.row for found in tree(hardware=pools[:1]).not_run].count("phi35-nlvr2-frozen-bf16") == 1
    pools[0]["rows"] = ["phi35-nvlr2-*"]
    with pytest.raises(SettingsError, match="pool h100: field `rows`: got 'phi35-nvlr2-\\*'"):
        tree(hardware=pools)


@pytest.mark.parametrize(("device", "per_node"), [("cpu", 1), ("cpu", 2), ("a100-80gb", 1)])
def test_one_process_on_a_cpu_starts_without_torchrun(tree, device, per_node):
    run = tree(hardware=[{"device": device, "per_node": per_node, "stand_in": True}])
    for row, script, of in (
        ("phi35-nlvr2-lora-bf16", "finetune", jobs.finetune),
        (run.speed[0].row.row, "speed", jobs.speed),
    ):
        line = jobs.command(run, run.job(row), script, of(run, run.job(row)))
        alone = (device, per_node) == ("cpu", 1)
        assert line.startswith(f"python scripts/{script}.py --" if alone else "torchrun --standalone --nproc_per_node=")


def test_an_override_that_the_hardware_cannot_do_is_refused(tree):
    with pytest.raises(SettingsError, match="overrides of row `phi3-docvqa-full-fp16`: field dtype: bf16"):
        tree(hardware=V100, overrides={"phi3-docvqa-full-fp16": {"dtype": "bf16"}})


def test_the_memory_efficient_kernel_of_an_older_gpu_is_a_declared_departure(tree):
    run = tree(hardware=V100, overrides={"phi3-docvqa-full-fp16": {"flash_attention": True}})
    assert run.job("phi3-docvqa-full-fp16").departures == {"flash_attention": (False, True)}


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_numbers_are_finite(tree, value):
    with pytest.raises(SettingsError, match=r"field `epochs`: got (inf|nan): Input should be"):
        tree(overrides={"phi35-nlvr2-full-bf16": {"epochs": value}})


def test_a_table_saved_by_a_spreadsheet_with_a_byte_order_mark(tree):
    path = tree.root / "config/accuracy.tsv"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(tree().accuracy) == 38


def test_a_row_with_seeds_is_a_job_for_each(tree):
    run = tree(overrides={"phi35-nlvr2-lora-*": {"seeds": [42, 43, "44"]}})
    row = "phi35-nlvr2-lora-bf16"
    jobs = run.targets()[row]
    assert [(job.row.row, job.seed, job.table_row) for job in jobs] == [
        (row, 42, row), (f"{row}-seed43", 43, row), (f"{row}-seed44", 44, row)
    ]  # fmt: skip
    assert {job.baseline for job in jobs} == {jobs[0].baseline}
    assert run.job(f"{row}-seed43").seed == 43
    assert {len(jobs) for name, jobs in run.targets().items() if name != row} == {1}
    # Another run seed: none of the row's is the run's, so each has an id of its own.
    others = tree(seed=7, overrides={"phi35-nlvr2-lora-*": {"seeds": [42, 43]}}).targets()
    assert [job.row.row for job in others[row]] == [f"{row}-seed42", f"{row}-seed43"]
    assert others["phi35-nlvr2-full-bf16"][0].seed == 7


def test_seeds_in_a_table_cell(tree):
    spoil(tree, "accuracy.tsv", "row\tmodel", "row\tseeds\tmodel")
    path = tree.root / "config/accuracy.tsv"
    lines = path.read_text().splitlines()
    table = [
        line if at < 2 else line.replace("\t", "\t1,2\t" if at == 2 else "\t\t", 1) for at, line in enumerate(lines)
    ]
    path.write_text("\n".join(table) + "\n")
    run = tree()
    assert [job.seed for job in run.targets()["phi35-nlvr2-full-bf16"]] == [1, 2]
    assert [job.seed for job in run.targets()["phi35-nlvr2-frozen-bf16"]] == [42]


@pytest.mark.parametrize(
    ("seeds", "said"),
    [([42, 42], "expected each seed once"), ([-1], "`seeds.0`: got -1"), ([2**32], "`seeds.0`"), (["a"], "valid integer")],
)  # fmt: skip
def test_wrong_seeds_are_refused(tree, seeds, said):
    with pytest.raises(SettingsError, match=said):
        tree(overrides={"phi35-nlvr2-full-bf16": {"seeds": seeds}})


def test_a_seeds_id_must_not_be_another_rows(tree):
    text = (tree.root / "config/accuracy.tsv").read_text()
    line = next(line for line in text.splitlines() if line.startswith("phi35-nlvr2-full-bf16"))
    (tree.root / "config/accuracy.tsv").write_text(
        text + line.replace("phi35-nlvr2-full-bf16", "phi35-nlvr2-full-bf16-seed43") + "\n"
    )
    with pytest.raises(SettingsError, match=r"`seeds`: seed 43 .* phi35-nlvr2-full-bf16-seed43, .*accuracy\.tsv"):
        tree(overrides={"phi35-nlvr2-full-bf16": {"seeds": [43]}})


@pytest.mark.parametrize("empty", [False, True])
def test_a_row_takes_any_further_setting_of_finetune(tree, empty):
    wanted = {
        "eval_steps": 50,
        "keep_best": True,
        "deterministic": False,
        "max_length": 4096,
        "report_to": ["wandb", "mlflow"],
    }
    if empty:
        wanted |= {"max_length": None, "report_to": []}
    run = tree(overrides={"phi35-nlvr2-full-bf16": {"finetune": wanted}})
    job = run.job("phi35-nlvr2-full-bf16")
    parsed = settings.parse(settings.FinetuneSettings, "", settings.flags(jobs.finetune(run, job)))
    assert {name: getattr(parsed, name) for name in wanted} == wanted
    assert job.departures["finetune"] == ({}, wanted)


@pytest.mark.parametrize(
    ("row", "values", "said"),
    [
        ("phi35-nlvr2-full-bf16", {"learning_rate": 1e-3}, "`finetune.learning_rate`: is a field of the row"),
        ("phi35-nlvr2-full-bf16", {"evil_steps": 5}, "`finetune.evil_steps`: unknown; expected one of .*eval_steps"),
        ("phi35-nlvr2-full-bf16", {"eval_steps": -5}, "field `eval_steps`: got -5"),
        ("phi35-nlvr2-full-bf16", {"keep_best": True}, "keep_best: set, but eval_steps is 0"),
        ("phi35-nlvr2-full-bf16", {"use_dora": True}, "use_dora: .*--use_lora"),
    ],
)
def test_a_wrong_further_setting_is_refused(tree, row, values, said):
    with pytest.raises(SettingsError, match=f"overrides of row `{row}`: .*{said}"):
        tree(overrides={row: {"finetune": values}})


def test_an_automatic_micro_batch_is_a_rows_setting(tree):
    run = tree(overrides={"phi35-nlvr2-full-bf16": {"micro_batch_size": "auto"}})
    flags = settings.flags(jobs.finetune(run, run.job("phi35-nlvr2-full-bf16")))
    assert flags[flags.index("--micro_batch_size") + 1] == "auto"
    with pytest.raises(SettingsError, match="expected an integer >= 1, or auto"):
        tree(overrides={"phi35-nlvr2-full-bf16": {"micro_batch_size": 0}})


def test_a_users_run_takes_the_demos_model_with_their_dataset_alone(tree):
    entry = {
        "title": "mine", "metric": "accuracy", "split": {"val": 0.1},
        "splits": {"train": {"url": "file:mine", "format": "imagefolder"}},
    }  # fmt: skip
    (tree.root / "mine.yaml").write_text(yaml.safe_dump({"mine": entry}))
    table = (tree.root / "config/digits/accuracy.tsv").read_text()
    (tree.root / "mine.tsv").write_text(table.replace("\tdigits\t", "\tmine\t"))
    values = yaml.safe_load((tree.root / "config/digits.yaml").read_text())
    values["files"] |= {"datasets": ["mine.yaml"], "accuracy": ["mine.tsv"]}
    run = load_run(values, tree.root)
    assert {job.row.dataset for job in run.accuracy} == {"mine"}
    assert {"digits", "mixture"} <= set(run.datasets)
    assert run.settings.files.datasets[0] == "mine.yaml"


def test_a_grid_in_a_table_makes_a_row_of_every_combination(tree):
    line = ROW.replace("\t1e-5\t3\t", "\t1e-5|4e-5\t1|3\t")
    spoil(tree, "accuracy.tsv", ROW, line)
    run = tree(rows={"accuracy": ["phi35-nlvr2-full-bf16"], "speed": []})
    found = {job.row.row: (job.row.learning_rate, job.row.epochs) for job in run.accuracy}
    name = "phi35-nlvr2-full-bf16"
    assert found == {
        f"{name}@learning_rate=1e-5@epochs=1": (1e-5, 1), f"{name}@learning_rate=1e-5@epochs=3": (1e-5, 3),
        f"{name}@learning_rate=4e-5@epochs=1": (4e-5, 1), f"{name}@learning_rate=4e-5@epochs=3": (4e-5, 3),
    }  # fmt: skip
    # Each is a line of the report and a target of its own, and the line's id is all of them.
    assert {job.table_row for job in run.accuracy} == set(found)
    targets = run.targets()
    assert {job.row.row for job in targets[name]} == set(found)
    one = f"{name}@learning_rate=4e-5@epochs=3"
    assert [job.row.row for job in targets[one]] == [one]
    assert f"--output_dir results/published/train/{one}" in " ".join(settings.flags(jobs.finetune(run, run.job(one))))
    selected = tree(rows={"accuracy": ["*@learning_rate=4e-5@*"], "speed": []})
    assert len(selected.accuracy) == 2
    changed = tree(overrides={name: {"warmup_steps": 7}, one: {"warmup_steps": 9}})
    assert {job.row.row: job.row.warmup_steps for job in changed.accuracy if job.row.row in found} == (
        dict.fromkeys(found, 7) | {one: 9}
    )


def test_a_grid_in_overrides_and_in_further_settings(tree):
    name = "phi35-nlvr2-lora-bf16"
    values = {"learning_rate": "1e-5|4e-5", "finetune": {"eval_steps": "5|10", "keep_best": True}, "seeds": [42, 43]}
    run = tree(overrides={name: values}, rows={"accuracy": [name], "speed": []})
    assert len(run.accuracy) == 8
    job = run.job(f"{name}@learning_rate=4e-5@eval_steps=10-seed43")
    assert (job.seed, job.table_row) == (43, f"{name}@learning_rate=4e-5@eval_steps=10")
    written = jobs.finetune(run, job)
    assert (written.learning_rate, written.eval_steps, written.keep_best) == (4e-5, 10, True)
    assert job.departures["learning_rate"] == (2e-4, 4e-5)
    assert job.departures["finetune"] == ({}, {"eval_steps": 10, "keep_best": True})
    assert settings.parse(settings.FinetuneSettings, "", settings.flags(written)) == written


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"learning_rate": "1e-5|"}, "field `learning_rate`: got '1e-5|': expected different values"),
        ({"learning_rate": "1e-5|1e-5"}, "expected different values between the |"),
        ({"learning_rate": "1e-5|high"}, "field `learning_rate`: got 'high'"),
        ({"finetune": {"eval_steps": "5|a/b"}}, "field `eval_steps`: got '5|a/b'"),
    ],
)
def test_a_wrong_grid_is_refused(tree, values, said):
    with pytest.raises(SettingsError, match=re.escape(said)):
        tree(overrides={"phi35-nlvr2-full-bf16": values})


def test_a_problem_of_several_fields_names_the_wrong_one_and_not_all():
    split = {"url": "file:x", "format": "table", "options": {"promt_suffix": "x"}}
    with pytest.raises(SettingsError) as refused:
        validate(Dataset, {"title": "t", "metric": "accuracy", "splits": {"train": split, "val": split}}, "entry `a`")
    first, second = str(refused.value).splitlines()
    assert first.startswith("entry `a`: field `splits.train`: options: got 'promt_suffix'; format table accepts")
    assert second.startswith("entry `a`: field `splits.val`: options: got")
    assert "file:x" not in first
