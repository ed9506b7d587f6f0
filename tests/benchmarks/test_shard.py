"""What benchmarks/shard.py measures of a command."""

import sys
from pathlib import Path

import pytest

from benchmarks.sharding.measured import measure

CHILD = "import time; held = bytearray(80 << 20)\nwhile time.process_time() < 0.6: pass"
PARENT = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {CHILD!r}])"
FAILS = "import sys; print('no such thing'); sys.exit(3)"


def test_the_cpu_time_and_the_memory_of_a_commands_children_count_and_a_failure_is_an_error(tmp_path: Path) -> None:
    used = measure([sys.executable, "-c", PARENT], tmp_path / "log")
    own, child = used.peaks
    assert used.cpu >= 0.6 and used.seconds >= 0.6
    assert child > 80 > own
    with pytest.raises(RuntimeError, match="ended with 3: no such thing"):
        measure([sys.executable, "-c", FAILS], tmp_path / "log")
