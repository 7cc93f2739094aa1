"""Settings of the whole test run."""

from __future__ import annotations

import os

# Read when torch is imported, here and in the processes that tests start. The tensors of the tests
# are small: threads would spend their time waiting for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
