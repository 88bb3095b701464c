"""Read the Dockerfile, and run its steps as a script where there is no Docker.

RUN and COPY act on an empty folder as they would on the image: the image's absolute paths are
redirected into that folder, and nothing else in a step is changed.
"""

import fnmatch
import os
import re
import shlex
import shutil
import string
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Steps that need root and their own Debian.
SKIPPED = {"useradd --uid 1000 --user-group --create-home rlhf"}


@dataclass
class Stage:
    base: str
    name: str = ""
    steps: list[tuple[str, str]] = field(default_factory=list)

    def values(self, keyword: str) -> list[str]:
        return [value for word, value in self.steps if word == keyword]


def stages() -> list[Stage]:
    """Return the Dockerfile's instructions, with continued lines joined and comments left out.

    An ARG before the first FROM applies to the FROM lines, which show its default here.
    """
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.M)
    found: list[Stage] = []
    of_bases: dict[str, str] = {}
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        if not line.strip():
            continue
        keyword, value = line.split(maxsplit=1)
        if keyword == "FROM":
            base, _, name = value.partition(" AS ")
            found.append(Stage(string.Template(base).substitute(of_bases), name))
        elif not found:
            assert keyword == "ARG", line
            argument, _, default = value.partition("=")
            of_bases[argument] = default
        else:
            found[-1].steps.append((keyword, value))
    return found


def ignored(path: Path) -> bool:
    """Return whether .dockerignore excludes a path; the last matching rule decides."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    names = [path, *path.parents][:-1]
    result = False
    for rule in (line for line in lines if line and not line.startswith("#")):
        pattern = rule.removeprefix("!").removeprefix("**/")
        anywhere = "**/" in rule
        if any(fnmatch.fnmatch(p.name if anywhere else str(p), pattern) for p in names):
            result = not rule.startswith("!")
    return result


class Build:
    """Runs the Dockerfile's stages one by one at `root`, like an image build.

    Attributes:
        root: The folder in place of `/`; at the end, the final stage's.
        env: The environment that a container of the image would start with.
        directory: The working directory of that container.
        skipped: The RUN steps that were left out.
    """

    def __init__(self, folder: Path, build_args: dict[str, str]) -> None:
        self.root = folder / "root"
        self.env: dict[str, str] = {}
        self.skipped: set[str] = set()
        self._saved = folder / "stages"
        self._saved.mkdir()
        self._build_args = build_args
        self._inherited: dict[str, tuple[dict[str, str], Path]] = {}
        for stage in stages():
            self._run_stage(stage)

    def _run_stage(self, stage: Stage) -> None:
        if stage.base in self._inherited:
            env, self.directory = self._inherited[stage.base]
            self.env = dict(env)
            # Hard links are safe: pip replaces files instead of writing into them.
            subprocess.run(["cp", "-al", self._saved / stage.base, self.root], check=True)
        else:
            self._base_image()
        for keyword, value in stage.steps:
            getattr(self, f"_{keyword.lower()}", lambda _: None)(value)
        if stage.name:
            self._inherited[stage.name] = self.env, self.directory
            self.root.rename(self._saved / stage.name)

    def _base_image(self) -> None:
        """Use an environment of this Python, with pip, in place of the Python image."""
        self.directory = self.root
        local = self.root / "usr" / "local"
        subprocess.run([sys.executable, "-m", "venv", local], check=True)
        (local / "lib" / "python3.11" / "ensurepip").mkdir(parents=True)
        (self.root / "home" / "rlhf").mkdir(parents=True)
        passed = ("PIP_", "SSL_", "REQUESTS_", "HTTP", "http", "NO_PROXY", "no_proxy")
        self.env = {k: v for k, v in os.environ.items() if k.startswith(passed)}
        self.env |= {
            "PATH": f"{local}/bin:/usr/bin:/bin",
            "HOME": str(self.root),
            "LANG": "C.UTF-8",
        }

    def redirected(self, text: str) -> str:
        """Move the image's absolute paths below `root`; keep addresses and relative paths."""
        return re.sub(r"(?<![\w/.*])/(?=(opt|usr/local|home|build)\b)", f"{self.root}/", text)

    def _arg(self, value: str) -> None:
        name, _, default = value.partition("=")
        default = self._build_args.get(name, default)
        self.env[name] = string.Template(default).substitute(self.env)

    def _env(self, value: str) -> None:
        for pair in shlex.split(value):
            name, _, text = pair.partition("=")
            self.env[name] = string.Template(self.redirected(text)).substitute(self.env)

    def _workdir(self, value: str) -> None:
        self.directory = Path(self.redirected(value))
        self.directory.mkdir(parents=True, exist_ok=True)

    def _copy(self, value: str) -> None:
        *sources, target = value.split()
        context, link, ignore = ROOT, shutil.copy2, self._ignored
        if sources[0].startswith("--from="):
            context = self._saved / sources.pop(0).removeprefix("--from=")
            link, ignore = os.link, None
        goal = self.directory / self.redirected(target)
        for source in sources:
            origin = context / source.lstrip("/")
            if origin.is_file():
                shutil.copy(origin, goal / origin.name if goal.is_dir() else goal)
            else:
                shutil.copytree(
                    origin, goal, symlinks=True, copy_function=link, ignore=ignore,
                    dirs_exist_ok=True,
                )  # fmt: skip

    @staticmethod
    def _ignored(folder: str, names: list[str]) -> set[str]:
        relative = Path(folder).relative_to(ROOT)
        return {name for name in names if ignored(relative / name)}

    def _run(self, value: str) -> None:
        if value in SKIPPED:
            self.skipped.add(value)
            return
        script = self.redirected(value)
        assert not re.search(rf"(?<![\w./])/(?!/)(?!{str(self.root)[1:]})\w", script), script
        command = ["/bin/sh", "-ec", script]
        run = subprocess.run(
            command, cwd=self.directory, env=self.env, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=1200,
        )  # fmt: skip
        assert run.returncode == 0, f"{value}\n{run.stdout[-4000:]}"
