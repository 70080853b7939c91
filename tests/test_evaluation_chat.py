"""The page of scripts/serve.py, in a browser, with two tiny models."""

import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from PIL import Image
from training_fixtures import ROOT, write_model

from phi3v.settings import ServeSettings


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [write_model(folder / name) for name in ("before", "after")]


@pytest.fixture(scope="module")
def address(models, tmp_path_factory):
    """Of the running page."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    before, after = models
    command = [
        sys.executable, "scripts/serve.py", "--model_name_or_path", after, "--base", before, "--fp32", "--port", port,
        "--max_new_tokens", 8, "--num_crops", 3,
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    log = (tmp_path_factory.mktemp("page") / "log").open("w+")
    process = subprocess.Popen([*map(str, command)], cwd=ROOT, env=environment, stdout=log, stderr=log)
    deadline = time.monotonic() + 120
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/_stcore/health", timeout=5).close()
            break
        except OSError:
            log.seek(0)
            assert process.poll() is None and time.monotonic() < deadline, log.read()
            time.sleep(0.2)
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait(20)
    log.close()


def test_a_picture_a_question_and_a_second_turn(browser, address, tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    def count(selector: str) -> int:
        return len(browser.find_elements(By.CSS_SELECTOR, selector))

    def ask(question: str, turns: int) -> None:
        box = browser.find_element(By.CSS_SELECTOR, "[data-testid=stChatInputTextArea]")
        box.send_keys(question, Keys.ENTER)
        # Per turn one message of the visitor and one of each model.
        WebDriverWait(browser, 120).until(lambda _: count("[data-testid=stChatMessage]") == 3 * turns)
        WebDriverWait(browser, 120).until(lambda _: not count("[data-testid=stSpinner]"))

    Image.new("RGB", (60, 40), (200, 30, 30)).save(tmp_path / "square.png")
    browser.get(address)
    WebDriverWait(browser, 180).until(lambda _: count("[data-testid=stChatInputTextArea]"))
    captions = [element.text for element in browser.find_elements(By.CSS_SELECTOR, "[data-testid=stCaptionContainer]")]
    assert [("before" in text, "after" in text) for text in captions] == [(True, False), (False, True)]
    assert all("3 tiles" in text and "fp32 on cpu" in text for text in captions)
    browser.find_element(By.CSS_SELECTOR, "[data-testid=stChatInput] input[type=file]").send_keys(
        str(tmp_path / "square.png")
    )
    WebDriverWait(browser, 60).until(
        lambda _: "square.png" in browser.find_element(By.CSS_SELECTOR, "[data-testid=stChatInput]").text
    )
    ask("Which colour is the square ?", 1)
    WebDriverWait(browser, 60).until(lambda _: count("[data-testid=stChatMessage] img"))
    ask("And now ?", 2)
    assert not browser.find_elements(By.CSS_SELECTOR, "[data-testid=stException], [data-testid=stAlert]")
    browser.save_screenshot(str(tmp_path / "page.png"))
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_each_model_goes_on_from_its_own_answers(models, tmp_path):
    from phi3v.evaluation.chat import ChatTurn, conversation
    from phi3v.model import Phi3VProcessor

    Image.new("RGB", (20, 10)).save(tmp_path / "a.png")
    picture = (tmp_path / "a.png").read_bytes()
    turns = [
        ChatTurn(question="one ?", pictures=[picture], answers=["left", "right"]),
        ChatTurn(question="two ?", pictures=[picture, picture], answers=[]),
    ]
    prompt, pictures = conversation(Phi3VProcessor.from_pretrained(models[0]), turns, 1)
    assert prompt == (
        "<|user|>\n<|image_1|>\none ?<|end|>\n<|assistant|>\nright<|end|>\n"
        "<|user|>\n<|image_2|>\n<|image_3|>\ntwo ?<|end|>\n<|assistant|>\n"
    )
    assert [image.size for image in pictures] == [(20, 10)] * 3


def test_it_listens_on_this_machine_alone():
    assert ServeSettings(model_name_or_path="m").host == "127.0.0.1"
