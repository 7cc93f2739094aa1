"""Settings of the whole test run."""

from __future__ import annotations

import os

# Read when torch is imported, here and in the processes that tests start. The tensors of the tests
# are small: threads would spend their time waiting for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Tracking has tests of its own; everywhere else it would only cost time.
os.environ.setdefault("GRADBENCH_TRACKING_URI", "none")
