"""Further metrics from local modules for the `evaluate` library.

Nothing is ever downloaded: a module is a local folder or file that the user names.
"""

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.errors import InputError

_FROM_URL = re.compile(r"^\s*(?:import|from)\s[^#\n]*#\s*From:", re.MULTILINE)


def metric_script(path: str) -> Path:
    """Return the script of a local `evaluate` module: a `.py` file, or NAME/NAME.py in folder NAME.

    Raises:
        InputError: If it is not on this machine, would fetch code from elsewhere, or `evaluate` is
            not installed. A bare name is refused because `evaluate` would download a script.
    """
    script = Path(path)
    if script.is_dir():
        script = script / f"{script.resolve().name}.py"
    if not script.is_file() or script.suffix != ".py":
        raise InputError(
            f"extra_metrics: {path}: not a local metric; expected a folder NAME that holds NAME.py,"
            " or a .py file (metric scripts are never downloaded: get the folder, then give its"
            " path)"
        )
    if _FROM_URL.search(script.read_text(encoding="utf-8", errors="replace")):
        raise InputError(
            f"extra_metrics: {script}: has an import with `# From: URL`, which would download code;"
            " put that file beside the script and remove the comment"
        )
    if importlib.util.find_spec("evaluate") is None:
        raise InputError("extra_metrics: needs the package evaluate: pip install evaluate")
    return script


def module_metrics(
    path: str, predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Return the metrics that a local `evaluate` module computes for texts.

    Args:
        path: See `metric_script`.
        predictions: (N,) texts.
        references: (N,) lists of texts; rows without any are left out if the module reads
            references, and a module that takes one reference gets the first.

    Returns:
        Its numbers as `NAME`, or `NAME_FIGURE` for figures with other names; a list with one number
        per row is averaged, anything else is left out.

    Raises:
        InputError: If the module cannot be loaded or does not accept texts.
    """
    script = metric_script(path)
    import evaluate
    from evaluate.utils.file_utils import DownloadConfig

    try:
        # keep_in_memory: parallel runs must not share evaluate's cache folder
        module = evaluate.load(
            str(script),
            keep_in_memory=True,
            download_config=DownloadConfig(local_files_only=True),
        )
        results = module.compute(**_module_inputs(module, predictions, references)) or {}
    except Exception as error:  # a user's script may raise anything
        raise InputError(f"extra_metrics: {path}: {type(error).__name__}: {error}") from error
    figures: dict[str, float] = {}
    for key, value in results.items():
        if np.ndim(value) <= 1 and np.size(value) and np.asarray(value).dtype.kind in "bif":
            name = script.stem if key == script.stem else f"{script.stem}_{key}"
            figures[name] = float(np.mean(value))
    return figures


def _module_inputs(
    module: Any, predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, list[Any]]:
    formats = module.features if isinstance(module.features, list) else [module.features]
    if "references" not in formats[0]:
        name = "predictions" if "predictions" in formats[0] else next(iter(formats[0]))
        return {name: list(predictions)}
    rows = [
        (text, list(targets))
        for text, targets in zip(predictions, references, strict=True)
        if targets
    ]
    if not rows:
        raise ValueError("it reads references, and no row has one")
    several = any("Value" not in type(features["references"]).__name__ for features in formats)
    if several:  # evaluate wants equally many references for every row: repeat the last
        most = max(len(targets) for _, targets in rows)
        rows = [(text, targets + targets[-1:] * (most - len(targets))) for text, targets in rows]
    return {
        "predictions": [text for text, _ in rows],
        "references": [targets if several else targets[0] for _, targets in rows],
    }
