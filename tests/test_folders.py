from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from ragmoe._folders import share


def test_a_file_of_safetensors_is_as_readable_as_its_folder(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    for folder, wanted in ((0o755, 0o644), (0o700, 0o600)):
        tmp_path.chmod(folder)
        save_file({"x": np.zeros(1)}, file)
        share(file)
        assert file.stat().st_mode & 0o777 == wanted
