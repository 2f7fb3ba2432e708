"""What `import sokd` loads: nothing slow beyond what `import torch` loads."""

from __future__ import annotations

import subprocess
import sys

SLOW = (
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed.tensor",
    "torch.fx.experimental.symbolic_shapes",
    "sympy",
    "scipy",
    "matplotlib",
    "torchvision",
)


def test_import_loads_no_compiler_and_no_optional_package() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import sokd; "
        "print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert "sokd.methods.crd" in loaded
    assert [name for name in loaded if name.startswith(SLOW)] == []
