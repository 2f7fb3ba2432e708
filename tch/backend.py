"""The build backend: maturin, with the Python that runs it as the one that torch-sys asks for its torch.

torch-sys' build script runs `python` where VIRTUAL_ENV is set, else `python3`, whichever comes first in PATH.
Under `path/to/venv/bin/pip install .`, without the venv being active, that is another Python, which cannot
import the torch of pip's isolated build environment.
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
