"""Combinations that make no sense, each a rule with its message.

A rule sees the whole plan and what the components declare about themselves (class attributes that are read without
importing them). What only the data or the built model can tell is checked by the runner.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from cmoe.config.plan import Plan
from cmoe.config.where import Where
from cmoe.plugins import Entry

# what MLflow's client takes
TRACKING = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks")

ROUTERS = ("model.moe.router", "model.moe.attention.router")

# what an expert works on, by the dimensions inside
UNITS = ("tokens", "sequences", "feature maps")

# scenarios in which a sample comes with its task label when it is predicted
LABELLED = ("task", "joint")


@dataclass
class View:
    """What a rule looks at.

    Attributes:
        plan: the resolved plan.
        entries: the components by the full key of their mapping (`model.moe.router`, `strategy.0`).
        where: the source of a full key.
    """

    plan: Plan
    entries: dict[str, Entry]
    where: Callable[[str], Where]

    def attribute(self, key: str, name: str, default: Any = None) -> Any:
        """What the component at `key` declares; `default` where there is none."""
        return self.entries[key].attribute(name, default) if key in self.entries else default

    def needs(self, key: str) -> set[str]:
        """What the component at `key` needs with the options that it has here."""
        found = set(self.attribute(key, "needs", ()))
        options = self.options(key)
        for option, by_value in self.attribute(key, "needs_with", {}).items():
            found |= set(by_value.get(options.get(option), ()))
        return found

    def options(self, key: str) -> dict[str, Any]:
        """The resolved options of the component at `key`; empty where there is none."""
        found: Any = self.plan.to_dict()
        for part in key.split("."):
            found = found[int(part)] if part.isdecimal() else found.get(part)
            if found is None:
                return {}
        return found

    def routers(self) -> list[tuple[str, str]]:
        """Full key and name of each router of the model's layers, those that come while training too."""
        later = [f"{key}.router" for key, _ in self.strategies()]
        return [(key, self.entries[key].name) for key in (*ROUTERS, *later) if key in self.entries]

    def strategies(self) -> list[tuple[str, str]]:
        """Full key and name of each strategy."""
        return [(f"strategy.{i}", s["name"]) for i, s in enumerate(self.plan.strategy)]

    def refuse(self, key: str, expected: str, got: str) -> NoReturn:
        raise self.where(key).expected(expected, got)


def apply(view: View) -> None:
    """Hold a plan to all rules.

    Raises:
        ConfigError: the first rule that it breaks.
    """
    for rule in RULES:
        rule(view)


def each_strategy_once(view: View) -> None:
    names = [n for _, n in view.strategies()]
    for key, name in view.strategies():
        if names.count(name) > 1:
            view.refuse(key, "each strategy once", f"'{name}' {names.count(name)} times")


def one_owner_of_data(view: View) -> None:
    owners = [(k, n) for k, n in view.strategies() if view.attribute(k, "owns_data", False)]
    if len(owners) > 1:
        names = " and ".join(f"'{n}'" for _, n in owners)
        view.refuse(owners[1][0], "one strategy that decides what is trained on", names)


def one_owner_of_predict(view: View) -> None:
    owners = [(k, n) for k, n in view.strategies() if view.attribute(k, "owns_predict", False)]
    if len(owners) > 1:
        names = " and ".join(f"'{n}'" for _, n in owners)
        view.refuse(owners[1][0], "one strategy with its own way to predict", names)


def one_inference_of_the_task(view: View) -> None:
    inferring = [(k, n) for k, n in view.strategies() if view.attribute(k, "infers_task", False)]
    if len(inferring) > 1:
        names = " and ".join(f"'{n}'" for _, n in inferring)
        view.refuse(inferring[1][0], "one strategy that infers the task", names)


def infers_task(view: View) -> bool:
    return any(view.attribute(k, "infers_task", False) for k, _ in view.strategies())


def one_owner_of_gradients(view: View) -> None:
    owners = [(k, n) for k, n in view.strategies() if view.attribute(k, "owns_gradients", False)]
    if len(owners) > 1:
        names = " and ".join(f"'{n}'" for _, n in owners)
        view.refuse(owners[1][0], "one strategy with its own rule for gradients", names)


def owner_of_loop_alone(view: View) -> None:
    for key, name in view.strategies():
        if view.attribute(key, "owns_loop", False) and len(view.plan.strategy) > 1:
            others = ", ".join(f"'{n}'" for _, n in view.strategies() if n != name)
            view.refuse(key, f"'{name}' alone, it has its own training loop", f"it beside {others}")


def native_loop_has_no_extras(view: View) -> None:
    for key, name in view.strategies():
        if not view.attribute(key, "owns_loop", False):
            continue
        plain = {"max_steps": 0, "clip_norm": 0.0, "clip_value": 0.0, "precision": "32-true"}
        for option, default in plain.items():
            if view.plan.trainer[option] != default:
                got = repr(view.plan.trainer[option])
                view.refuse(f"trainer.{option}", f"{default!r} with '{name}', whose own loop does not know it", got)
        if view.plan.scheduler["name"] != "constant":
            got = repr(view.plan.scheduler["name"])
            view.refuse("scheduler.name", f"'constant' with '{name}', whose own loop does not know it", got)


def nesterov_has_momentum(view: View) -> None:
    if view.plan.optimizer.get("nesterov") and not view.plan.optimizer.get("momentum"):
        view.refuse("optimizer.momentum", "a momentum above 0 with optimizer.nesterov", "0")


def scenario_of_task(view: View) -> None:
    allowed = view.attribute("stream", "scenarios")
    scenario = view.plan.stream.get("scenario")
    if isinstance(allowed, tuple | list) and scenario is not None and scenario not in allowed:
        names = ", ".join(repr(a) for a in allowed)
        view.refuse("stream.scenario", f"a scenario that '{view.plan.stream['name']}' has ({names})", repr(scenario))


def modality_of_backbone(view: View) -> None:
    modality, takes = view.attribute("stream", "modality"), view.attribute("model", "modalities")
    if isinstance(modality, str) and takes and modality not in takes:
        stream = view.plan.stream["name"]
        view.refuse(
            "model.name",
            f"a backbone that takes {modality}, which '{stream}' gives",
            f"'{view.plan.model['name']}', which takes {' or '.join(takes)}",
        )


def causal_router(view: View) -> None:
    if not view.attribute("model", "causal", False):
        return
    for key, router in view.routers():
        if view.attribute(key, "causal", True) is False:
            view.refuse(
                key,
                f"a causal router, '{view.plan.model['name']}' must not look at later tokens",
                f"'{router}', which does",
            )
        options = view.options(key)
        for option, by_value in view.attribute(key, "causal_with", {}).items():
            if by_value.get(options.get(option)) is False:
                view.refuse(
                    f"{key}.{option}",
                    f"a value with which no token sees later ones, as '{view.plan.model['name']}' must not",
                    repr(options[option]),
                )


def assignments_for_options(view: View) -> None:
    """Routers that mix tokens or merge experts leave nothing to do for some options of the layer."""
    moe, kind = view.plan.model["moe"], view.attribute("model.moe.router", "routing_kind", "sparse")
    if not moe or kind == "sparse":
        return
    router = f"'{moe['router']['name']}', which assigns no token to an expert"
    if moe["distillation"]:
        view.refuse("model.moe.distillation", f"0 with {router}", str(moe["distillation"]))
    if moe["dispatch"] != "auto":
        view.refuse("model.moe.dispatch", f"'auto' with {router}", repr(moe["dispatch"]))
    if kind != "merge":
        return
    for i, more in enumerate(moe["more"]):
        for option in ("expert", "hidden"):
            if more[option] is not None:
                view.refuse(
                    f"model.moe.more.{i}.{option}",
                    f"experts of one kind and size with '{moe['router']['name']}', which merges them",
                    "another",
                )


def units_of_experts(view: View) -> None:
    has = view.attribute("model", "unit", 0)
    for key, entry in view.entries.items():
        needs = entry.attribute("inner", 0) if entry.kind == "expert" else 0
        if needs not in (0, has):
            backbone = view.plan.model["name"]
            view.refuse(
                key, f"experts that work on {UNITS[has]}, which '{backbone}' has", f"'{entry.name}', on {UNITS[needs]}"
            )


def attention_by_experts(view: View) -> None:
    moe = view.plan.model["moe"]
    if not moe:
        return
    heads, backbone = moe["attention"], view.plan.model["name"]
    if heads is None:
        if moe["layers"] == "none":
            view.refuse("model.moe.layers", "layers that get experts, as there is no `attention` with any", "'none'")
        return
    if view.attribute("model", "attends", False) is False:
        view.refuse("model.moe.attention", f"none with '{backbone}', whose attention takes no experts", heads["kind"])
    if heads["kind"] == "moa" and heads["shared"]:
        view.refuse("model.moe.attention.shared", "0 with kind 'moa'", str(heads["shared"]))
    key = "model.moe.attention.router"
    if view.attribute(key, "routing_kind", "sparse") != "sparse":
        name = heads["router"]["name"]
        view.refuse(key, "a router that assigns tokens to heads", f"'{name}', which mixes or merges")


def load_has_noise(view: View) -> None:
    for key, _ in view.routers():
        options = view.options(key)
        if options.get("load") and options.get("noise", "shazeer") != "shazeer":
            view.refuse(
                f"{key}.load", "0, as the smooth load is defined for `noise: shazeer` only", str(options["load"])
            )


def frozen_beside_new_weights(view: View) -> None:
    names = {n: k for k, n in view.strategies()}
    keeps = next((n for k, n in view.strategies() if view.attribute(k, "restructures", False)), None)
    if keeps is None:
        return
    whose = f"'{keeps}', whose {'frozen ' if keeps == 'expand' else ''}experts it would draw anew"
    if "separate" in names:
        view.refuse(names["separate"], f"no 'separate' beside {whose}", "both")
    key = names.get("cumulative")
    if key and view.options(key).get("restart"):
        view.refuse(f"{key}.restart", f"false beside {whose}", "true")


def label_for_router(view: View) -> None:
    scenario = view.plan.stream.get("scenario")
    if infers_task(view) and scenario != "online":
        return
    for key, router in view.routers():
        if {"task", "task_label"} & view.needs(key) and scenario is not None and scenario not in LABELLED:
            view.refuse(
                key,
                f"a router that needs no task label in scenario '{scenario}' (or `stream.scenario: task`)",
                f"'{router}', which needs it",
            )


def tasks_before_they_are_learned(view: View) -> None:
    for key, _ in view.routers():
        if view.options(key).get("unassigned") == "error":
            view.refuse(
                f"{key}.unassigned", "'modulo' or 'latest', as a run evaluates tasks before they are learned", "'error'"
            )


def label_for_loss(view: View) -> None:
    native = next((n for k, n in view.strategies() if view.attribute(k, "owns_loop", False)), None)
    for key, _ in view.routers() if native else ():
        if weight := view.options(key).get("mutual_information"):
            view.refuse(f"{key}.mutual_information", f"0 with '{native}', whose loop gives no task labels", str(weight))


def tokens_for_router(view: View) -> None:
    # a layer itself knows which tokens are of one sequence: those of one sample
    given = {"task", "task_label", "sequence", *view.attribute("model", "gives", ())}
    for key, router in view.routers():
        if lacking := sorted(view.needs(key) - given):
            view.refuse(
                key,
                f"a router that '{view.plan.model['name']}' has everything for",
                f"'{router}', which needs {' and '.join(lacking)}",
            )


def label_for_strategy(view: View) -> None:
    scenario = view.plan.stream.get("scenario")
    if infers_task(view) and scenario != "online":
        return
    for key, name in view.strategies():
        needs = view.needs(key)
        if {"task", "task_label"} & needs and scenario is not None and scenario not in LABELLED:
            view.refuse(
                key, f"a strategy that needs no task label in scenario '{scenario}'", f"'{name}', which needs it"
            )


def boundaries_for_strategy(view: View) -> None:
    if view.plan.stream.get("scenario") != "online":
        return
    for key, name in view.strategies():
        if view.attribute(key, "needs_boundaries", False):
            view.refuse(
                key,
                "a strategy that needs no experience boundaries in scenario 'online' (one pass with known boundaries is "
                "scenario 'class' with trainer.epochs=1)",
                f"'{name}', which needs them",
            )


def experts_for_strategy(view: View) -> None:
    later = any(name == "upcycle" for _, name in view.strategies())
    for key, name in view.strategies():
        wanted = not later and (name == "expand" or "moe" in view.needs(key))
        if wanted and view.plan.model["moe"] is None:
            view.refuse(
                "model.moe", f"experts, which strategy '{name}' works on (such as `moe: {{experts: 4}}`)", "none"
            )


def isolated_head_is_apart(view: View) -> None:
    for key, name in view.strategies():
        if name != "expand" or view.attribute("stream", "modality") == "bytes":
            continue
        i = int(key.partition(".")[2])
        isolate = view.plan.strategy[i].get("isolate")
        if isolate is None:
            isolate = "task" in view.needs("model.moe.router")
        head = view.plan.model["head"]
        if head == "auto":
            head = "multi" if view.plan.stream.get("scenario") == "task" else "shared"
        if isolate and head == "shared":
            view.refuse("model.head", f"'multi' or 'growing' with {key}.isolate, which freezes old outputs", "'shared'")


def multi_head_has_label(view: View) -> None:
    scenario = view.plan.stream.get("scenario")
    if view.plan.model["head"] == "multi" and scenario is not None and scenario not in LABELLED:
        view.refuse(
            "model.head", f"'shared' or 'growing' in scenario '{scenario}', which gives no task label", "'multi'"
        )


def task_outputs_have_label(view: View) -> None:
    scenario = view.plan.stream.get("scenario")
    if view.plan.model["eval_outputs"] == "task" and scenario is not None and scenario not in LABELLED:
        view.refuse(
            "model.eval_outputs", f"'all' or 'seen' in scenario '{scenario}', which gives no task label", "'task'"
        )


def whole_vocabulary(view: View) -> None:
    if view.attribute("stream", "modality") != "bytes":
        return
    for key in ("train_outputs", "eval_outputs"):
        if view.plan.model[key] != "all":
            view.refuse(
                f"model.{key}", "'all' for language modelling, whose outputs are the bytes", repr(view.plan.model[key])
            )


def online_is_one_pass(view: View) -> None:
    if view.plan.stream.get("scenario") == "online" and view.plan.trainer["epochs"] != 1:
        view.refuse("trainer.epochs", "1 in the online scenario, which is one pass", str(view.plan.trainer["epochs"]))


def experiment_has_name(view: View) -> None:
    if not view.plan.experiment.strip():
        view.refuse("experiment", "a name", repr(view.plan.experiment))


def tracking_is_known(view: View) -> None:
    uri = view.plan.tracking["uri"]
    if uri and uri.partition(":")[0].partition("+")[0] not in TRACKING:
        view.refuse("tracking.uri", f"an address that begins with {', '.join(TRACKING)}", f"'{uri}'")


def one_device(view: View) -> None:
    if view.plan.trainer["devices"] != 1:
        view.refuse("trainer.devices", "1, more devices are not supported yet", str(view.plan.trainer["devices"]))


def threads_of_machine(view: View) -> None:
    # more than the processors is slow and allowed (the run may come from a larger machine); a process cannot start any
    # number of them
    most = max(64, 4 * (os.cpu_count() or 1))
    if view.plan.trainer["threads"] > most:
        view.refuse("trainer.threads", f"at most {most} on this machine", str(view.plan.trainer["threads"]))


def one_clipping(view: View) -> None:
    if view.plan.trainer["clip_norm"] and view.plan.trainer["clip_value"]:
        view.refuse(
            "trainer.clip_value",
            "0 beside trainer.clip_norm, gradients are clipped one way",
            str(view.plan.trainer["clip_value"]),
        )


def dispatch_has_precision(view: View) -> None:
    moe = view.plan.model["moe"]
    if moe and moe["dispatch"] == "grouped" and view.plan.trainer["precision"] == "64-true":
        view.refuse(
            "model.moe.dispatch",
            "'auto', 'loop' or 'bmm' with trainer.precision '64-true'",
            "'grouped', which has no float64",
        )


def validation_is_held_out(view: View) -> None:
    if view.plan.evaluation["split"] == "validation" and view.plan.stream.get("validation") == 0:
        view.refuse("evaluation.split", "'test', as stream.validation is 0 and holds nothing out", "'validation'")


RULES: tuple[Callable[[View], None], ...] = (
    each_strategy_once,
    one_owner_of_data,
    one_owner_of_predict,
    one_inference_of_the_task,
    one_owner_of_gradients,
    owner_of_loop_alone,
    native_loop_has_no_extras,
    nesterov_has_momentum,
    scenario_of_task,
    modality_of_backbone,
    causal_router,
    assignments_for_options,
    units_of_experts,
    attention_by_experts,
    load_has_noise,
    frozen_beside_new_weights,
    label_for_router,
    label_for_loss,
    tasks_before_they_are_learned,
    tokens_for_router,
    label_for_strategy,
    boundaries_for_strategy,
    experts_for_strategy,
    isolated_head_is_apart,
    multi_head_has_label,
    task_outputs_have_label,
    whole_vocabulary,
    online_is_one_pass,
    experiment_has_name,
    tracking_is_known,
    one_device,
    threads_of_machine,
    one_clipping,
    dispatch_has_precision,
    validation_is_held_out,
)
