"""Compile the pipeline into this folder and into the package, which ships it.

Usage: `python kfp/compile_pipeline.py`;

`kfp dsl compile --py kfp/compile_pipeline.py --output FILE.yaml` writes the same.
"""

import shutil
from pathlib import Path

from rlhf.vertex import TEMPLATE
from rlhf.vertex.pipeline import compile_pipeline, rlhf_pipeline

HERE = Path(__file__).parent
__all__ = ["rlhf_pipeline"]  # what kfp's own command looks for

if __name__ == "__main__":
    compile_pipeline(str(HERE / TEMPLATE))
    shutil.copyfile(HERE / TEMPLATE, HERE.parent / "src" / "rlhf" / "vertex" / TEMPLATE)
