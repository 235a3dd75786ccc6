"""The C library keeps what was freed, unless the user said otherwise."""

import os
import subprocess
import sys

CODE = "from seqzoo.allocator import keep_freed_memory; print(keep_freed_memory())"
FAULTS = """
import resource, sys
import numpy as np
from seqzoo.allocator import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
def touch():  # 64 MiB, written and freed
    np.ones(2**23)
touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def python(code, *arguments, **variables):
    env = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=env | variables, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_pages_that_were_freed_are_used_again():
    assert int(python(FAULTS, "kept")) < int(python(FAULTS, "given back")) / 4


def test_the_user_decides():
    assert python(CODE, MALLOC_ARENA_MAX="2") == "False"
