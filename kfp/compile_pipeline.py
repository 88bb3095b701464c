"""Compile the pipeline into this folder and into the package, which ships it.

Usage: `python kfp/compile_pipeline.py`.
"""

import shutil
from pathlib import Path

from rlhf.vertex.pipeline import compile_pipeline
from rlhf.vertex.submit import TEMPLATE

HERE = Path(__file__).parent

if __name__ == "__main__":
    compile_pipeline(str(HERE / TEMPLATE))
    shutil.copyfile(HERE / TEMPLATE, HERE.parent / "src" / "rlhf" / "vertex" / TEMPLATE)
