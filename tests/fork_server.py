"""Python programs that start in milliseconds: forked from a process that has imported torch and bertstream.

A test of several ranks or of a kill starts many short processes, and in each of them these imports take longer than the
work. Forked processes share one seed of Python's string hashes, so a test whose law is that processes agree starts
fresh ones.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}

# A forked child leaves the loop and then runs as any program does: tracebacks, exit status, threads, atexit. Only the
# last step of Python's end is left out: to free all that was imported takes longer than most of these programs.
CODE = """
import atexit, gc, json, os, sys
from importlib import import_module

def leave():  # registered first, so called last
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)

atexit.register(leave)
for name in sys.argv[1:]:
    import_module(name)
gc.freeze()  # collecting would copy the pages of all that was imported

status = 0
for line in sys.stdin:
    request = json.loads(line)
    if "wait" in request:
        answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
    else:
        answer = os.fork()
    if answer == 0 and "program" in request:
        program = request["program"]
        sys.argv = ["-c", *request["arguments"]]
        for descriptor, path in ((0, os.devnull), (1, request["out"]), (2, request["errors"])):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), descriptor)
        break
    print(answer, flush=True)
else:
    leave()
status = 1
try:
    exec(program, {"__name__": "__main__"})
    status = 0
except SystemExit as end:
    status = end.code if isinstance(end.code, int) else int(end.code is not None)
    raise
"""


IN_FULL = "import __main__, atexit; atexit.unregister(__main__.leave)\n"
"""First line of a program that is about how Python ends: its end has that last step too."""


class ForkServer:
    """Starts programs; the process that it forks them from begins with the first one, in the repository's folder.

    Args:
        modules: names of what that process imports.
    """

    def __init__(self, *modules: str) -> None:
        self._modules = modules
        self._process: subprocess.Popen[str] | None = None
        self._folder = tempfile.TemporaryDirectory()
        self._started: list[Program] = []

    def start(self, program: str, *arguments: str) -> Program:
        """Run the source of a program, with `arguments` in its `sys.argv`."""
        if self._process is None:
            command = [sys.executable, "-c", CODE, *self._modules]
            environment = os.environ | ENVIRONMENT
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
            )
        out, errors = (Path(self._folder.name, f"{len(self._started)}-{name}") for name in ("out", "errors"))
        request = {"program": program, "arguments": arguments, "out": str(out), "errors": str(errors)}
        self._started.append(Program(self, self.ask(request), out, errors))
        return self._started[-1]

    def ask(self, request: object) -> int:
        """Send one request and return the answer."""
        assert self._process is not None and self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.communicate()
        self._folder.cleanup()


class Program:
    """A program that was started.

    Attributes:
        pid: of its process.
        out: the file of what it has printed on standard output so far; it may not exist yet.
    """

    def __init__(self, server: ForkServer, pid: int, out: Path, errors: Path) -> None:
        self.pid = pid
        self._server = server
        self.out, self._errors = out, errors

    def wait(self) -> int:
        """Wait for its end, and return its exit status."""
        return self._server.ask({"wait": self.pid})

    def finish(self) -> tuple[str, str, int]:
        """Wait for its end: what it printed on standard output and standard error, and its exit status."""
        status = self.wait()
        return self.out.read_text(), self._errors.read_text(), status


RANKS = ForkServer("torch.distributed", "bertstream.testing")
"""For programs with a fake encoder. `conftest.py` ends both."""

ENCODERS = ForkServer("torch.distributed", "bertstream.testing", "transformers.models.bert.modeling_bert")
"""For programs with a real one, or with torch's DistributedDataParallel, which imports half of torch."""
