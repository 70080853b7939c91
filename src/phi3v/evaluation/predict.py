"""One question about your own pictures."""

from __future__ import annotations

from pathlib import Path

from phi3v.data.conversations import DataError, Turn, prompt_text, text_problem
from phi3v.data.pictures import open_rgb
from phi3v.evaluation.generate import Predictor, weights_folder
from phi3v.model.runtime import compute_device
from phi3v.settings import PredictSettings


def predict(settings: PredictSettings) -> str:
    """The answer of a checkpoint or adapter.

    Raises DataError: a missing picture, a file that is no picture, control tokens in the question; SettingsError: the device cannot do it
    (phi3v.model.runtime.compute_device).
    """
    if problem := text_problem(settings.question):
        raise DataError(f"--question: got {settings.question!r}; expected {problem}")
    for name in settings.image:
        if not Path(name).is_file():
            raise DataError(f"--image {name}: no such file; expected a picture")
    pictures = [open_rgb(Path(name), name) for name in settings.image]
    device = compute_device(settings)
    folder = weights_folder(settings.model_name_or_path)
    predictor = Predictor.load(folder, settings, device, settings.max_new_tokens or 64, settings.num_crops)
    # The picture marks stand in front of the question, as in training.
    prompt = prompt_text(Turn(tuple(settings.image), settings.question, ""))
    (answer,) = predictor.answer(predictor.prepare([prompt], [pictures]))
    return answer.text
