"""Being told to save and leave: who hears it, and how much time there is."""

from __future__ import annotations

import os
import signal

import pytest

from phi3v.training.launch import StopRequest, parents_command, seconds_to_save

UNDER = {"TORCHELASTIC_RUN_ID": "x"}


@pytest.mark.parametrize(
    ("command", "environment", "seconds"),
    [
        (["python", "finetune.py"], {}, None),
        (["torchrun", "--standalone", "finetune.py"], UNDER, 30),
        (["torchrun", "--shutdown-timeout=900", "finetune.py"], UNDER | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5"}, 900),
        (["torchrun", "--shutdown_timeout", "60", "finetune.py"], UNDER, 60),
        (["torchrun", "finetune.py"], UNDER | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5"}, 5),
    ],
)
def test_the_time_that_torchrun_gives(command, environment, seconds):
    assert seconds_to_save(command, environment) == seconds


def test_torchs_default_is_what_is_assumed():
    from torch.distributed.launcher.api import LaunchConfig

    config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=1)
    assert config.shutdown_timeout == seconds_to_save([], UNDER)


def test_the_parents_command_is_read():
    assert any("py" in word or "sh" in word for word in parents_command())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_noted_and_the_handler_put_back(number):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.asked
        os.kill(os.getpid(), number)
        assert stop.asked
        assert stop.signal == number.name
    assert signal.getsignal(number) == before


def test_a_signal_after_an_error_does_not_keep_it_from_being_reported():
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(RuntimeError, match="lost"), StopRequest():
            raise RuntimeError("lost")
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)
