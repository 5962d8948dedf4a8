"""Someone who publishes on a Hub of one machine, see `fake_hub`, and loads from it."""

import json
import os
import subprocess
import sys
from pathlib import Path


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
    """Someone with a Hub, a home folder and a command line."""

    def __init__(self, hub, home: Path):
        self.hub = hub
        kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        self.environment = kept | {
            "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": "hf_token", "HF_HUB_DISABLE_XET": "1",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }  # fmt: skip

    def run(self, *arguments, **environment) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, *map(str, arguments)], env=self.environment | environment,
            capture_output=True, text=True, timeout=200,
        )  # fmt: skip

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
