"""Whatever becomes of stdout and stderr, a run goes on; whatever a file says, terminals stay."""

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.cli import main
from rlhf.console import SteadyStream, complain, say, show
from rlhf.training.tracking import ProgressLine
from rlhf.untrusted import printable, without_secrets

ROWS = '{"input_text": "the cat"}\n' * 2000


class Broken(io.StringIO):
    """A stream that is gone."""

    def __init__(self, error: Exception, terminal: bool = False) -> None:
        super().__init__()
        self.error, self.terminal = error, terminal

    def isatty(self) -> bool:
        return self.terminal

    def write(self, _: str) -> int:
        raise self.error

    def flush(self) -> None:
        raise self.error


GONE = [
    BrokenPipeError(errno.EPIPE, "gone"),
    OSError(errno.EIO, "gone"),
    OSError(errno.ENOSPC, "full"),
    ValueError("I/O operation on closed file"),
]


@pytest.mark.parametrize("error", GONE, ids=str)
@pytest.mark.parametrize("terminal", [False, True])
def test_nothing_that_happens_to_a_stream_stops_what_writes(
    error: Exception, terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, Broken(error, terminal))
    say("a")
    show("b")
    complain(["c"])
    line = ProgressLine("ppo", 2, 0, ["x"])
    line.update(1, {"x": 1.0}, True)
    line.update(2, {"x": 1.0}, True)
    line.close()
    print("third party", file=SteadyStream(sys.stderr))  # type: ignore[call-overload]
    monkeypatch.setattr(sys, "stderr", None)
    say("nobody")
    ProgressLine("ppo", 1, 0, []).update(1, {}, True)


def test_what_an_encoding_lacks_is_written_as_an_escape(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii", errors="strict"))
    show("é 🙂 a")
    assert raw.getvalue() == b"\\xe9 \\U0001f600 a\n".replace(b"f600", b"f642")


@pytest.mark.parametrize(
    "text", ["\x1b[2J", "\x9b31m", "a\rb", "\x07", "\0", "\u202eabc", "\u2066", "\u200b", "\ud800"]
)
def test_nothing_reaches_a_terminal_but_text(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    say(text)
    show(text)
    complain([f"{text}\nrlhf: forged"])
    captured = capsys.readouterr()
    shown = captured.out + captured.err
    assert shown.replace("\n", "").isprintable()
    assert len(shown.splitlines()) == 3
    assert printable("plain é 🙂\t\n") == "plain é 🙂\t\n"


def test_row_keys_and_paths_are_shown_without_effect(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "evil\x1b[31m\u202e.jsonl"
    rows.write_text('{"\\u001b[2J\\u202ekey\\u0000": 1, "input_txt": "a\\u001b]0;title\\u0007"}\n')
    assert main(["data", "check", str(rows)]) == 2
    assert main(["data", "check", str(tmp_path / "none\x1b[31m.jsonl")]) == 2
    assert main(["data", "check", "--kind", "\x1b[31m", str(rows)]) == 2
    assert main(["\x1b[31m"]) == 2
    assert main(["ppo", "--\x1b[31m", "1"]) == 2
    captured = capsys.readouterr()
    assert captured.err
    assert (captured.err + captured.out).replace("\n", "").isprintable()


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("https://user:pw@host/x", "https://host/x"),
        ("https://user:p@w@host/x", "https://host/x"),
        ("s3://KEY:SECRET@bucket/x?a=1", "s3://bucket/x?a=1"),
        ("https://h/x?X-Amz-Signature=abc&b=2", "https://h/x?X-Amz-Signature=***&b=2"),
        ("https://h/x?b=2&access_token=abc#f", "https://h/x?b=2&access_token=***#f"),
        ("https://h/x?sig=abc", "https://h/x?sig=***"),
        ("gs://bucket/a@b", "gs://bucket/a@b"),
        ("mail me@host", "mail me@host"),
    ],
)
def test_secrets_of_addresses_are_not_shown(
    address: str, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert without_secrets(f"see '{address}' there") == f"see '{shown}' there"
    say(address)
    assert capsys.readouterr().err == f"{shown}\n"


def rlhf(arguments: str, redirection: str, **environment: str) -> tuple[int, str]:
    """Run the command in a shell; returns its exit code and the shell's output."""
    command = f"{sys.executable} -m rlhf {arguments}"
    script = f"{{ {command}; echo code $? >&3; }} {redirection}"
    result = subprocess.run(
        ["bash", "-c", f"exec 3>&1; {script}"],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )
    code = [line for line in result.stdout.splitlines() if line.startswith("code ")]
    return int(code[0].removeprefix("code ")), result.stdout + result.stderr


@pytest.mark.parametrize("redirection", ["| true", "2>&1 | true", "<&- >&- 2>&-"])
def test_results_that_nobody_takes_are_no_failure(redirection: str, tmp_path: Path) -> None:
    if sys.platform == "win32":
        pytest.skip("needs a shell")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(ROWS)
    code, said = rlhf(f"data check {rows}", redirection)
    assert code == 0
    assert "Error" not in said
    assert rows.read_text() == ROWS


def test_an_ascii_terminal_is_no_failure(tmp_path: Path) -> None:
    rows = tmp_path / "é.jsonl"
    rows.write_text(ROWS)
    code, said = rlhf(f"data check {rows}", "", PYTHONIOENCODING="ascii", LC_ALL="C")
    assert (code, "Traceback" in said) == (0, False)


def test_training_goes_on_when_nobody_listens(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"input_text": "the cat", "output_text": "a cat"}\n' * 4)
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, Broken(BrokenPipeError(errno.EPIPE, "gone"), terminal=True))
    flags = {
        "base_model": tiny_checkpoint, "dataset": rows, "output_dir": tmp_path / "out",
        "train_steps": 2, "batch_size": 2, "prompt_sequence_length": 16,
        "target_sequence_length": 8, "device": "cpu", "log_with": "none",
    }  # fmt: skip
    assert main(["sft", *(str(part) for k, v in flags.items() for part in (f"--{k}", v))]) == 0
    assert '"finished": true' in (tmp_path / "out" / "metrics.json").read_text()
