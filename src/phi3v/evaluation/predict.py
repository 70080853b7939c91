"""One question about one's own pictures."""

from __future__ import annotations

from pathlib import Path

from phi3v.data.conversations import DataError, Turn, prompt_text, text_problem
from phi3v.data.images import open_rgb
from phi3v.evaluation.generate import end_token_ids, generate
from phi3v.evaluation.run import load_model
from phi3v.evaluation.weights import folder_of
from phi3v.model.runtime import compute_device
from phi3v.settings import PredictSettings


def predict(settings: PredictSettings) -> str:
    """The answer of a checkpoint or adapter.

    Raises DataError: no such picture, not a picture, control tokens in the question; SettingsError: the device
    cannot do it (phi3v.model.runtime.compute_device).
    """
    if problem := text_problem(settings.question):
        raise DataError(f"--question: got {settings.question!r}; expected {problem}")
    pictures = []
    for name in settings.image:
        if not Path(name).is_file():
            raise DataError(f"--image {name}: no such file; expected a picture")
        pictures.append(open_rgb(Path(name), name))
    device = compute_device(settings)
    model, processor = load_model(folder_of(settings.model_name_or_path), settings, device)
    # The marks of the pictures stand in front of the question, as in training.
    turn = Turn(tuple(settings.image), settings.question, "")
    (answer,) = generate(
        model, processor, [prompt_text(turn)], [pictures],
        num_crops=settings.num_crops or processor.image_processor.num_crops, max_new_tokens=settings.max_new_tokens,
        end_tokens=end_token_ids(processor.tokenizer, model.generation_config),
    )  # fmt: skip
    return answer.text
