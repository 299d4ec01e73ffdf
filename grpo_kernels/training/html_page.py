"""The frame of a page that opens from disk: its style, its one script, and a policy that lets it load nothing else."""

from __future__ import annotations

import base64
import hashlib
import html

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --card: #f6f7f9; --ink: #1c2128; --faint: #59636e; --rule: #d8dee4;
  --s0: #2563eb; --s1: #c2410c; --s2: #15803d; --s3: #7e22ce; --s4: #be123c; --s5: #0e7490; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14171c; --card: #1d2128; --ink: #e4e8ed; --faint: #9aa5b1; --rule: #353c46;
    --s0: #7aa7ff; --s1: #fb923c; --s2: #4ade80; --s3: #c084fc; --s4: #fb7185; --s5: #22d3ee; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 84rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2rem 0 .75rem; }
p { margin: .25rem 0; }
.faint, figcaption span { color: var(--faint); }
.note { border-left: 3px solid var(--s1); padding: .25rem .75rem; background: var(--card); }
.tiles, .charts { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 11rem), 1fr)); }
.charts { grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); }
.tile, figure, .sample { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; margin: 0;
  padding: .75rem; min-width: 0; }
figure { display: flex; flex-direction: column; justify-content: space-between; }
.tile strong { display: block; font-size: 1.25rem; font-variant-numeric: tabular-nums; }
figcaption b { margin-right: .5rem; }
svg { display: block; width: 100%; height: auto; overflow: visible; margin-top: .5rem; }
.s0 { --c: var(--s0); } .s1 { --c: var(--s1); } .s2 { --c: var(--s2); }
.s3 { --c: var(--s3); } .s4 { --c: var(--s4); } .s5 { --c: var(--s5); }
.line, .bar { fill: none; stroke: var(--c); stroke-width: 1.6; stroke-linejoin: round; stroke-linecap: round; }
.bar { stroke-width: 1; }
.mark { fill: var(--paper); stroke: var(--c); stroke-width: 1.6; }
.grid { stroke: var(--rule); stroke-width: 1; }
.tick { fill: var(--faint); font-size: 10.5px; }
.key { display: inline-block; margin-right: .75rem; font-size: .85rem; color: var(--faint); }
.key::before { content: ""; display: inline-block; width: 1em; height: 3px; margin-right: .35em; vertical-align: middle;
  background: var(--c); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { text-align: left; padding: .25rem .75rem .25rem 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
td { overflow-wrap: anywhere; }
th:first-child, td:first-child { min-width: 11rem; overflow-wrap: anywhere; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
th { font-weight: 600; color: var(--faint); }
summary { cursor: pointer; padding: .35rem 0; }
.sample { margin: 0 0 .75rem; }
.sample pre { margin: .15rem 0 .6rem; white-space: pre-wrap; overflow-wrap: anywhere; max-height: 30rem;
  overflow-y: auto; font: 13px/1.45 ui-monospace, monospace; }
.badge { display: inline-block; border: 1px solid var(--rule); border-radius: 99px; padding: 0 .6em;
  margin: 0 .35em .35em 0; font-size: .85rem; overflow-wrap: anywhere; }
.picker { display: flex; gap: .75rem; align-items: center; margin-bottom: .75rem; }
.picker input { flex: 1; min-width: 0; accent-color: var(--s0); }
.picker output { font-variant-numeric: tabular-nums; white-space: nowrap; }
"""

#: Without it every step is a <details> of its own; with it a slider shows one of them.
SCRIPT = """
const steps = [...document.querySelectorAll("#samples > details")];
if (steps.length > 1) {
  const picker = document.createElement("label");
  picker.className = "picker";
  const slider = Object.assign(document.createElement("input"),
    { type: "range", min: 0, max: steps.length - 1, value: steps.length - 1 });
  slider.setAttribute("aria-label", "optimizer step of the samples");
  const shown = document.createElement("output");
  const show = () => {
    steps.forEach((step, k) => { step.hidden = k != slider.value; step.open = !step.hidden; });
    shown.textContent = `step ${steps[slider.value].dataset.step} (${+slider.value + 1} of ${steps.length})`;
  };
  slider.addEventListener("input", show);
  picker.append(slider, shown);
  steps[0].before(picker);
  show();
}
"""


def page(title: str, body: str) -> str:
    """A whole HTML document.

    Its content security policy allows this module's style and script, known by their digests, and nothing else: were
    a text not escaped, it still could neither run nor load anything.

    Args:
        title: Plain text.
        body: HTML, in which every text is escaped already.
    """
    policy = f"default-src 'none'; style-src '{_digest(STYLE)}'; script-src '{_digest(SCRIPT)}'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
