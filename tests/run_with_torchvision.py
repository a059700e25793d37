"""Runs a script or `-m` a module where torchvision may be of another build than torch: `python
tests/run_with_torchvision.py SCRIPT`.

torchvision for CUDA does not load its operators beside torch for CPUs, and its import fails where it gives shapes to
those that are then missing. Here they are declared first. (Nothing that runs here computes with them.)
"""

import re
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import library


def declare_operators() -> None:
    spec = find_spec("torchvision")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent
    if torch.version.cuda is None and "+cu" in (folder / "version.py").read_text():
        given = re.findall(r'register_fake\("(torchvision::\w+)"\)', (folder / "_meta_registrations.py").read_text())
        for name in given:
            library.define(name, "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


if __name__ == "__main__":
    declare_operators()
    del sys.argv[0]
    if sys.argv[0] == "-m":
        del sys.argv[0]
        sys.path[0] = ""
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
        runpy.run_path(sys.argv[0], run_name="__main__")
