"""The speed measurement: what speed.json says of a short run, what is refused, and the fingerprint of a machine."""

import gzip
import json
import os
import types

import pytest

torch = pytest.importorskip("torch")

from training_fixtures import finish, launch, write_data, write_model  # noqa: E402

from phi3v.benchmark import machine, speed  # noqa: E402
from phi3v.planning.flops import Work, example_work, training_flops  # noqa: E402
from phi3v.planning.geometry import geometry_from_config  # noqa: E402
from phi3v.planning.hardware import Utilisation, utilisation_of  # noqa: E402
from phi3v.settings import SettingsError, SpeedSettings, validate  # noqa: E402

SMI = """#!/bin/sh
case "$*" in
*topo*) printf '\\033[4mGPU0 GPU1 NIC0 CPU Affinity\\033[0m\\nGPU0 X NV12 SYS 0-15\\nGPU1 NV12 X SYS 0-15\\nNIC0 SYS SYS X\\n';;
*GPU-42*) echo '400.00, 550.54.15';;
*) exit 1;;
esac
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speed")
    return write_model(folder / "model"), write_data(folder / "data"), folder


@pytest.fixture(scope="module")
def measured(folders):
    """(what the script said, speed.json, its folder) of two processes that stand for eight A100."""
    model, data, folder = folders
    code, said = finish(
        launch(
            ["--model_name_or_path", str(model), "--data_dir", str(data), "--output_dir", str(folder / "out"),
             "--row", "x-lora", "--use_lora", "--lora_rank", "4", "--bf16", "--batch_size", "8", "--batch_size_per_gpu",
             "2", "--timed_steps", "2", "--expect_processes", "8", "--expect_hardware", "a100-80gb", "--stand_in",
             "--profile", "--no-tqdm"],
            processes=2, script="scripts/speed.py",
        )
    )  # fmt: skip
    assert code == 0, said
    return said, json.loads((folder / "out" / "speed.json").read_text()), folder / "out"


def test_medians_of_windows_after_the_warmup(measured):
    _, result, folder = measured
    assert (result["warmup_steps"], result["timed_steps"], len(result["repeats"])) == (10, 2, 3)
    for name in ("images_per_second", "tokens_per_second", "step_seconds", "loading_share", "mfu", "hfu"):
        values = sorted(window[name] for window in result["repeats"])
        assert values[0] > 0
        assert result[name] == values[1], name
    rates = sorted(window["images_per_second"] for window in result["repeats"])
    assert result["spread"] == pytest.approx((rates[-1] - rates[0]) / rates[1])
    # Every example has one picture, and a step is 8 examples.
    assert result["images_per_second"] == pytest.approx(8 / result["step_seconds"])
    assert result["tokens_per_second_per_device"] == pytest.approx(result["tokens_per_second"] / 2)
    assert 0 < result["loading_share"] < 1
    assert (result["world_size"], result["stand_in"], result["row"]) == (2, True, "x-lora")
    assert (folder / "manifest.json").is_file()
    assert not (folder / "checkpoints").exists()


def test_utilisation_is_of_a_measured_peak_on_a_cpu(measured):
    said, result, _ = measured
    assert result["peak_source"].startswith("measured: bf16 products of 1024 x 1024 on this CPU")
    assert result["mfu"] == pytest.approx(result["tflops"] / (2 * result["peak_tflops"]), rel=1e-6)
    # Examples differ in length, so windows differ a little in work.
    assert result["tflops"] == pytest.approx(result["model_tflop_per_step"] / result["step_seconds"], rel=0.1)
    assert result["hardware_tflop_per_step"] > result["model_tflop_per_step"] > 0
    assert result["hfu"] > result["mfu"]
    assert result["formula"] in said
    assert "MFU" in result["formula"]


def test_memory_is_of_the_largest_process(measured):
    _, result, _ = measured
    assert result["reserved_memory_bytes"] is None and result["context_memory_bytes"] is None
    assert result["memory_source"] == "peak: largest resident set (getrusage)"
    assert 1e8 < result["resident_memory_bytes"] < 5e9
    assert result["peak_memory_bytes"] >= 0.9 * result["resident_memory_bytes"]


def test_fingerprint_of_a_run(measured):
    mark = measured[1]["fingerprint"]
    assert sum(mark["devices"].values()) == 2
    assert (mark["machines"], mark["backend"], mark["cuda"], mark["nccl"]) == (1, "gloo", None, None)
    assert mark["versions"]["torch"] == torch.__version__
    assert "commit" in mark
    assert mark["container"] is None


def test_profile_is_a_trace_and_a_table(measured):
    folder = measured[2] / "profile"
    events = json.loads(gzip.decompress((folder / "trace.json.gz").read_bytes()))["traceEvents"]
    assert any(event.get("name") == "aten::addmm" for event in events)
    lines = (folder / "operators.txt").read_text().splitlines()
    assert sum(line.count("aten::") > 0 for line in lines) > 5
    assert len([line for line in lines if "%" in line and "Self CPU %" not in line]) == 20


def test_windows_start_after_the_warmup_and_end_before_the_profile():
    counts = {"examples": 4, "images": 4, "tokens": 100, "work": Work(4, 100), "loading_seconds": 0.01}
    watch = speed.Stopwatch(torch.device("cpu"), 10, 5, 3)
    for step in range(1, 10 + 15 + 3 + 1):
        watch(types.SimpleNamespace(step=step, **counts))
    assert [(window.steps, window.images, window.work.tokens) for window in watch.windows] == [(5, 20, 500)] * 3
    assert all(window.seconds > 0 for window in watch.windows)


def test_fewer_warmups_or_repeats_are_refused():
    for name, least in (("speed_warmup_steps", 10), ("repeats", 3)):
        with pytest.raises(SettingsError, match=f"field `{name}`: got {least - 1}: .* equal to {least}"):
            validate(SpeedSettings, {"model_name_or_path": "m", "output_dir": "o", name: least - 1}, "test")


def settings(**changes):
    values = {"model_name_or_path": "m", "output_dir": "o", "row": "full-8", "expect_processes": 8} | changes
    return SpeedSettings(**values)


A100 = ["NVIDIA A100-SXM4-80GB"] * 8


def test_other_devices_than_the_rows_are_refused_with_what_was_found(monkeypatch):
    wanted = {"expect_hardware": "a100-80gb"}
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    machine.check_devices(settings(**wanted), A100)
    with pytest.raises(SettingsError, match=r"expected NVIDIA A100 80 GB; this machine has 8 x NVIDIA A100-SXM4-40GB"):
        machine.check_devices(settings(**wanted), ["NVIDIA A100-SXM4-40GB"] * 8)
    with pytest.raises(SettingsError, match=r"this machine has no CUDA device; .*--stand_in"):
        machine.check_devices(settings(**wanted), [])
    machine.check_devices(settings(**wanted, stand_in=True), [])
    with pytest.raises(SettingsError, match="got 8 processes on this machine, which has 1 x Tesla T4"):
        machine.check_devices(settings(stand_in=True), ["Tesla T4"])
    with pytest.raises(SettingsError, match="got 'a100': expected one of a10, a100-40gb"):
        machine.check_devices(settings(expect_hardware="a100"), A100)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(SettingsError, match=r"row full-8: .*got 4 processes; expected 8"):
        machine.check_devices(settings(**wanted), A100)


def test_the_script_refuses_before_it_loads_anything(folders):
    model, data, folder = folders
    code, said = finish(
        launch(
            ["--model_name_or_path", str(model), "--data_dir", str(data), "--output_dir", str(folder / "refused"),
             "--bf16", "--expect_processes", "1", "--expect_hardware", "h100"],
            script="scripts/speed.py",
        )
    )  # fmt: skip
    assert code == 2
    assert "expected NVIDIA H100 80 GB SXM; this machine has no CUDA device" in said
    assert not (folder / "refused").exists()


@pytest.mark.parametrize("method", ["full", "frozen", "lora", "qlora"])
def test_mfu_counts_what_the_method_trains(root, monkeypatch, method):
    """Frozen weights, adapters and recomputation by the planner's count, which is held to PyTorch's own."""
    monkeypatch.chdir(root)
    adapters = {"use_lora": True, "lora_rank": 8}
    flags = {
        "full": {}, "frozen": {"freeze_vision_model": "vision"}, "lora": adapters,
        "qlora": {**adapters, "use_qlora": True},
    }[method]  # fmt: skip
    config = {
        "vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }  # fmt: skip
    work = example_work(geometry_from_config(config), tokens=100, tiles=2, labels=5)
    chosen = settings(bf16=True, use_flash_attention=True, **flags)
    counting = utilisation_of(chosen, config, "NVIDIA A100-SXM4-80GB", devices=8)
    assert counting.peak_tflops == 312
    assert counting.peak_source.startswith("a100-80gb: NVIDIA A100")
    expected = training_flops(geometry_from_config(config), work, method, 8, flash=True, recompute=1.0)
    seen = counting.of(work, 0.5)
    assert seen["mfu"] == pytest.approx(expected.model / (0.5 * 8 * 312e12))
    assert seen["hfu"] == pytest.approx(expected.hardware / (0.5 * 8 * 312e12))
    unknown = utilisation_of(chosen, config, "NVIDIA GeForce GTX 1080", devices=1)
    assert (unknown.peak_tflops, unknown.of(work, 0.5)["mfu"]) == (None, None)


def test_own_hardware_file_gives_the_peak(root, monkeypatch, tmp_path):
    monkeypatch.chdir(root)
    own = tmp_path / "own.yaml"
    own.write_text(
        "gtx1080: {title: GTX 1080, kind: cuda, bf16: false, flash_attention: false, quantisation: false,"
        " peak_tflops: {fp16: 9}, source: its datasheet}\n"
    )
    config = {
        "vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }  # fmt: skip
    found = utilisation_of(settings(), config, "NVIDIA GeForce GTX 1080", 1, ["config/hardware.yaml", str(own)])
    assert (found.peak_tflops, found.peak_source) == (9, "gtx1080: its datasheet")
    assert isinstance(found, Utilisation)


def test_facts_of_a_gpu_machine(monkeypatch, tmp_path):
    """nvidia-smi and InfiniBand ports as a GPU machine shows them."""
    (tmp_path / "nvidia-smi").write_text(SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    properties = types.SimpleNamespace(uuid="42")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert machine.gpu_facts(torch.device("cuda")) == {"power_limit_w": 400.0, "driver": "550.54.15"}
    properties.uuid = "GPU-77"
    assert machine.gpu_facts(torch.device("cuda")) == {"power_limit_w": None, "driver": None}
    assert machine.interconnect() == "NV12"
    for port in range(8):
        rate = tmp_path / f"mlx5_{port}" / "ports" / "1" / "rate"
        rate.parent.mkdir(parents=True)
        rate.write_text("200 Gb/sec (4X HDR)\n")
    monkeypatch.setattr(machine, "INFINIBAND", tmp_path)
    assert machine.network() == "8 x 200 Gb/sec (4X HDR)"


def test_what_rocm_does_not_say_is_null(monkeypatch, tmp_path):
    """A ROCm build, beside an nvidia-smi of other devices: its GPUs have no such uuid, and RCCL need not be built in."""
    (tmp_path / "nvidia-smi").write_text(SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(torch.version, "hip", "6.4.43482")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "AMD Instinct MI300X")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace())
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    mark = machine.fingerprint(torch.device("cuda"), tmp_path)
    assert (mark["devices"], mark["rocm"]) == ({"AMD Instinct MI300X": 1}, "6.4.43482")
    assert [mark[name] for name in ("power_limit_w", "driver", "interconnect", "nccl")] == [None] * 4


def test_revision_of_the_data(tmp_path):
    assert machine.dataset_revision(tmp_path) is None
    source = {"train": {"format": "cauldron", "url": "hf://x", "revision": "abc", "sha256": "12", "files": 1}}
    (tmp_path / "dataset.json").write_text(json.dumps({"source": source}))
    assert machine.dataset_revision(tmp_path) == {"train": {"url": "hf://x", "revision": "abc", "sha256": "12"}}
