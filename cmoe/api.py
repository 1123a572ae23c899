"""Starting and resuming runs, for the command line and for Python alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmoe.config.plan import Plan
from cmoe.config.study import read_study
from cmoe.errors import UserError
from cmoe.plugins import Catalogue
from cmoe.reporting import Reporter
from cmoe.rundir import RunFolder, create, find, now, writable, write_whole
from cmoe.streams.data import DataFolder, data_folder

if TYPE_CHECKING:
    from cmoe.tracking.store import Location

Stop = Callable[[], bool]


def plan_of(
    config: str | Path | Mapping[str, Any], overrides: Sequence[str] = (), plugins: Sequence[str | Path] = ()
) -> tuple[Plan, Catalogue]:
    """A checked plan and the catalogue that it was checked against.

    Raises:
        UserError: anything in it is wrong.
    """
    catalogue = Catalogue(plugins)
    plans = read_study(config, overrides, catalogue).plans
    if len(plans) > 1:
        names = ", ".join(p.label for p in plans)
        raise UserError(f"{config}: expected one run, got the variants {names}; pick one with strategy=…")
    return plans[0], catalogue


def start(
    plan: Plan, catalogue: Catalogue, data: DataFolder, reporter: Reporter | None = None, stop: Stop | None = None
) -> dict[str, Any]:
    """Train a plan as a new run; returns its facts (`run.json`).

    Raises:
        UserError: the data or a component refuses the plan; no run is left behind.
        RunFailed: training could not go on; the run is kept.
        Interrupted: `stop` said so; the run is kept.
    """
    return start_in(plan, new_run(plan), catalogue, data, reporter, stop)


def start_in(
    plan: Plan,
    folder: RunFolder,
    catalogue: Catalogue,
    data: DataFolder,
    reporter: Reporter | None = None,
    stop: Stop | None = None,
) -> dict[str, Any]:
    """`start` in a folder that `new_run` made, for callers that must know the run's id."""
    try:
        with folder.working():
            folder.update(data_root=str(data.root))
            return _train(plan, folder, catalogue, data, reporter, stop)
    except UserError:
        _forget_unstarted(folder)
        raise


def prepare_tracking(plan: Plan) -> None:
    """Create the tracking database under the plan's root where there is none yet: seconds that are no run's own."""
    from cmoe.tracking.store import locate, prepare

    if plan.tracking["enabled"]:
        writable(Path(plan.tracking["root"]))
        prepare(locate(plan.tracking["root"], plan.tracking["uri"]))


def new_run(plan: Plan) -> RunFolder:
    """The folder of a new run, with its configuration and first facts."""
    from cmoe.tracking.store import locate

    root = Path(plan.tracking["root"])
    folder = create(root, plan.experiment, plan.label, plan.seed, plan.hash)
    write_whole(folder.path / "config.yaml", plan.to_yaml())
    location = locate(root, plan.tracking["uri"])
    folder.update(
        run_id=folder.id,
        experiment=plan.experiment,
        label=plan.label,
        strategy=plan.strategies,
        seed=plan.seed,
        status="CREATED",
        created=now(),
        server=location.name if plan.tracking["enabled"] and not location.local else None,
        config_hash=plan.hash,
        config=plan.to_dict(),
    )
    return folder


def resume(
    folder: RunFolder,
    data: DataFolder | None = None,
    reporter: Reporter | None = None,
    stop: Stop | None = None,
    anyway: bool = False,
    plugins: Sequence[str | Path] = (),
) -> dict[str, Any]:
    """Go on with an interrupted, killed or failed run; a finished one only has its tracking delivered.

    Raises:
        UserError: the data, the machine or the versions changed since the run began (unless `anyway`).
    """
    with folder.working():
        plan, catalogue = plan_of_run(folder, plugins)
        if folder.facts().get("status") == "FINISHED":
            _commit_log(folder)
            deliver_rest(folder)
            return folder.facts()
        return _train(plan, folder, catalogue, data or data_of_run(folder), reporter, stop, anyway)


def extend(
    folder: RunFolder,
    task: str | int | Mapping[str, Any],
    data: DataFolder | None = None,
    reporter: Reporter | None = None,
    stop: Stop | None = None,
    anyway: bool = False,
    plugins: Sequence[str | Path] = (),
) -> dict[str, Any]:
    """Let a finished run learn further experiences; its matrix grows.

    Args:
        folder: of a finished run.
        task: 'next' (one more experience of its own stream, when `stream.limit` left some), how many more, 'all',
            or a task by name or as a mapping with options, whose experiences follow.
        data, reporter, stop, anyway, plugins: as for `resume`.

    Raises:
        UserError: the run is not finished, has nothing left, or the task does not fit it.
    """
    with folder.working():
        plan, catalogue = plan_of_run(folder, plugins)
        where = data or data_of_run(folder)
        longer = _longer(folder, plan, catalogue, task, where, plugins)

        return _train(longer, folder, catalogue, where, reporter, stop, anyway)


def _longer(
    folder: RunFolder,
    plan: Plan,
    catalogue: Catalogue,
    task: str | int | Mapping[str, Any],
    data: DataFolder,
    plugins: Sequence[str | Path],
) -> Plan:
    """The plan of an extended run.

    Raises:
        UserError: see `extend`.
    """
    status = folder.facts().get("status")
    if status != "FINISHED":
        raise UserError(f"run {folder.id}: expected a finished run, it is {status}; resume it first")
    for name in (s["name"] for s in plan.strategy):
        entry = catalogue.find("strategy", name)
        if entry.attribute("owns_loop", False) or not entry.attribute("extendable", True):
            raise UserError(f"run {folder.id}: strategy '{name}' cannot go on, it has no state between experiences")
    config = plan.to_dict()
    stream = config["stream"]
    if isinstance(task, int) or task in ("next", "all") or (isinstance(task, str) and task.isdecimal()):
        stream["limit"] = _further(folder, plan, catalogue, data, task)
    else:
        spec = {"name": task} if isinstance(task, str) else dict(task)
        if stream["limit"]:
            raise UserError(f"run {folder.id}: its own stream is not complete; extend it with task=all first")
        stream["then"] = [*stream["then"], spec]
    return Plan.from_dict(config, Catalogue([*config.get("plugins", []), *plugins]), "extend")


def _further(folder: RunFolder, plan: Plan, catalogue: Catalogue, data: DataFolder, task: str | int | Any) -> int:
    """The new `stream.limit`; 0 when it is all."""
    from cmoe.assembly import make_stream

    have = len(make_stream(plan, catalogue, data).experiences)
    done = plan.stream["limit"] or have
    wanted = have if task == "all" else done + (1 if task == "next" else int(task))
    if done >= have:
        raise UserError(
            f"run {folder.id}: it learned all {have} experiences of its stream; name a task, as in task=arrays"
        )
    if not done < wanted <= have:
        raise UserError(f"run {folder.id}: expected 1 to {have - done} further experiences, got {task}")
    return 0 if wanted == have else wanted


def _commit_log(folder: RunFolder) -> None:
    """Commit the log of a run that was killed after it counted as finished; the log was complete before that."""
    from cmoe.tracking import deliver

    length = folder.wal.stat().st_size
    if deliver.committed(folder.path) < length:
        deliver.commit(folder.path, length)


def deliver_rest(folder: RunFolder, uri: str | None = None) -> int:
    """Deliver what the tracking server does not have yet; returns the bytes of the log that went out.

    Raises:
        ConnectionError: the server cannot be reached.
    """
    from cmoe.tracking import deliver

    facts = folder.facts()
    location = server_of(folder, uri)
    if location is None:
        return 0
    return deliver.sync(folder.path, folder.id, facts["experiment"], location)


def server_of(folder: RunFolder, uri: str | None = None) -> Location | None:
    """Where the run's tracking goes; None where the run wants none and no `uri` is given."""
    from cmoe.tracking.store import locate

    facts = folder.facts()
    tracking = facts.get("config", {}).get("tracking", {})
    if not tracking.get("enabled", True) and uri is None:
        return None
    return locate(folder.path.resolve().parents[1], uri or tracking.get("uri"), facts.get("server"))


def data_of_run(folder: RunFolder) -> DataFolder:
    """Where the run's data was when it began, unless the environment names another place now."""
    recorded = folder.facts().get("data_root")
    return data_folder() if recorded is None else data_folder(recorded)


def plan_of_run(folder: RunFolder, plugins: Sequence[str | Path] = ()) -> tuple[Plan, Catalogue]:
    """A run's plan, checked again against the components as they are now."""
    config = folder.facts()["config"]
    catalogue = Catalogue([*config.get("plugins", []), *plugins])
    return Plan.from_dict(config, catalogue, str(folder.path / "run.json")), catalogue


def _train(
    plan: Plan,
    folder: RunFolder,
    catalogue: Catalogue,
    data: DataFolder,
    reporter: Reporter | None,
    stop: Stop | None,
    anyway: bool = False,
) -> dict[str, Any]:
    """The whole road for a run that this process holds."""
    from cmoe.runner import train
    from cmoe.session import Session

    session = Session(plan, folder, catalogue, data, reporter or Reporter(), anyway, stop)
    with session.watched():
        return train(session)


def _forget_unstarted(folder: RunFolder) -> None:
    """Remove the folder of a run that the data or a component refused before it had any state."""
    import shutil

    if not folder.state.exists():
        shutil.rmtree(folder.path, ignore_errors=True)


def run(
    config: str | Path | Mapping[str, Any],
    *overrides: str,
    data: str | Path | None = None,
    plugins: Sequence[str | Path] = (),
    reporter: Reporter | None = None,
) -> RunFolder:
    """Train a configuration from start to end.

        import cmoe
        run = cmoe.run("quickstart", "strategy=replay", "seed=1")
        print(run.facts()["metrics"]["class_il/acc_macro"])

    Args:
        config: a file, the name of a configuration that comes with cmoe, or a mapping with the same content.
        overrides: `key=value` as on the command line.
        data: where data sets are; default `$CMOE_DATA`, else `~/.cache/cmoe`.
        plugins: folders with task plugins.
        reporter: told what happens.

    Raises:
        UserError: the input was wrong.
        RunFailed: training could not go on; `cmoe.resume` can try again.
    """
    plan, catalogue = plan_of(config, overrides, plugins)
    facts = start(plan, catalogue, data_folder(data), reporter)
    return find(Path(plan.tracking["root"]), facts["run_id"])
