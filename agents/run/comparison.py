"""Several runs side by side: their returns, what groups of them say together, and which group ends above which."""

from __future__ import annotations

import csv
import glob
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional, arg

from agents import checkpoint
from agents.config import near
from agents.run import statistics
from agents.run.errors import RunError, UsageError
from agents.run.figures import plot_comparison
from agents.run.folder import RunFolder, read_rows
from agents.run.options import Flag
from agents.run.outputs import PLOTS, check_output
from agents.run.runs import find
from agents.run.statistics import Scored

Compare = Annotated[tuple[str, str] | None, arg(metavar="A B", help_behavior_hint="")]
FEW = 5
"""Seeds below which a bootstrap interval is known to be too narrow."""
METHOD = "IQM over seeds; 95 % intervals: SciPy's bootstrap of seeds within environments, as rliable's"


@dataclass(frozen=True)
class Comparison:
    """Compare runs by what they evaluated themselves: each one's last evaluation, and the way there."""

    runs: Positional[Annotated[tuple[str, ...], arg(metavar="RUN_OR_FOLDER")]] = ("runs",)
    """Runs, folders of runs or patterns such as 'runs/*/npg'; NAME=RUN gives those a name of their own. Others are
    named by their algorithm, and by hyperparameters in which they differ."""
    compare: Compare = None
    """Names of two groups, or runs as above: end in one sentence that says which is the better one."""
    plot: Annotated[str | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """Draw learning curves over steps and seconds, IQMs and performance profiles to this new .png, .pdf or .svg."""
    csv: Annotated[str | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """Write a row for each run to this new file."""
    json: Annotated[str | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """Write every run and all statistics to this new file."""
    debug: Flag = False
    """Show the traceback of an error."""


def compare(asked: Comparison, command: str) -> int:
    """Compare as asked; returns the exit code.

    Raises:
        UsageError: there are no such runs or groups, or a file cannot be written.
        RunError: no run was evaluated.
    """
    check_outputs(asked)
    are_runs = asked.compare is not None and all(map(glob.glob, asked.compare))  # and no groups: then those alone
    targets = (
        () if asked.compare and asked.runs == ("runs",) and (are_runs or not Path("runs").is_dir()) else asked.runs
    )
    scored = chosen(read_runs(targets), asked.compare, lambda pattern: read_runs((f"{pattern}={pattern}",)))
    show(scored, asked, command)
    return 0


def check_outputs(asked: Any) -> None:
    """Raise UsageError for a file that cannot be written."""
    for option, endings in {"plot": PLOTS, "csv": (".csv",), "json": ()}.items():
        check_output(f"--{option}", getattr(asked, option), endings)


def chosen(scored: list[Scored], pair: tuple[str, str] | None, read: Any) -> list[Scored]:
    """Give the runs that are compared, those of --compare among them, with groups that are told apart.

    Args:
        read: gives the runs that a name means which is no group's.
    """
    scored = told_apart(scored)
    for name in pair or ():
        if name not in {run.group for run in scored}:
            if not glob.glob(name):
                groups = sorted({run.group for run in scored})
                raise UsageError(f"--compare names {name!r}, which is no group and no run{near(name, groups)}")
            scored = [*scored, *read(name)]
    if not scored:
        raise RunError("There is no run with an evaluation; name runs, or folders that hold some.")
    return scored


def expanded(targets: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Give each target's name, "" for none, and the paths that it means.

    Raises:
        UsageError: it means none.
    """
    for target in targets:
        name, _, pattern = target.rpartition("=") if not Path(target).exists() else ("", "", target)
        paths = sorted(glob.glob(pattern))
        if not paths:
            raise UsageError(f"There is no {pattern}; name a run, a folder of runs or a pattern in quotation marks.")
        yield name, paths


def read_runs(targets: Sequence[str]) -> list[Scored]:
    """Read what the runs that targets mean evaluated; a run that has no evaluation yet is left out."""
    found: dict[Path, Scored] = {}
    for name, paths in expanded(targets):
        for run in find([path for path in paths if Path(path).is_dir()]):
            rows, own = read_rows(run.folder.evaluations), run.settings
            if not rows:
                continue
            last = rows[-1]
            found[run.folder.path.resolve()] = Scored(
                path=str(run.folder.path),
                env=own.run.env,
                algorithm=own.algorithm,
                group=name,
                seed=own.run.seed,
                steps=int(last["steps"]),
                seconds=float(last["seconds"]),
                episodes=int(last["episodes"]),
                score=float(last["mean"]),
                interval=(float(last["lower"]), float(last["upper"])),
                finished=run.state == "finished",
                settings={**own.config, "policy": own.run.policy, "env_kwargs": own.run.env_kwargs},
                curve=curve_of(run.folder),
            )
    return sorted(found.values(), key=lambda run: (run.env, run.algorithm, run.seed))


def curve_of(folder: RunFolder) -> dict[str, np.ndarray]:
    """Give what a run's evaluations on the way say: "steps", "seconds" and "mean", [E] each; {} if there is none."""
    rows = read_rows(folder.evaluations)
    names = ("steps", "seconds", "mean") if rows else ()
    return {name: np.array([float(row[name]) for row in rows]) for name in names}


def told_apart(runs: Sequence[Scored]) -> list[Scored]:
    """Name the groups of runs that have no name: by algorithm, and by what differs within one in an environment."""
    named = []
    for run in runs:
        if run.group:
            named.append(run)
            continue
        alike = [one.settings for one in runs if (one.env, one.algorithm, one.group) == (run.env, run.algorithm, "")]
        keys = dict.fromkeys(key for settings in alike for key in settings)
        differ = [key for key in keys if any(one.get(key) != alike[0].get(key) for one in alike)]
        parts = [run.algorithm, *(f"{key}={_short(run.settings.get(key))}" for key in differ)]
        named.append(replace(run, group=" ".join(parts)))
    return named


def normalized(runs: Sequence[Scored]) -> dict[str, dict[str, np.ndarray]]:
    """Give scores by group and environment, [n] each: returns where there is one environment; of several, 0 is the mean
    of the runs' first policies, or their lowest score if nothing is known of these, and 1 their highest score.
    """
    envs = list(dict.fromkeys(run.env for run in runs))
    found: dict[str, dict[str, np.ndarray]] = {}
    for env in envs:
        here = [run for run in runs if run.env == env]
        firsts = [run.curve["mean"][0] for run in here if run.curve and run.curve["steps"][0] == 0]
        low, high = 0.0, 1.0
        if len(envs) > 1:
            low = float(np.mean(firsts)) if firsts else min(run.score for run in here)
            high = max(run.score for run in here)
        for group in dict.fromkeys(run.group for run in here):
            scores = np.array([run.score for run in here if run.group == group])
            found.setdefault(group, {})[env] = (scores - low) / ((high - low) or 1.0)
    return found


def pooled(scores: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Sum up a group's scores by environment."""
    strata = list(scores.values())
    values = np.concatenate(strata)
    low, high = statistics.stratified_interval(statistics.iqm, *strata)
    return {
        "runs": len(values),
        "iqm": float(statistics.iqm(values)),
        "interval": [float(low), float(high)],
        "mean": float(values.mean()),
        "median": float(np.median(values)),
        "min": float(values.min()),
        "max": float(values.max()),
    }


def pairs(scores: Mapping[str, Mapping[str, np.ndarray]]) -> list[dict[str, Any]]:
    """Say for each two groups how often a run of the first ends above one of the second, where both ran."""
    found = []
    for a, b in itertools.combinations(scores, 2):
        if envs := [env for env in scores[a] if env in scores[b]]:
            x, y = ([scores[group][env] for env in envs] for group in (a, b))
            probability, interval = statistics.improvement(x, y)
            low, high = map(float, interval)
            found.append({"a": a, "b": b, "envs": envs, "probability": probability, "interval": [low, high]})
    return found


def sentence(a: str, b: str, scores: Mapping[str, Mapping[str, np.ndarray]]) -> str:
    """Say which of two groups is the better one, and how sure that is.

    Raises:
        UsageError: there is no environment in which both ran.
    """
    envs = [env for env in scores[a] if env in scores[b]]
    if not envs:
        raise UsageError(f"{a} and {b} ran in no environment together; compare runs of the same ones.")
    x, y = ([scores[group][env] for env in envs] for group in (a, b))
    one, other = (float(statistics.iqm(np.concatenate(part))) for part in (x, y))
    if one < other:
        a, b, x, y, one, other = b, a, y, x, other, one
    low, high = statistics.difference(statistics.iqm, x, y)
    probability, (least, most) = statistics.improvement(x, y)
    n, m = (sum(map(len, part)) for part in (x, y))
    where = f"on {envs[0]}" if len(envs) == 1 else f"over {len(envs)} environments (normalized scores)"
    if np.isnan(low):
        verdict = f"{a} ended above {b} {where}, but one seed says nothing of how runs differ"
    elif low > 0:
        verdict = f"{a} is better than {b} {where}"
    else:
        verdict = f"{a} and {b} cannot be told apart {where}"
    places = 1 if len(envs) == 1 else 3
    known = "" if np.isnan(low) else f" (95 % interval {low:,.{places}f} to {high:,.{places}f})"
    sure = "" if np.isnan(low) else f" ({least:.2f} to {most:.2f})"
    few = f" Fewer than {FEW} seeds: such intervals are too narrow." if low > 0 and min(map(len, x + y)) < FEW else ""
    return (
        f"{verdict}: an IQM of {one:,.{places}f} from {_count(n)} against {other:,.{places}f} from {_count(m)}, "
        f"{one - other:,.{places}f} more{known}; a run of {a} ends above one of {b} with probability "
        f"{probability:.2f}{sure}.{few}"
    )


def show(runs: Sequence[Scored], asked: Any, command: str) -> None:
    """Print the tables, write the files that are asked for, and end in the sentence of two groups."""
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = max(console.width, 120)
    scores = normalized(runs)
    by_env = {env: normalized([run for run in runs if run.env == env]) for env in dict.fromkeys(r.env for r in runs)}
    found = {env: {group: pooled(own) for group, own in groups.items()} for env, groups in by_env.items()}
    if len(by_env) > 1:
        found["all, normalized"] = {group: pooled(own) for group, own in scores.items()}
    console.print(_table_of_runs(runs), "")
    console.print(_table_of_groups(found), "")
    beaten = pairs(scores)
    if beaten:
        console.print(_table_of_pairs(beaten), "")
    for note in _notes(runs, scores):
        console.print(note, style="dim", soft_wrap=True)
    record = {
        "command": command,
        "method": METHOD,
        "resamples": statistics.RESAMPLES,
        "groups": found,
        "improvement": beaten,
        "runs": [
            {**_row(run), "returns": run.returns, "curve": {name: x.tolist() for name, x in run.curve.items()}}
            for run in runs
        ],
        "versions": checkpoint.versions(),
    }
    if asked.csv:
        _write_csv(Path(asked.csv), runs)
        console.print(f"runs        {asked.csv}", soft_wrap=True)
    if asked.json:
        Path(asked.json).write_text(json.dumps(_without_nan(record), indent=1) + "\n")
        console.print(f"statistics  {asked.json}", soft_wrap=True)
    if asked.plot:
        plot_comparison(runs, scores, Path(asked.plot))
        console.print(f"plot        {asked.plot}", soft_wrap=True)
    if asked.compare or (len(scores) == 2 and beaten):
        first, second = asked.compare or scores
        console.print(sentence(first, second, scores), style="bold")


def _table_of_runs(runs: Sequence[Scored]) -> Table:
    table = _table("task", "group", "seed:", "steps:", "time:", "return:", "95 %, episodes:")
    for run in sorted(runs, key=lambda run: (run.env, run.group, run.seed)):
        low, high = run.interval
        steps = f"{run.steps:,}" + ("" if run.finished else " *")
        minutes = "-" if np.isnan(run.seconds) else f"{run.seconds / 60:,.1f} min"
        table.add_row(
            run.env, run.group, str(run.seed), steps, minutes, f"{run.score:,.1f}", f"{low:,.0f} to {high:,.0f}"
        )
    return table


def _table_of_groups(found: Mapping[str, Mapping[str, dict[str, Any]]]) -> Table:
    table = _table("task", "group", "runs:", "IQM:", "95 %, seeds:", "median:", "min:", "max:")
    for env, groups in found.items():
        places = 3 if env.startswith("all") else 1
        for group, own in sorted(groups.items(), key=lambda item: -item[1]["iqm"]):
            low, high = own["interval"]
            interval = "-" if np.isnan(low) else f"{low:,.{places}f} to {high:,.{places}f}"
            numbers = (f"{own[name]:,.{places}f}" for name in ("median", "min", "max"))
            table.add_row(env, group, str(own["runs"]), f"{own['iqm']:,.{places}f}", interval, *numbers)
    return table


def _table_of_pairs(found: Sequence[dict[str, Any]]) -> Table:
    table = _table("group", "ends above", "with probability:", "95 %, seeds:")
    for pair in found:
        low, high = pair["interval"]
        known = "-" if np.isnan(low) else f"{low:.2f} to {high:.2f}"
        table.add_row(pair["a"], pair["b"], f"{pair['probability']:.2f}", known)
    return table


def _table(*headings: str) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    for heading in headings:
        right = heading.endswith(":")
        table.add_column(heading.rstrip(":"), justify="right" if right else "left", overflow="fold")
    return table


def _notes(runs: Sequence[Scored], scores: Mapping[str, Mapping[str, np.ndarray]]) -> Iterator[str]:
    yield METHOD + "."
    if len({run.env for run in runs}) > 1:
        yield "Of several environments 0 is the policy before training and 1 the highest score of these runs."
    if unfinished := sum(not run.finished for run in runs):
        yield f"* {unfinished} of the runs not finished: their last evaluation counts."
    for env in dict.fromkeys(run.env for run in runs):
        steps = {run.steps for run in runs if run.env == env and run.finished}
        if steps and max(steps) > 1.1 * min(steps):
            yield f"{env}: runs made between {min(steps):,} and {max(steps):,} steps; compare those of one length."


def _row(run: Scored) -> dict[str, Any]:
    names = ("path", "env", "algorithm", "group", "seed", "steps", "seconds", "episodes", "score", "finished")
    return {name: getattr(run, name) for name in names} | {"lower": run.interval[0], "upper": run.interval[1]}


def _write_csv(file: Path, runs: Sequence[Scored]) -> None:
    rows = [_row(run) for run in runs]
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _without_nan(value: Any) -> Any:
    """Put None, JSON's null, in place of numbers that are none."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and np.isnan(value) else value


def _short(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value)) or "-"
    return str(value)


def _count(n: int) -> str:
    return f"{n} run" if n == 1 else f"{n} runs"
