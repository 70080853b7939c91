"""A GPU that this build of PyTorch has no kernels for is refused before anything is loaded onto it."""

import pytest

torch = pytest.importorskip("torch")

from phi3v.evaluation import predict as prediction  # noqa: E402
from phi3v.evaluation import processes  # noqa: E402
from phi3v.model.device import check_architecture  # noqa: E402
from phi3v.settings import FinetuneSettings, PredictSettings, SettingsError  # noqa: E402
from phi3v.training.job import build  # noqa: E402

CUDA_13 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]
CUDA_12_6 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]


@pytest.fixture
def machine(monkeypatch):
    """A function that gives this process a CUDA device and a build of PyTorch."""

    def make(name, capability, built):
        answers = {
            "is_available": True, "device_count": 1, "current_device": 0, "set_device": None, "get_device_name": name,
            "get_device_capability": capability, "get_arch_list": built,
        }  # fmt: skip
        for function, answer in answers.items():
            monkeypatch.setattr(torch.cuda, function, lambda *_, answer=answer: answer)

    return make


@pytest.mark.parametrize(
    ("capability", "built", "runs"),
    [
        ((7, 0), CUDA_13, False),
        ((7, 0), CUDA_12_6, True),
        ((7, 5), CUDA_13, True),
        ((8, 9), CUDA_13, True),  # a later minor of the same generation: sm_80, sm_86
        ((12, 0), CUDA_13, True),
        ((12, 0), CUDA_12_6, False),
        ((12, 0), [*CUDA_12_6, "compute_90"], True),  # PTX of a lower version
        ((7, 0), ["sm_80", "compute_75"], False),
        ((8, 0), ["sm_86"], False),
        ((10, 0), ["sm_90a"], False),
        ((9, 0), ["sm_90a"], True),
        ((10, 3), ["sm_100f"], True),  # f: the family
        ((7, 0), [], True),  # nothing known
    ],
)
def test_which_architectures_run(machine, capability, built, runs):
    machine("some GPU", capability, built)
    if runs:
        check_architecture(torch.device("cuda", 0))
    else:
        with pytest.raises(SettingsError, match="some GPU: compute capability"):
            check_architecture(torch.device("cuda", 0))
    check_architecture(torch.device("cpu"))


def test_the_error_names_device_build_and_what_to_install(machine):
    machine("Tesla V100-SXM2-32GB", (7, 0), CUDA_13)
    with pytest.raises(SettingsError) as caught:
        check_architecture(torch.device("cuda", 0))
    said = str(caught.value)
    assert said.startswith("Tesla V100-SXM2-32GB: compute capability 7.0, and PyTorch ")
    assert (
        "has kernels for sm_75, sm_80, sm_86, sm_90, sm_100, sm_120 only; expected a build of PyTorch that has sm_70"
        in said
    )
    assert "for an earlier CUDA (for V100 and older 12.6, docs/planner.md)" in said
    machine("NVIDIA GeForce RTX 5090", (12, 0), CUDA_12_6)
    with pytest.raises(SettingsError, match="has sm_120: a newer version, or the same one for a later CUDA"):
        check_architecture(torch.device("cuda", 0))


def test_training_evaluation_and_prediction_refuse_before_they_load_anything(machine, monkeypatch, tmp_path):
    """No data and no model are there: whoever looked for them first would complain of that."""
    machine("Tesla V100-SXM2-32GB", (7, 0), CUDA_13)
    monkeypatch.setattr("phi3v.training.job.prepare_process", lambda settings: None)
    refused = "Tesla V100-SXM2-32GB: compute capability 7.0"
    with pytest.raises(SettingsError, match=refused):
        build(FinetuneSettings(model_name_or_path="missing", output_dir=str(tmp_path), data_dir="missing"), tmp_path)
    with pytest.raises(SettingsError, match=refused):
        processes.join()
    with pytest.raises(SettingsError, match=refused):
        prediction.predict(PredictSettings(model_name_or_path="missing", question="What?"))
