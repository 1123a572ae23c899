"""The commands by name: module and one line. Nothing else of a command is known before it is called."""

from __future__ import annotations

COMMANDS: dict[str, tuple[str, str]] = {
    "run": ("cmoe.cli.run", "train on a stream as a configuration says"),
    "resume": ("cmoe.cli.resume", "go on with an interrupted run, exactly where it was"),
    "extend": ("cmoe.cli.extend", "let a finished run learn further experiences"),
    "sweep": ("cmoe.cli.sweep", "a grid of runs, several at a time"),
    "compare": ("cmoe.cli.compare", "table, picture and report of an experiment's runs"),
    "reproduce": ("cmoe.cli.reproduce", "run a published table and print both figures"),
    "predict": ("cmoe.cli.predict", "classes and confidences for a file of inputs"),
    "export": ("cmoe.cli.export", "a run's model as safetensors and as an MLflow model"),
    "ui": ("cmoe.cli.ui", "start MLflow and print the link to an experiment"),
    "sync": ("cmoe.cli.sync", "deliver what a tracking server has not received yet"),
    "list": ("cmoe.cli.list", "names and one-liners of components and configurations"),
    "show": ("cmoe.cli.show", "every option of a component or section"),
    "validate": ("cmoe.cli.validate", "check a configuration without running it"),
    "new-task": ("cmoe.cli.new_task", "write a task plugin and its test to begin with"),
    "doctor": ("cmoe.cli.doctor", "what this installation has and what is wrong with it"),
}
