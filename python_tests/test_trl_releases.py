"""The older release of TRL that the extra allows, in a folder of its own: its own head is Triton's alone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl")
pytest.importorskip("triton", reason="TRL 1.15's own head, with which ours is compared, needs Triton")

from grpo_kernels.integrations.trl.checks import TESTED

TESTS = Path(__file__).parent
RELEASE = TESTED.split()[0]
#: A trainer of each loss of ``make test``, the others, and what is there before and after. AsyncGRPO needs aiohttp.
SELECTED = (
    "(stock and not installed) or changes_no_other or built_before or quantised or refused or nested or somebody "
    "or newer_layout or kept_ids or signature_of or with_the_mask or without_the_mask or both_places or alias"
)
FILES = ("drop_in", "others", "guards", "newer", "async_grpo")


@pytest.mark.early
@pytest.mark.full
def test_the_oldest_release_is_served(tmp_path: Path) -> None:
    """In Triton's interpreter, in which TRL 1.15 runs without a GPU."""
    install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--target", str(tmp_path)]
    done = subprocess.run([sys.executable, *install, f"trl=={RELEASE}"], capture_output=True, text=True)
    assert done.returncode == 0, f"TRL {RELEASE} could not be installed:\n{done.stdout}{done.stderr}"
    path = os.pathsep.join([str(tmp_path), str(TESTS.parent), str(TESTS)])
    environment = dict(os.environ, PYTHONPATH=path, TRITON_INTERPRET="1")
    version = [sys.executable, "-W", "ignore", "-c", "import trl; print(trl.__version__)"]
    told = subprocess.run(version, env=environment, capture_output=True, text=True, check=True).stdout
    assert told.strip() == RELEASE
    files = [f"{TESTS}/test_trl_{name}.py" for name in FILES]
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not full", "-k", SELECTED]
    command = [sys.executable, "-m", "pytest", *options, *files]
    done = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    counted = re.search(r"(\d+) passed", done.stdout)
    assert counted and int(counted[1]) >= 30, done.stdout
