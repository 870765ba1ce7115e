"""Run celbo in a process of its own, forked from one that has imported everything: seconds faster than a new one.

Tests of imports, terminals, signals, and of variables that are read at import start processes of their own.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from functools import cache
from importlib import import_module
from pathlib import Path

_IMPORTED = [
    *("celbo.app.cli", "celbo.app.demo", "celbo.ask.mapping", "celbo.estimator", "celbo.kernels.cpu"),
    *("celbo.report.page", "celbo.runs.reporting", "celbo.runs.run_folder", "celbo.trials.curing"),
    *("jinja2", "matplotlib.backends.backend_agg", "matplotlib.figure", "sklearn.cluster", "sklearn.decomposition"),
    *("sklearn.linear_model", "sklearn.manifold", "sklearn.neighbors"),
]
_SECONDS = 300
"""A child that runs longer is ended by SIGALRM."""
CELBO = "from celbo.app.cli import main; main()"


def run_celbo(*arguments, code=CELBO, cwd=None):
    """Run a command of celbo, or a program with these arguments; return exit code, stdout and stderr."""
    server = _server()
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        request = {
            "arguments": ["celbo", *map(str, arguments)],
            "code": code,
            "folder": str(cwd or Path.cwd()),
            "environment": dict(os.environ),
            "streams": [str(out), str(err)],
        }
        server.stdin.write(f"{json.dumps(request)}\n")
        server.stdin.flush()
        answer = server.stdout.readline()
        assert answer, f"the server of tests/forked.py ended with {server.wait()}"
        return subprocess.CompletedProcess(arguments, int(answer), out.read_text(), err.read_text())


@cache
def _server():
    return subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _serve():
    """Fork a child for each request, and answer with its exit code; negative is a signal."""
    for name in _IMPORTED:
        import_module(name)  # and nothing is computed: threads do not live in a child
    for line in sys.stdin:
        child = os.fork()
        if not child:
            _answer(json.loads(line))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _answer(request):
    """Run the program of a request, and end this process."""
    code = 1
    signal.alarm(_SECONDS)
    try:
        for number, path in enumerate(request["streams"], start=1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(request["folder"])
        os.environ.clear()
        os.environ.update(request["environment"])
        import torch

        torch.set_num_threads(1)
        sys.argv = request["arguments"]
        exec(request["code"], {"__name__": "__main__"})
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except BaseException:  # noqa: BLE001 - this process ends here
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _serve()
