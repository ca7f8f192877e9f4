"""The CUDA simulator, in a process of its own.

numba decides once, when it is imported, whether kernels are simulated, and other tests of the same process need the real
thing; so the simulated ones talk to a second process (`simulated`) in lines of JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


class Simulator:
    """``simulator("function", name=value, ...)`` calls a function of `simulated` and returns its answer."""

    def __init__(self) -> None:
        paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.kernels.simulated"],
            cwd=ROOT,
            env=os.environ | {"NUMBA_ENABLE_CUDASIM": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def answer(self, function: str, **arguments: Any) -> dict:
        """``{"result": ...}``, or ``{"error": class, "message": ...}`` where the function raised."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps({"function": function, "arguments": arguments}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, f"the simulator's process ended with {self.process.wait()}"
        return json.loads(line)

    def __call__(self, function: str, **arguments: Any) -> Any:
        answer = self.answer(function, **arguments)
        assert "error" not in answer, f"{answer['error']}: {answer['message']}"
        return answer["result"]

    def close(self) -> None:
        """End the process; it stops at the end of its input."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.stdout.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
