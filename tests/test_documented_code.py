"""The programs shown in the README and in the documentation run as written."""

import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "docs/getting_started.md",
        pytest.param("docs/transport.md", marks=pytest.mark.slow),  # a minute; the tests of transport do the same
    ],
)
def test_python_blocks_run(page: str, tmp_path: pathlib.Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(encoding="utf-8"), re.M | re.S)
    assert blocks
    program = "\n".join(blocks)
    run = subprocess.run([sys.executable, "-W", "error", "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "nan" not in run.stdout
