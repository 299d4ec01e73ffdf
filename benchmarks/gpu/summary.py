"""The stages of a GPU run as Markdown: what became of each, and what it found beside tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from records import Results

from gpu.evidence import evidence


def lines(results: Results) -> list[str]:
    """The parts of a report: the stages, then their findings; empty for results without stages."""
    stages = results.extra.get("stages")
    if not stages:
        return []
    table = ["| stage | outcome |", "|---|---|", *(f"| {name} | {outcome(found)} |" for name, found in stages.items())]
    details = [
        f"- {name}, {kind}: {line}"
        for name, found in stages.items()
        for kind in ("left out", "failed")
        for line in found[kind.replace(" ", "_")]
    ]
    findings = [part for found in stages.values() for key, part in _findings(found["found"])]
    missed = [
        f"- {row.provider}, {row.title}: {row.over_floor:.2f}x, target {row.asked:.2f}x"
        for row in missed_targets(results)
    ]
    parts = ["\n".join(table), "\n".join(details), *findings]
    parts.append("\n".join(["Over the target:", "", *missed]) if missed else "")
    faster = [
        f"- {one.op}{f', V={one.vocab}' if one.vocab else ''}{'' if one.is_aligned else ', rows not aligned'}: "
        f"{one.ratio:.2f}x ({one.title})"
        for one in sorted(evidence(results), key=lambda one: (one.op, one.vocab))
    ]
    parts.append("\n".join(["CUDA's time over Triton's:", "", *faster]) if faster else "")
    return [part for part in parts if part]


def outcome(found: dict[str, Any]) -> str:
    """An entry in one line."""
    reason = f": {found['reason']}" if found["reason"] else ""
    return f"{found['status']}, {found['seconds']:.0f} s{reason}"


def missed_targets(results: Results) -> list[Any]:
    """The rows that took more than their target."""
    return [row for row in results.rows if row.asked is not None and (row.over_floor or 0) > row.asked]


def _findings(found: dict[str, Any]) -> Iterable[tuple[str, str]]:
    for key, value in found.items():
        if key in _SHOWN and value:
            yield key, _SHOWN[key](value)


def _card(card: dict[str, float]) -> str:
    return f"The card: {card['copy_tb_s']:.2f} TB/s of a copy, {card['gemm_tflop_s']:.0f} TFLOP/s of a bf16 GEMM."


def _checks(checks: dict[str, str]) -> str:
    failed = [f"- {name}: {text}" for name, text in checks.items() if text != "ok"]
    passed = f"Checks: {len(checks) - len(failed)} of {len(checks)} passed."
    return "\n".join([passed, *([""] if failed else []), *failed])


def _tests(tests: dict[str, Any]) -> str:
    counts = ", ".join(f"{count} {word.lower()}" for word, count in tests["counts"].items()) or "none ran"
    shown = [f"- {line}" for line in tests["lines"][:20]]
    return "\n".join([f"Tests of {tests['what']}: {counts}.", *([""] if shown else []), *shown])


def _currencies(rows: list[dict[str, Any]]) -> str:
    table = ["| head | by | longest sequence | peak at 8,192 tokens | ms at 8,192 tokens |", "|---|---|---|---|---|"]
    for row in rows:
        longest = f"{row['longest']:,}" if "longest" in row else "not measured"
        longest += "" if row.get("longest_is_measured", True) else " (by the slope of the peak)"
        peak, time = (f"{row[name]:.2f}" if name in row else "" for name in ("peak_gib", "ms"))
        table.append(f"| {row['model']} | {row['head']} | {longest} | {peak} GiB | {time} |")
    return "\n".join(table)


def _dram(rows: list[dict[str, Any]]) -> str:
    return "\n".join(
        f"- DRAM bytes of {row['kernel']}, N={row['N']} V={row['V']} bfloat16: {row['read'] / 1e9:.3f} GB read, "
        f"{row['written'] / 1e9:.3f} GB written, {row['ratio']:.3f} of the {row['counted'] / 1e9:.3f} GB that it must "
        f"move (target: within {row['target']:.0%})"
        for row in rows
    )


def _accuracy(rows: list[dict[str, Any]]) -> str:
    return "\n".join(
        f"- Error of {row['name']}: {row['error']:.3g}, of whole fp32 logits {row['reference']:.3g}, ratio "
        f"{row['ratio']:.2f} (target: at most {row['target']})"
        for row in rows
    )


def _curves(curves: dict[str, Any]) -> str:
    table = ["| logged by GRPOTrainer | ours against stock | stock against another seed |", "|---|---|---|"]
    table += [f"| {name} | {ours:.3g} | {other:.3g} |" for name, (ours, other) in curves["distances"].items()]
    return "\n".join([f"Mean distance of the curves over {curves['steps']} steps:", "", *table])


def _tuned(rows: list[dict[str, Any]]) -> str:
    return "\n".join(f"- Block sizes: {row}" for row in rows)


_SHOWN: dict[str, Callable[[Any], str]] = {
    "library": lambda text: f"CUDA library: {text}.",
    "auto": lambda auto: "\n".join(f'- "auto" takes {name} for {", ".join(ops)}' for name, ops in auto.items()),
    "checks": _checks,
    "card": _card,
    "currencies": _currencies,
    "dram": _dram,
    "accuracy": _accuracy,
    "curves": _curves,
    "tests": _tests,
    "tuned": _tuned,
}
