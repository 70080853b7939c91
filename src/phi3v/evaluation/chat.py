"""The page of scripts/serve.py: questions about pictures over several turns, with one or two models.

Streamlit runs this file again for each input. Models stay loaded, and each visitor's turns stay in the session.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

import streamlit
from PIL import Image

from phi3v.data.conversations import DataError, text_problem
from phi3v.data.pictures import open_rgb, read_pictures
from phi3v.evaluation.generate import Predictor, weights_folder
from phi3v.model import Phi3VProcessor
from phi3v.model.runtime import compute_device
from phi3v.settings import Compute, ServeSettings, SettingsError

PICTURES = ["png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff", "avif", "heic", "pdf"]


class ChatTurn(TypedDict):
    """A question, its encoded pictures, and the answers by position of the model."""

    question: str
    pictures: list[bytes]
    answers: list[str]


def conversation(processor: Phi3VProcessor, turns: Sequence[ChatTurn], model: int) -> tuple[str, list[Image.Image]]:
    """The prompt of the last turn after a model's own earlier answers, and all pictures. Pictures come before a turn's
    text."""
    messages, pictures = [], []
    for turn in turns:
        marks = ""
        for data in turn["pictures"]:
            pictures.append(open_rgb(data, "picture"))
            marks += f"<|image_{len(pictures)}|>\n"
        messages.append({"role": "user", "content": marks + turn["question"]})
        if len(turn["answers"]) > model:
            messages.append({"role": "assistant", "content": turn["answers"][model]})
    return str(processor.apply_chat_template(messages, add_generation_prompt=True)), pictures


@streamlit.cache_resource(show_spinner="Loading the model …")
def loaded(settings_json: str) -> tuple[list[Predictor], threading.Lock]:
    """One or two models, and a lock that allows one answer at a time."""
    settings = ServeSettings.model_validate_json(settings_json)
    compute = Compute.model_validate(settings.model_dump(include=set(Compute.model_fields)))
    folders = [weights_folder(name) for name in (settings.base, settings.model_name_or_path) if name]
    device = compute_device(compute)
    return [
        Predictor.load(folder, compute, device, settings.max_new_tokens, settings.num_crops) for folder in folders
    ], threading.Lock()


def show(turn: ChatTurn, names: Sequence[str]) -> None:
    """Draws a turn: the question with its pictures, and the answers in columns."""
    with streamlit.chat_message("user"):
        if turn["pictures"]:
            streamlit.image(turn["pictures"], width=240)
        streamlit.text(turn["question"])
    if turn["answers"]:
        columns = streamlit.columns(len(names))
        for column, name, answer in zip(columns, names, turn["answers"], strict=True):
            with column, streamlit.chat_message("assistant"):
                if len(names) > 1:
                    streamlit.caption(name)
                streamlit.text(answer)


def page(settings: ServeSettings) -> None:
    """Draws the page, and answers a new question."""
    names = [name for name in (settings.base, settings.model_name_or_path) if name]
    streamlit.set_page_config(page_title=f"phi3v: {Path(names[-1]).name}", layout="wide")
    streamlit.title("Ask a model about pictures")
    try:
        models, lock = loaded(settings.model_dump_json())
    except (SettingsError, DataError, ValueError, OSError) as error:
        streamlit.error(str(error))
        return
    for name, model in zip(names, models, strict=True):
        streamlit.caption(
            f"{name} · at most {model.num_crops} tiles per picture (num_crops) · {settings.dtype} on "
            f"{model.model.device.type}"
        )
    turns: list[ChatTurn] = streamlit.session_state.setdefault("turns", [])
    if turns and streamlit.button("New conversation"):
        turns.clear()
        streamlit.rerun()
    for turn in turns:
        show(turn, names)
    question = streamlit.chat_input("Question; attach pictures with +", accept_file="multiple", file_type=PICTURES)
    if not question:
        return
    if problem := text_problem(question.text):
        streamlit.error(f"got {question.text!r}; expected {problem}")
        return
    try:
        pictures = [one.data for file in question.files for one in read_pictures(file.getvalue(), file.name)]
    except DataError as error:
        streamlit.error(str(error))
        return
    turn = ChatTurn(question=question.text, pictures=pictures, answers=[])
    show(turn, names)
    with streamlit.spinner("Answering …"), lock:
        answers = []
        for place, model in enumerate(models):
            prompt, images = conversation(model.processor, [*turns, turn], place)
            answers.append(model.answer(model.prepare([prompt], [images]))[0].prediction)
    turns.append({**turn, "answers": answers})
    streamlit.rerun()


if __name__ == "__main__":
    page(ServeSettings.model_validate_json(sys.argv[1]))
