"""The texts of the problems of bad rows."""

from collections.abc import Sequence

from rlhf.data.sources.record import MAX_PROBLEMS


class Faults:
    """Problems of bad rows: the texts of those that may have to be reported.

    However many rows are bad, only a few texts are kept: the first ones of each kind.
    """

    def __init__(self) -> None:
        self.whole_files: list[str] = []
        self._texts: dict[tuple[int, str], list[str]] = {}
        self._counts: dict[tuple[str, bool, bool], int] = {}

    def wanted(self, part: str, has_pair: bool, bad_pair: bool) -> bool:
        """Count another bad row; return whether its texts may have to be reported.

        Args:
            part: The part that has the problems.
            has_pair: Whether the row has candidate fields: some stages pass over those without.
            bad_pair: Whether its candidates have problems, which hide those of rendering.
        """
        key = (part, has_pair, bad_pair)
        self._counts[key] = self._counts.get(key, 0) + 1
        return self._counts[key] <= MAX_PROBLEMS

    def add(self, row: int, part: str, texts: Sequence[str]) -> None:
        """Store the texts of one part of a row."""
        self._texts[row, part] = list(texts[:MAX_PROBLEMS])

    def of(self, row: int, parts: Sequence[str]) -> list[str]:
        """Return the texts of some parts of a row."""
        return [text for part in parts for text in self._texts.get((row, part), ())]
