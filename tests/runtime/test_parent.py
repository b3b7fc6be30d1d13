"""A process with a lifeline ends with the one that gave it, also where the system does not report that."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from irgdistill.runtime.parent import PARENT, end_with_parent, lifeline

CHILD = """
import os, sys, time
from irgdistill.runtime import parent
parent.POLL = 0.05
sys.platform = sys.argv[1]
parent.end_with_parent()
assert parent.PARENT not in os.environ
print("alive", flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no POSIX system")
@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_a_child_ends_with_its_parent(platform: str) -> None:
    """The parent, a Python of its own, is killed; the pipe ends when nobody holds it any more, the child included."""
    parent = (
        "import os, subprocess, sys, time\n"
        f"env = {{**os.environ, {PARENT!r}: str(os.getpid())}}\n"
        f"subprocess.Popen([sys.executable, '-c', {CHILD!r}, {platform!r}], env=env)\n"
        "time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "alive\n"
        process.kill()
        assert process.communicate(timeout=20) == ("", None)


def test_a_child_whose_parent_is_gone_before_it_asks_ends_at_once() -> None:
    words = [sys.executable, "-c", CHILD, "linux"]
    child = subprocess.run(words, env={**os.environ, PARENT: str(os.getpid() + 1)}, capture_output=True, timeout=20)
    assert child.returncode == -signal.SIGKILL and child.stdout == b""


def test_without_a_lifeline_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PARENT, raising=False)
    end_with_parent()
    assert lifeline() == {PARENT: str(os.getpid())}
