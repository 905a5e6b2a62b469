"""A parser for the Dockerfile, as far as its tests need it."""

import json
import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Instruction(NamedTuple):
    """One instruction of the Dockerfile: its name, such as `RUN`, and the text after it."""

    name: str
    text: str

    @property
    def flags(self) -> list[str]:
        """The options before the arguments, such as `--from=source`."""
        return re.findall(r"(?:^|\s)(--[a-z][a-z-]*=\S+)", self.text.split("[")[0])

    @property
    def exec_form(self) -> list[str]:
        """The arguments, from the JSON list at the end of the text.

        Raises:
            ValueError: if there is no such list, so that a shell would read the text.
        """
        arguments = json.loads(self.text[self.text.index("[") :])
        assert all(isinstance(argument, str) for argument in arguments)
        return arguments

    @property
    def words(self) -> list[str]:
        """The arguments without the options, split as a shell would."""
        return [word for word in shlex.split(self.text) if not word.startswith("--")]


class Dockerfile:
    """The instructions of a Dockerfile by stage, in their order."""

    def __init__(self, path: Path) -> None:
        joined = re.sub(r"\\\n\s*", "", re.sub(r"(?m)^\s*#.*\n", "", path.read_text()))
        self.instructions = [Instruction(*line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]
        self.defaults: dict[str, str] = {}  # ARGs before the first FROM
        self.stages: dict[str, list[Instruction]] = {}
        stage: list[Instruction] | None = None
        for instruction in self.instructions:
            if instruction.name == "FROM":
                stage = self.stages[instruction.text.split(" AS ")[1]] = []
            if stage is None:
                name, _, value = instruction.text.partition("=")
                self.defaults[name] = value
            else:
                stage.append(instruction)

    def of(self, stage: str, name: str) -> list[Instruction]:
        """Return the stage's instructions with this name."""
        return [instruction for instruction in self.stages[stage] if instruction.name == name]

    def last(self, stage: str, name: str) -> Instruction:
        return self.of(stage, name)[-1]

    def environment(self, stage: str) -> dict[str, str]:
        """Return the variables that the stage sets with ENV."""
        return dict(word.split("=", 1) for env in self.of(stage, "ENV") for word in env.words)


DOCKERFILE = Dockerfile(ROOT / "Dockerfile")
TARGETS = ("cpu", "cuda")
