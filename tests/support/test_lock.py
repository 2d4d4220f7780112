# SPDX-License-Identifier: Apache-2.0
import os
import signal
import subprocess
import sys

import pytest

from ahcq_plugin.support.lock import LockedError, locked

HOLD = """
import sys, time
from ahcq_plugin.support.lock import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""
TAKE = """
import pathlib, sys
from ahcq_plugin.support.lock import locked
count = pathlib.Path(sys.argv[1], "count")
for _ in range(60):
    try:
        with locked(sys.argv[1]):
            count.write_text(str(int(count.read_text()) + 1))
            print("took")
    except ValueError:
        pass
"""


def start(code, folder):
    return subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True)


def test_the_second_is_told_who_is_first_and_a_killed_one_leaves_nothing_in_the_way(tmp_path):
    folder = tmp_path / "work" / "run"
    with start(HOLD, folder) as holder:
        assert holder.stdout.readline() == "held\n"
        told = f"{folder} is in use by process {holder.pid} on .*: wait until it ends"
        with pytest.raises(LockedError, match=told), locked(folder):
            pytest.fail("two have the lock")
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with locked(folder):
        assert os.listdir(folder) == [".lock"]
    assert os.listdir(folder) == []


def test_it_is_let_go_when_the_body_raises(tmp_path):
    with pytest.raises(KeyError), locked(tmp_path):
        raise KeyError
    with locked(tmp_path):
        pass


def test_never_two_at_a_time(tmp_path):
    (tmp_path / "count").write_text("0")
    takers = [start(TAKE, tmp_path) for _ in range(3)]
    took = sum(len(taker.communicate()[0].split()) for taker in takers)
    assert int((tmp_path / "count").read_text()) == took > 0
