"""Someone who publishes on a Hub of one machine, see `fake_hub`, and loads from it."""

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from tempfile import TemporaryDirectory


LONGEST = 200  # seconds that a command may take
REFUSE = """
import json, sys
from typer.testing import CliRunner
from llamagen_cli import app

for arguments in json.loads(sys.argv[1]):
    result = CliRunner().invoke(app, ["publish", *arguments])
    assert type(result.exception) is SystemExit and result.exit_code == 1, (arguments, result.exception)
    print(json.dumps(result.stderr))
"""


class User:
    """Someone with a Hub, a home folder and a command line.

    Each command has a process of its own. As the Hub's address and the home folder are read at import, they stay the
    same, and the process is forked from one that has imported everything.
    """

    def __init__(self, hub, home: Path):
        self.hub, self.home = hub, home
        kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        self.environment = kept | {
            "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": "hf_token", "HF_HUB_DISABLE_XET": "1",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }  # fmt: skip
        self.python = subprocess.Popen(
            [sys.executable, __file__], env=self.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start_over(self) -> None:
        """As on a new machine, and with an empty Hub, which writes with a token alone."""
        shutil.rmtree(self.home, ignore_errors=True)
        self.hub.clear()
        self.hub.needs_token = True

    def leave(self) -> None:
        self.python.communicate()

    def run(self, *arguments, **environment) -> subprocess.CompletedProcess:
        """Python with some arguments; with another environment in a process that imports everything anew."""
        words = [str(argument) for argument in arguments]
        if environment:
            return subprocess.run([sys.executable, *words], env=self.environment | environment,
                                  capture_output=True, text=True, timeout=LONGEST)  # fmt: skip
        with TemporaryDirectory() as folder:
            self.python.stdin.write(json.dumps([folder, *words]) + "\n")
            self.python.stdin.flush()
            code = int(self.python.stdout.readline())
            output = [Path(folder, name).read_text() for name in ("stdout", "stderr")]
        return subprocess.CompletedProcess(words, code, *output)

    def publish(self, *arguments, **environment) -> str:
        result = self.run("-m", "llamagen_cli", "publish", *arguments, **environment)
        assert result.returncode == 0, result.stderr[-2000:]
        return result.stdout

    def refusal(self, *arguments, **environment) -> str:
        result = self.run("-m", "llamagen_cli", "publish", *arguments, **environment)
        assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr[-2000:]
        return only_error(result.stderr)

    def refusals(self, *commands: tuple) -> list[str]:
        """As `refusal`, of several commands that share one process."""
        result = self.run("-c", REFUSE, json.dumps([[str(argument) for argument in command] for command in commands]))
        assert result.returncode == 0, result.stderr[-2000:]
        return [only_error(json.loads(line)) for line in result.stdout.splitlines()]

    def codes(self, script, *arguments, **environment) -> list:
        result = self.run("-c", script, *arguments, **environment)
        assert result.returncode == 0, result.stderr[-2000:]
        return json.loads(result.stdout.splitlines()[-1])


def only_error(stderr: str) -> str:
    (error,) = [line for line in stderr.splitlines() if line.startswith("Error: ")]
    return error


def serve() -> None:
    """Import everything; then for each line of input fork, run what it says, and print the exit code."""
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import transformers.models.t5.modeling_t5  # noqa: F401

    import llamagen_cli  # noqa: F401
    import llamagen_hf.llamagen.training.codes  # noqa: F401
    import llamagen_hf.publishing.publish  # noqa: F401

    for line in sys.stdin:
        folder, *words = json.loads(line)
        process = os.fork()
        if process == 0:
            os._exit(run_here(folder, words))
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)


def run_here(folder: str, words: list[str]) -> int:
    """What `python -m MODULE` or `python -c CODE` does."""
    signal.alarm(LONGEST)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT), number)
    kind, code, *arguments = words
    sys.argv = [code if kind == "-m" else kind, *arguments]
    status = 0
    try:
        if kind == "-m":
            runpy.run_module(code, run_name="__main__", alter_sys=True)
        else:
            exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as exit:
        status = exit.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status


if __name__ == "__main__":
    serve()
