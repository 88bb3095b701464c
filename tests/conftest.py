"""Tiny random models and tokenizers that every test may use. T5 and LLaMA run the same tests."""

import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tiny models gain nothing from threads, and two test processes would fight over the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Read when gcsfs is imported, which any test may do first; see object_store.py.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")

import numpy as np
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import HealthCheck, settings
from transformers import PreTrainedModel, PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).parent))

from support.cases import Case, make_case
from support.hub import Hub, running_hub
from support.object_store import ObjectStore, running_store
from support.tiny import make_tokenizer
from support.tiny import tiny_model as make_model

from rlhf.models.families import FAMILIES
from rlhf.models.language_model import LanguageModel

# `dtype: auto` is float32 in tests on every machine; tests of bfloat16 ask for it.
torch.cpu.get_capabilities = dict
# The same examples on every machine, however busy it is.
settings.register_profile(
    "anywhere",
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("anywhere")

ARCHS = ["t5", "llama"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shuffle", type=int, metavar="SEED", help="run in an order that SEED gives")


def pytest_report_header(config: pytest.Config) -> str | None:
    seed = config.getoption("--shuffle")
    return None if seed is None else f"order: --shuffle {seed}"


# Their tests need tensors, but what they look at is no number.
ABOUT_FILES_AND_PROCESSES = {
    "files", "vertex", "data", "test_signals.py", "test_benchmarks.py", "test_bad_input.py",
    "test_hostile_models.py", "test_identity.py", "test_checkpoints.py", "test_targets.py",
}  # fmt: skip


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark tests that compute; shuffle files, and the tests in each, which share its fixtures."""
    for item in items:
        place = item.path.relative_to(Path(__file__).parent)
        about_files = not ABOUT_FILES_AND_PROCESSES.isdisjoint(place.parts)
        if hasattr(getattr(item, "module", None), "torch") and not about_files:
            item.add_marker(pytest.mark.numerics)
    seed = config.getoption("--shuffle")
    if seed is None:
        return
    order = random.Random(seed)
    files = {item.path: order.random() for item in items}
    places = {item: (files[item.path], order.random()) for item in items}
    items.sort(key=places.__getitem__)


@pytest.fixture(autouse=True)
def same_start() -> Iterator[None]:
    """Give every test the same initial state, whatever earlier tests in the process changed."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


@pytest.fixture(params=ARCHS)
def arch(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep the user's cache untouched."""
    os.environ.setdefault("RLHF_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def tokenizer(arch: str) -> PreTrainedTokenizerBase:
    return make_tokenizer(arch)


@pytest.fixture
def tiny_model(arch: str) -> PreTrainedModel:
    return make_model(arch)


@pytest.fixture
def tiny_lm(arch: str) -> LanguageModel:
    return FAMILIES[arch](make_model(arch), make_tokenizer(arch), base_name=f"tiny-{arch}")


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for name in ARCHS:
        folder = tmp_path_factory.mktemp("checkpoints") / name
        make_model(name).save_pretrained(folder)
        make_tokenizer(name).save_pretrained(folder)
        folders[name] = folder
    return folders


@pytest.fixture
def tiny_checkpoint(arch: str, checkpoints: dict[str, Path]) -> Path:
    """A folder that plain transformers can load; do not write into it."""
    return checkpoints[arch]


@pytest.fixture(scope="module")
def cases(
    checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Case]:
    """A policy, a reward model and rows on disk, of each family; do not write into them."""
    return {
        arch: make_case(arch, base, tmp_path_factory.mktemp(f"case-{arch}"))
        for arch, base in checkpoints.items()
    }


@pytest.fixture
def object_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    """An object store for gs://, empty and without faults."""
    with running_store(tmp_path, monkeypatch) as store:
        yield store


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub of models and data sets, empty and without faults, with its own cache."""
    with running_hub(tmp_path / "hub-cache", monkeypatch) as hub:
        yield hub


@pytest.fixture
def vertex(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Provide Vertex's API, anonymous credentials, and files that are not checked."""
    from support.submission import fake_api  # and with it Google's client library

    yield from fake_api(monkeypatch)


@pytest.fixture
def run_file(tmp_path: Path) -> str:
    """A configuration for `rlhf vertex submit`."""
    from support.submission import YAML

    path = tmp_path / "run.yaml"
    path.write_text(YAML, encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data and a real checkpoint, where they are at hand."""
    root = Path(__file__).parents[1]
    folder = Path(os.environ.get("RLHF_SHARED", root.parent / "shared"))
    if not folder.is_dir():
        pytest.skip("no shared data here; set RLHF_SHARED")
    return folder
