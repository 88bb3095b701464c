"""Run a compiled pipeline's YAML like KFP's backend: resolve each task, start its container.

The containers run Google's custom-job launcher, which really runs here, as a process.
"""

import json
import os
import re
import signal
import subprocess
import sys
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

SITE = Path(__file__).parent / "launcher_site"
_INPUT = re.compile(r"\{\{\$\.inputs\.parameters\['(\w+)'\]\}\}")
_OUTPUT = re.compile(r"\{\{\$\.outputs\.parameters\['(\w+)'\]\.output_file\}\}")
_RUN_TIME = {
    "{{$.pipeline_google_cloud_project_id}}": "test-project",
    "{{$.pipeline_google_cloud_location}}": "us-central1",
    "{{$.pipeline_job_name}}": "pipeline-job",
}


class LauncherFailed(Exception):  # noqa: N818 (says what happened)
    """A task's launcher failed; the message is its output."""


@dataclass
class Run:
    """One run of the pipeline.

    Attributes:
        path: The compiled YAML.
        parameters: The pipeline's parameters.
        root: gs:// folder for the outputs of its tasks.
        folder: Local folder for files that launchers keep on disk.
        vertex: Address of the API.
        environment: Further variables for the launchers.
        outputs: Task to its output parameters, so far.
        answers: Task to its executor output.
        read: Reads an object from the store.
    """

    path: Path
    parameters: Mapping[str, Any]
    root: str
    folder: Path
    vertex: str
    read: Any
    environment: Mapping[str, str] = field(default_factory=dict)
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    answers: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.spec = next(iter(yaml.safe_load_all(self.path.read_text(encoding="utf-8"))))
        declared = self.spec["root"]["inputDefinitions"]["parameters"]
        unknown = set(self.parameters) - set(declared)
        assert not unknown, f"unknown parameters {unknown}"
        self.values = {}
        for name, definition in declared.items():
            value = self.parameters.get(name, definition.get("defaultValue"))
            assert value is not None, f"{name} is required"
            self.values[name] = self._at_run_time(value)

    def run(self) -> dict[str, Any]:
        """Run all tasks in order and return the pipeline's outputs."""
        for task, component, inputs in self.tasks(self.spec["root"]["dag"], self.values):
            self.run_task(task, component, inputs)
        wanted = self.spec["root"]["dag"]["outputs"]["parameters"]
        return {
            name: self._produced(source["valueFromParameter"]) for name, source in wanted.items()
        }

    def tasks(
        self, dag: Mapping[str, Any], values: Mapping[str, Any]
    ) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
        """Yield (name, component, inputs) in an order that dependencies allow."""
        waiting = dict(dag["tasks"])
        done: set[str] = set()
        while waiting:
            ready = [n for n, t in waiting.items() if set(t.get("dependentTasks", [])) <= done]
            assert ready, f"circular: {list(waiting)}"
            for name in sorted(ready):
                task = waiting.pop(name)
                inputs = {
                    key: self._input(source, values)
                    for key, source in task.get("inputs", {}).get("parameters", {}).items()
                }
                component = self.spec["components"][task["componentRef"]["name"]]
                if self._triggered(task, inputs):
                    assert "enableCache" not in task.get("cachingOptions", {})
                    if "dag" in component:
                        yield from self.tasks(component["dag"], inputs)
                    else:
                        yield name, component, inputs
                done.add(name)

    def run_task(self, name: str, component: Mapping[str, Any], inputs: dict[str, Any]) -> None:
        """Start a task's launcher and wait; LauncherFailed if it fails."""
        process = self.start_task(name, component, inputs)
        printed, _ = process.communicate(timeout=1200)
        if process.returncode != 0:
            raise LauncherFailed(f"{name}: {printed.decode(errors='replace')}")
        self.collect(name, component)

    def start_task(
        self, name: str, component: Mapping[str, Any], inputs: dict[str, Any]
    ) -> subprocess.Popen[bytes]:
        """Start a task's launcher as a process."""
        label = component["executorLabel"]
        container = self.spec["deploymentSpec"]["executors"][label]["container"]
        executor_input = self.executor_input(name, component, inputs)
        arguments = [
            self._render(text, inputs, executor_input)
            for text in (*container["command"][1:], *container["args"])
        ]
        environment = {
            **os.environ,
            **self.environment,
            "PYTHONPATH": str(SITE),
            "FAKE_VERTEX_ENDPOINT": self.vertex,
        }
        assert container["command"][0] == "python3"
        return subprocess.Popen(
            [sys.executable, *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def executor_input(
        self, name: str, component: Mapping[str, Any], inputs: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Build KFP's input for a task: its inputs and output locations, as Vertex writes both."""
        place = f"{self.root}/{name}"
        mounted = place.replace("gs://", "/gcs/", 1)
        declared = component.get("outputDefinitions", {})
        parameters = {
            key: {"outputFile": f"{mounted}/{key}"} for key in declared.get("parameters", {})
        }
        if "gcp_resources" in parameters:  # written by the launcher itself, through the mount
            parameters["gcp_resources"] = {"outputFile": str(self.resources(name))}
        artifacts = {
            key: {
                "artifacts": [
                    {
                        "name": f"projects/1/artifacts/{name}-{key}",
                        "type": definition["artifactType"],
                        "uri": f"{place}/{key}",
                        "metadata": {},
                    }
                ]
            }
            for key, definition in declared.get("artifacts", {}).items()
        }
        outputs = {
            "parameters": parameters,
            "artifacts": artifacts,
            "outputFile": f"{mounted}/executor_output.json",
        }
        return {"inputs": {"parameterValues": dict(inputs)}, "outputs": outputs}

    def resources(self, name: str) -> Path:
        """Return the file in which a task's launcher records its job."""
        return self.folder / f"{name}-gcp_resources"

    def collect(self, name: str, component: Mapping[str, Any]) -> None:
        """Read a task's answer, as KFP's backend does, and check its types."""
        answer = json.loads(self.read(f"{self.root}/{name}/executor_output.json"))
        self.answers[name] = answer
        values = {}
        kinds = {"STRING": str, "NUMBER_INTEGER": int}
        for key, definition in component["outputDefinitions"]["parameters"].items():
            if key == "gcp_resources":
                continue
            values[key] = answer["parameterValues"][key]
            assert isinstance(values[key], kinds[definition["parameterType"]]), (name, key)
            assert self.read(f"{self.root}/{name}/{key}").decode() == str(values[key])
        self.outputs[name] = values

    def _input(self, source: Mapping[str, Any], values: Mapping[str, Any]) -> Any:
        if "componentInputParameter" in source:
            return values[source["componentInputParameter"]]
        if "taskOutputParameter" in source:
            return self._produced_by(source["taskOutputParameter"])
        return source["runtimeValue"]["constant"]

    def _produced(self, source: Mapping[str, Any]) -> Any:
        return self.outputs[source["producerSubtask"]][source["outputParameterKey"]]

    def _produced_by(self, source: Mapping[str, Any]) -> Any:
        return self.outputs[source["producerTask"]][source["outputParameterKey"]]

    def _triggered(self, task: Mapping[str, Any], inputs: Mapping[str, Any]) -> bool:
        condition = task.get("triggerPolicy", {}).get("condition")
        if condition is None:
            return True
        found = re.fullmatch(r"inputs\.parameter_values\['([^']+)'\] != ''", condition.strip())
        assert found, f"a condition that this driver does not know: {condition}"
        return inputs[found[1]] != ""

    def _at_run_time(self, value: Any) -> Any:
        if isinstance(value, str):
            for placeholder, text in {**_RUN_TIME, "{{$.pipeline_root}}": self.root}.items():
                value = value.replace(placeholder, text)
        return value

    def _render(
        self, text: str, inputs: Mapping[str, Any], executor_input: Mapping[str, Any]
    ) -> str:
        """Fill in placeholders like the backend: text as it is, everything else as JSON."""

        def value_of(match: re.Match[str]) -> str:
            value = inputs[match[1]]
            if isinstance(value, float) and value.is_integer():
                value = int(value)
            return value if isinstance(value, str) else json.dumps(value)

        text = _INPUT.sub(value_of, text)
        text = _OUTPUT.sub(
            lambda match: executor_input["outputs"]["parameters"][match[1]]["outputFile"], text
        )
        escaped = json.dumps(json.dumps(executor_input, ensure_ascii=False), ensure_ascii=False)
        text = text.replace("{{$.json_escape[1]}}", escaped[1:-1])
        # Each task has its own number; an integer that may be negative, as on Vertex.
        number = str(-zlib.crc32(executor_input["outputs"]["outputFile"].encode()))
        text = self._at_run_time(text).replace("{{$.pipeline_task_uuid}}", number)
        assert "{{$" not in text, text
        return text


def stop(process: subprocess.Popen[bytes]) -> None:
    """Stop a launcher as KFP does when its pipeline is cancelled."""
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == 0, printed.decode(errors="replace")
