"""The build backend: maturin, with the running Python first in PATH.

torch-sys builds against the torch of `python` where VIRTUAL_ENV is set, else of `python3`. Under
`path/to/venv/bin/pip install ./tch`, without an active venv, that is another Python, which has no
access to the torch of pip's isolated build environment.
"""

import os
import sys
from pathlib import Path

from maturin import (  # noqa: F401  (the hooks that pip calls)
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
os.environ.pop("VIRTUAL_ENV", None)
