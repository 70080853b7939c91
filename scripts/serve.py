"""Serve a web page on this machine for questions about pictures, over several turns.

    python scripts/serve.py --model_name_or_path results/NAME/train/ROW/final --bf16
    python scripts/serve.py --model_name_or_path results/NAME/train/ROW/final --base results/models/KEY --bf16

With --base, both models answer, side by side. The page only accepts connections from this machine. From elsewhere, use
a tunnel: `ssh -L 8501:127.0.0.1:8501 HOST`. Requires the extra `chat` (pip install -e '.[chat]'). For programs that
use OpenAI's protocol, serve the model with vLLM: docs/how-to/serve.md.
"""

import os
import sys
from importlib.util import find_spec

from phi3v.settings import ServeSettings, SettingsError, parse, run_script


def main() -> None:
    """Parses the command line, and replaces this process by Streamlit."""
    settings = parse(ServeSettings, __doc__)
    found = find_spec("phi3v.evaluation.chat")
    if find_spec("streamlit") is None or found is None or found.origin is None:
        raise SettingsError("streamlit is not installed; run `pip install -e '.[chat]'`")
    options = {
        "server.address": settings.host, "server.port": settings.port, "server.headless": "true",
        "browser.gatherUsageStats": "false", "server.fileWatcherType": "none", "client.toolbarMode": "minimal",
    }  # fmt: skip
    flags = [f"--{name}={value}" for name, value in options.items()]
    command = [sys.executable, "-m", "streamlit", "run", found.origin, *flags, "--", settings.model_dump_json()]
    os.execv(sys.executable, command)  # noqa: S606 - no shell is wanted


if __name__ == "__main__":
    run_script(main)
