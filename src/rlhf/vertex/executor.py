"""KFP's interface to a task: the executor input, and the files that answer it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rlhf.errors import InputError
from rlhf.files.storage import as_url, open_store, storage_errors


def write_file(path: str, text: str) -> None:
    """Write a whole file, local or in a bucket; there directly, with retries, not via a mount."""
    with storage_errors(f"{path} cannot be written"):
        filesystem, root = open_store(as_url(path), auto_mkdir=True)
        # JSON escapes in a row may contain half a surrogate pair, which UTF-8 cannot encode.
        filesystem.pipe_file(root, text.encode("utf-8", "backslashreplace"))


@dataclass
class Task:
    """One task of a pipeline, as seen from its container.

    Attributes:
        inputs: Parameter name to value.
        parameter_files: Output parameter name to the file for its value.
        artifacts: Output artifact name to KFP's description of it (`name`, `uri`, `type`).
        output_file: Path for the executor output; "" if KFP gave none.
        values: Output parameters so far.
        metadata: Metadata of output artifacts so far.
    """

    inputs: Mapping[str, Any]
    parameter_files: Mapping[str, str] = field(default_factory=dict)
    artifacts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    output_file: str = ""
    values: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def from_executor_input(cls, text: str) -> "Task":
        """Read KFP's executor input.

        Raises:
            InputError: If it is not the JSON that KFP writes.
        """
        try:
            data = json.loads(text)
            inputs = data.get("inputs", {}).get("parameterValues", {})
            outputs = data.get("outputs", {})
            return cls(
                inputs=dict(inputs),
                parameter_files={
                    name: value["outputFile"]
                    for name, value in outputs.get("parameters", {}).items()
                },
                artifacts={
                    name: value["artifacts"][0]
                    for name, value in outputs.get("artifacts", {}).items()
                },
                output_file=outputs.get("outputFile", ""),
            )
        except (ValueError, AttributeError, KeyError, TypeError, IndexError) as error:
            raise InputError(f"executor_input: is not what KFP writes: {error!r}") from error

    def write_artifact(self, name: str, text: str) -> None:
        """Write the content of an output artifact, such as a Markdown page."""
        if name in self.artifacts:
            write_file(self.artifacts[name]["uri"], text)

    def answer(self) -> None:
        """Write the output parameters, and the executor output that contains them and the metadata.

        Parameters also get their own files, because the console and later tasks read one or the
        other.
        """
        for name, path in self.parameter_files.items():
            value = self.values.get(name, "")
            write_file(path, value if isinstance(value, str) else json.dumps(value))
        if not self.output_file:
            return
        artifacts = {
            name: {"artifacts": [{**artifact, "metadata": self.metadata.get(name, {})}]}
            for name, artifact in self.artifacts.items()
        }
        answer = {"parameterValues": self.values, "artifacts": artifacts}
        write_file(self.output_file, json.dumps(answer, ensure_ascii=False))
