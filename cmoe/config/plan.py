"""A run, fully decided: what a configuration comes to after composition, defaults and checks."""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cmoe.plugins import Catalogue

# what a run computes does not depend on these
_NOT_HASHED = ("tracking", "checkpoint", "plugins")


@dataclass
class Plan:
    """What a run does, in plain containers (dict, list, str, int, float, bool, None).

    A component is a mapping with `name` and every option; `model` and `optimizer` hold the section's own keys beside.

    Attributes:
        run: experiment, seed, label.
        model: `moe` is None for a dense model.
        strategy: the strategies in their order.
        plugins: the plugin folders that components of this plan came from.
        code: fingerprint of the plugins' own source; empty when everything is built in. Part of `hash`, not of `to_dict`.
        sources: which file set each key, by full key; not part of the plan's identity.
    """

    run: dict[str, Any]
    stream: dict[str, Any]
    model: dict[str, Any]
    strategy: list[dict[str, Any]]
    optimizer: dict[str, Any]
    scheduler: dict[str, Any]
    trainer: dict[str, Any]
    checkpoint: dict[str, Any]
    evaluation: dict[str, Any]
    tracking: dict[str, Any]
    plugins: list[str] = field(default_factory=list)
    code: str = field(default="", compare=False)
    sources: dict[str, str] = field(default_factory=dict, compare=False, repr=False)

    @property
    def experiment(self) -> str:
        return self.run["experiment"]

    @property
    def seed(self) -> int:
        return self.run["seed"]

    @property
    def strategies(self) -> str:
        """The names of the strategies, joined by '+'."""
        return "+".join(s["name"] for s in self.strategy)

    @property
    def label(self) -> str:
        """The variant's name in tables: the label given, else the strategies."""
        return self.run["label"] or self.strategies

    def to_dict(self) -> dict[str, Any]:
        """A copy in plain containers and a fixed order of keys; as YAML it is a configuration again."""
        sections = {n: getattr(self, n) for n in self.__dataclass_fields__ if n not in ("run", "code", "sources")}
        return copy.deepcopy({**self.run, **sections})

    @classmethod
    def from_dict(cls, data: dict[str, Any], catalogue: Catalogue, source: str = "configuration") -> Plan:
        """The plan that `to_dict` gave, checked anew.

        Args:
            source: named in messages, such as the file that held it.

        Raises:
            ConfigError: it does not fit the components as they are now.
        """
        from cmoe.config.check import check
        from cmoe.config.load import base
        from cmoe.config.text import plain

        tree = base()
        tree.main = source
        tree.merge(plain(data, source), source)
        return check(tree, catalogue)

    def to_yaml(self) -> str:
        """The plan as a configuration file that gives the same plan."""
        from cmoe.config.text import dump

        return dump(self.to_dict()).replace("${", "\\${")

    @property
    def hash(self) -> str:
        """sha256 (hex) of everything that decides what is computed: not tracking, checkpoint or plugin folders."""
        data = {k: v for k, v in self.to_dict().items() if k not in _NOT_HASHED}
        data |= {"code": self.code} if self.code else {}
        text = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()
