"""The planner on the demo: the tiny model's sizes, and its speed rows beside the figures measured (docs/measurements.md)."""

import re

import pytest

from phi3v.planning.fits import setup_of
from phi3v.planning.geometry import geometry_from_config, parameters, quantised_parameters
from phi3v.planning.step_time import step_time
from phi3v.settings import load_run


@pytest.fixture(scope="module")
def demo(root):
    return load_run(root / "config/demo.yaml", root)


def test_geometry_of_the_demos_models_is_the_tiny_models(demo, tmp_path):
    """The same layer sizes as the checkpoint that the demo makes; only the vocabulary depends on its texts."""
    torch = pytest.importorskip("torch")
    from phi3v.demo.tiny import build_tiny
    from phi3v.model import Phi3VForCausalLM

    model = Phi3VForCausalLM.from_pretrained(build_tiny(tmp_path, ["some words", "some words"], **demo.demo.geometry))
    real = geometry_from_config(model.config.to_dict())
    for name in ("phi3-vision", "phi35-vision"):
        planned = demo.models[name].geometry
        assert planned.model_copy(update={"vocab_size": real.vocab_size}) == real
    assert sum(parameters(real).values()) == sum(weight.numel() for weight in model.parameters())
    linears = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    assert quantised_parameters(real) == sum(linear.weight.numel() for linear in linears)


def test_measured_demo_rows_and_their_predictions(root, demo):
    """The table's predictions are what the planner says, and put the rows in the order that was measured."""
    # What was measured: two processes, three layers, and square slips.
    values = demo.settings.model_dump() | {"hardware": [{"device": "cpu", "per_node": 2, "stand_in": True}]}
    values |= {"rows": {"accuracy": [], "speed": [job.row.row for job in demo.speed]}}
    demo = load_run(values, root)
    model, data = demo.models["phi3-vision"], demo.datasets["docvqa"]
    geometry = model.geometry.model_copy(update={"num_hidden_layers": 3})
    work = data.workload.model_copy(update={"shapes": [(112, 112, 1.0)], "text": 28})
    demo.models["phi3-vision"] = model.model_copy(update={"geometry": geometry})
    demo.datasets["docvqa"] = data.model_copy(update={"workload": work})
    text = (root / "docs/measurements.md").read_text(encoding="utf-8")
    section = text[text.index("## Against the demo") :]
    found = re.findall(
        r"^\| (phi3-\S+) \| [\d.]+ \| [\d.]+ % \| ([\d.]+) \| ([\d.]+) \| ([+-][\d.]+) % \|$", section, re.M
    )
    assert {row for row, *_ in found} == {job.row.row for job in demo.speed}
    measured, predicted = {}, {}
    for row, computing, plan, error in found:
        setup, _ = setup_of(demo, demo.job(row), root / "nowhere")
        predicted[row] = setup.batch_size / step_time(setup).seconds
        measured[row] = float(computing)
        assert float(plan) == pytest.approx(predicted[row], rel=0.005), row
        assert float(error) == pytest.approx(100 * (predicted[row] / measured[row] - 1), abs=0.6), row
    assert sorted(measured, key=measured.get) == sorted(predicted, key=predicted.get)
    # One figure was calibrated on the first row; the others are predictions.
    assert predicted[found[0][0]] == pytest.approx(measured[found[0][0]], rel=0.02)
