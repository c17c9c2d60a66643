"""The report of a run in lines."""

from __future__ import annotations

from typing import Any

from ....common.amounts import duration

#: Of a reason; --json has all of it.
_WIDEST = 200


def lines(report: dict[str, Any]) -> list[str]:
    """What ``sla-job show`` prints: how the run is, and its attempts."""
    rows = {
        "state": _state(report),
        "iteration": _iteration(report),
        "loss": None if report["loss"] is None else f"{report['loss']:.6g}",
        "tokens/s": _both(report["tokens_per_second"], "{:,.0f}", {"now": "now", "attempt": "over the attempt"}),
        "time left": _both(
            {name: None if left is None else duration(left) for name, left in report["seconds_left"].items()},
            "{}",
            {"training": "of training", "job": "of the job"},
        ),
        "checkpoint": _checkpoint(report["checkpoint"]),
    }
    shown = [f"{name:<12}{value}" for name, value in rows.items() if value]
    return [*shown, *(line for attempt in report["attempts"] for line in _attempt(attempt))]


def _state(report: dict[str, Any]) -> str:
    state, slurm = report["state"], report["slurm"]
    if report["saving"] is not None:
        state += f", saving iteration {report['saving']}"
    if slurm:
        known = "has ended" if slurm["state"] == "GONE" else slurm["state"]
        state += f" (job {slurm['job']}: {known}{', ' + slurm['reason'] if slurm['reason'] else ''})"
    return state


def _iteration(report: dict[str, Any]) -> str:
    done, total, ago = report["iteration"], report["train_iters"], report["seconds_since_iteration"]
    shown = f"{done}" if not total else f"{done} of {total} ({100 * done / total:.1f} %)"
    return shown if ago is None else f"{shown}, logged {duration(ago)} ago"


def _both(values: dict[str, Any], form: str, names: dict[str, str]) -> str:
    return ", ".join(f"{form.format(values[key])} {name}" for key, name in names.items() if values[key] is not None)


def _checkpoint(checkpoint: dict[str, Any] | None) -> str:
    if checkpoint is None:
        return "none yet"
    checked = checkpoint["checked"]
    said = "not looked into" if checked is None else f"looked into: {checked['damage'] or 'nothing wrong'}"
    return f"iteration {checkpoint['iteration']}, {duration(checkpoint['seconds_old'])} old, {said}"


def _attempt(attempt: dict[str, Any]) -> list[str]:
    until = f"{attempt['ended']} at iteration {attempt['ended_at']}, {attempt['how']}" if attempt["ended"] else "now"
    where = f"job {attempt['job']} on {attempt['nodes']}"
    shown = [f"{attempt['number']:3}  {where}: {attempt['began']} at {attempt['began_at']} to {until}"]
    if attempt["last_iteration"] is not None:
        lost = f", {attempt['lost_iterations']} of them lost" if attempt["lost_iterations"] else ""
        trained = f"iterations {attempt['first_iteration']} to {attempt['last_iteration']}"
        shown.append(f"     {trained} in {duration(attempt['seconds'])}{lost}")
    if attempt["reason"]:
        why = f"{attempt['rank'] + ': ' if attempt['rank'] else ''}{attempt['reason']}"
        shown.append(f"     {why if len(why) <= _WIDEST else why[: _WIDEST - 4] + ' ...'}")
    return shown
