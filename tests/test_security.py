"""The source holds no way in for data that runs as code, and no way out for tokens."""

import ast
import os
import subprocess
import sys

import pytest
import yaml

from phi3v.settings import SettingsError, load_run

UNSAFE_IMPORTS = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
UNSAFE_CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput",
    "yaml.unsafe_load", "yaml.full_load", "tempfile.mktemp", "torch.hub.load", "pandas.read_pickle",
}  # fmt: skip
UNPACKERS = {"extractall", "extract", "unpack_archive"}
UNPACKING = {"src/phi3v/data/rows.py"}
"""Where archives are opened, path by path (tests/test_data_sources.py shows what is refused)."""


def findings(name, text):
    """Each unsafe construct of a Python source, as `name:line: what`."""
    for node in ast.walk(ast.parse(text)):
        at = f"{name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            for module in modules:
                if module.split(".")[0] in UNSAFE_IMPORTS:
                    yield f"{at}: imports {module}"
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            given = {keyword.arg: keyword.value for keyword in node.keywords}

            def says(option, value, given=given):
                return isinstance(given.get(option), ast.Constant) and given[option].value is value

            if called in UNSAFE_CALLS:
                yield f"{at}: calls {called}"
            if "shell" in given and not says("shell", False):
                yield f"{at}: {called} with shell="
            if "trust_remote_code" in given and not says("trust_remote_code", False):
                yield f"{at}: {called} with trust_remote_code"
            if called == "torch.load" and not says("weights_only", True):
                yield f"{at}: torch.load without weights_only=True"
            if called in ("np.load", "numpy.load") and "allow_pickle" in given and not says("allow_pickle", False):
                yield f"{at}: {called} with allow_pickle"
            if called == "yaml.load" and "Loader" not in given:
                yield f"{at}: yaml.load without a loader"
            if called.split(".")[-1] in UNPACKERS and name not in UNPACKING:
                yield f"{at}: {called} outside {', '.join(UNPACKING)}"


def sources(root):
    for folder in ("src", "scripts"):
        for path in sorted((root / folder).rglob("*.py")):
            yield str(path.relative_to(root)), path.read_text()


def test_no_source_runs_data_as_code(root):
    found = [finding for name, text in sources(root) for finding in findings(name, text)]
    assert found == []
    assert len(list(sources(root))) > 80


@pytest.mark.parametrize(
    "text",
    [
        "import pickle", "from dill import loads", "eval(text)", "os.system(line)", "subprocess.run(line, shell=True)",
        "subprocess.run(line, shell=given)", "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=trust)", "torch.load(path)", "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)", "yaml.load(text)", "tar.extractall(folder)", "shutil.unpack_archive(path)",
    ],
)  # fmt: skip
def test_the_scan_sees(text):
    assert len(list(findings("x.py", text))) == 1


@pytest.mark.parametrize(
    "text",
    [
        "torch.load(path, weights_only=True)", "subprocess.run([name], shell=False)", "model.eval()", "np.load(path, allow_pickle=False)",
        "AutoModel.from_pretrained(name, trust_remote_code=False)", "re.compile(text)",
    ],
)  # fmt: skip
def test_the_scan_lets_pass(text):
    assert list(findings("x.py", text)) == []


def test_names_that_reach_a_shell_line_are_plain(root):
    """Rows, datasets and models come from tables and become words of commands and paths."""
    published = yaml.safe_load((root / "config/config.yaml").read_text())
    for name in ("x; touch y", "$(id)", "a b", "../x", "-rf"):
        with pytest.raises(SettingsError, match="name"):
            load_run(published | {"name": name}, root)
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", "-n", "--config", "name='$(id)'"],
        cwd=root, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode != 0
    assert "nothing was started" in done.stdout + done.stderr


def test_a_token_is_not_shown_by_a_download_that_fails(root, tmp_path):
    """HF_TOKEN is neither on the screen nor in a file; a URL with a password in it is refused unread."""
    secrets = ("hf_" + "zYxWvU98765", "open-sesame")
    (tmp_path / "models.yaml").write_text(
        f"one: {{title: one, url: 'hf:example/none', licence: MIT}}\n"
        f"two: {{title: two, url: 'http://me:{secrets[1]}@127.0.0.1:9/model.tar.gz', licence: MIT}}\n"
    )
    environment = {**os.environ, "HF_TOKEN": secrets[0], "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    environment["PHI3V_DOWNLOAD_ATTEMPTS"] = "1"
    for model in ("one", "two"):
        command = ["scripts/download.py", "--models", str(tmp_path / "models.yaml"), "--model", model]
        done = subprocess.run(
            [sys.executable, *command, "--output_dir", str(tmp_path / model)],
            cwd=root, capture_output=True, text=True, check=False, timeout=300, env={**environment, "PYTHONPATH": str(root / "src")},
        )  # fmt: skip
        assert done.returncode != 0
        texts = [done.stdout, done.stderr]
        texts += [path.read_text(errors="replace") for path in (tmp_path / model).rglob("*") if path.is_file()]
        for secret in secrets:
            assert not [text for text in texts if secret in text], f"{model}: {texts}"
    assert "got 'http://***@127.0.0.1:9/model.tar.gz': expected a URL without user and password" in done.stderr
