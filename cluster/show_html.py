"""A page of transcripts: one HTML file, no script, nothing from elsewhere; a soft token's mixture opens on hover, tap or Tab."""

from collections.abc import Sequence
from html import escape
from statistics import fmean

from cluster.show import Step, Transcript

HOT = 2.0  # nats, from which on a token is in full colour
CHART = 60  # height of the entropy chart

STYLE = """
:root { color-scheme: light dark;
  --ink: #1d1c1a; --paper: #fcfbf8; --dim: #6d6961; --line: #dedad0; --card: #fff; --heat: 226,112,20; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e9e6df; --paper: #191816; --dim: #a09b90; --line: #3a3732; --card: #24221f; --heat: 240,130,40; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 2rem 1.25rem 16rem; background: var(--paper); color: var(--ink);
       font: 1rem/1.6 system-ui, sans-serif; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin: 2.5rem 0 .25rem; border-top: 1px solid var(--line); padding-top: 1.5rem; }
.dim, figcaption, summary { color: var(--dim); font-size: .875rem; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; font: .95rem/1.9 ui-monospace, monospace; margin: 1rem 0; }
.forced { color: var(--dim); } .answer { font-weight: 700; }
.t { background: rgba(var(--heat), calc(var(--h) * .7)); border-radius: .2rem; }
.t:hover, .t:focus { outline: 2px solid rgb(var(--heat)); }
.line::before { content: "\\21b5"; color: var(--dim); }
.card { display: none; position: fixed; left: 50%; bottom: 1rem; translate: -50%; width: min(30rem, 94vw); padding: .75rem 1rem;
        background: var(--card); color: var(--ink); border: 1px solid var(--line); border-radius: .5rem;
        box-shadow: 0 .25rem 1rem rgba(0, 0, 0, .25); font: 400 .85rem/1.5 ui-monospace, monospace; white-space: pre; }
.head { display: flex; flex-wrap: wrap; gap: 0 1.5rem; color: var(--dim); margin-bottom: .25rem; }
.t:focus .card { display: block; z-index: 1; } .t:hover .card { display: block; z-index: 2; }
.row { display: grid; grid-template-columns: 9rem 1fr 3.5rem; gap: .5rem; align-items: center; }
.row > * { overflow: hidden; text-overflow: ellipsis; } .row > :last-child { text-align: right; }
.bar { display: block; height: .6rem; border-radius: .2rem; background: rgb(var(--heat)); }
figure { margin: 1rem 0; } svg { width: 100%; height: 60px; border-bottom: 1px solid var(--line); display: block; }
polyline { fill: none; stroke: rgb(var(--heat)); stroke-width: 1.5; vector-effect: non-scaling-stroke; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font: .8rem/1.4 ui-monospace, monospace; }
th, td { text-align: left; padding: .1rem .75rem .1rem 0; white-space: pre; border-bottom: 1px solid var(--line); }
td.number, th.number { text-align: right; } .overview { margin-top: 1.5rem; } a { color: inherit; }
"""


def page(run: str, transcripts: Sequence[Transcript]) -> str:
    """The whole HTML text."""
    first = transcripts[0]
    title = f"{run}: problem {first.problem} of {first.evaluation}"
    top = max([HOT, *(step.entropy for transcript in transcripts for step in transcript.steps)])  # one scale for all charts
    sections = "\n".join(_section(transcript, top) for transcript in transcripts)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_text(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{_text(title)}</h1>
<p class="dim">The text of a soft thought is its shadow: the most probable token of each mixture. The warmer a token, the higher the
entropy of its mixture, in full colour from {HOT:g} nats. Point at a token, or reach it with Tab, to see what was mixed.</p>
<details><summary>Prompt</summary><div class="text">{_text(first.prompt)}</div></details>
{_overview(transcripts)}
{sections}
</body>
</html>
"""


def _overview(transcripts: Sequence[Transcript]) -> str:
    """A row for each setting, with the way to its section."""
    rows = "\n".join(
        f'<tr><td><a href="#{transcript.setting}">{_text(transcript.setting)}</a></td>'
        f"<td>{_text(transcript.verdict.partition(' (')[0])}</td>"
        f'<td class="number">{len(transcript.steps)}</td><td class="number">{_mean_entropy(transcript)}</td>'
        f"<td>{_text(transcript.answer)}</td></tr>"
        for transcript in transcripts
    )
    head = '<tr><th>setting</th><th></th><th class="number">CoT</th><th class="number">entropy</th><th>answer</th></tr>'
    caption = '<p class="dim">CoT in tokens; entropy in nats, mean over the soft steps.</p>'
    return f'<div class="wide overview"><table>\n{head}\n{rows}\n</table></div>{caption}'


def _mean_entropy(transcript: Transcript) -> str:
    """Over the soft steps; a hard thought has none."""
    entropies = [step.entropy for step in transcript.steps if step.top]
    return f"{fmean(entropies):.3f}" if entropies else "-"


def _section(transcript: Transcript, top: float) -> str:
    thought = "".join(_token(t, step) if step.top else _text(step.text) for t, step in enumerate(transcript.steps))
    parts = [
        f'<section id="{transcript.setting}">\n<h2>{_text(transcript.setting)}</h2>',
        f'<p class="dim">{_text(transcript.verdict)}</p>',
        f'<div class="text">{thought}<span class="forced">{_text(transcript.prefill)}</span>'
        f'<span class="answer">{_text(transcript.answer)}</span></div>',
    ]
    if transcript.soft:
        parts += [_chart(transcript.steps, top), _table(transcript.steps)]
    return "\n".join([*parts, "</section>"])


def _token(t: int, step: Step) -> str:
    """A token of the shadow text with the card of its mixture. An empty one still shows that it is there."""
    heat = min(1.0, step.entropy / HOT)
    head = f"step {t}", f"entropy {step.entropy:.3f} nats", f"{step.support_size} tokens", f"{step.dropped_mass:.1e} dropped"
    rows = "".join(
        f'<span class="row"><span>{_text(repr(token))}</span><span><span class="bar" style="width:{100 * weight:.1f}%">'
        f"</span></span><span>{weight:.3f}</span></span>"
        for token, weight in step.top
    )
    card = f'<span class="card"><span class="head">{"".join(f"<span>{part}</span>" for part in head)}</span>{rows}</span>'
    kind = "t line" if step.text.startswith("\n") else "t"  # a line break has nothing else to point at
    return f'<span class="{kind}" tabindex="0" style="--h:{heat:.2f}">{_text(step.text) or "&#8203;"}{card}</span>'


def _chart(steps: Sequence[Step], top: float) -> str:
    """Entropy by CoT index as a line over its whole width; `top` nats at the upper edge."""
    points = " ".join(f"{t},{CHART * (1 - step.entropy / top):.1f}" for t, step in enumerate(steps))
    caption = f"entropy by step, 0 to {top:.2f} nats; the highest is {max(step.entropy for step in steps):.2f}"
    width = max(len(steps) - 1, 1)
    return (
        f'<figure><svg viewBox="0 0 {width} {CHART}" preserveAspectRatio="none" role="img" aria-label="{caption}">'
        f'<polyline points="{points}"/></svg><figcaption>{caption}</figcaption></figure>'
    )


def _table(steps: Sequence[Step]) -> str:
    rows = "\n".join(
        f"<tr><td>{t}</td><td>{_text(repr(step.text))}</td><td>{step.entropy:.3f}</td><td>{step.support_size}</td>"
        f"<td>{_text('  '.join(f'{token!r} {weight:.3f}' for token, weight in step.top))}</td></tr>"
        for t, step in enumerate(steps)
    )
    head = "<tr><th>step</th><th>shadow</th><th>entropy</th><th>support</th><th>top of the mixture</th></tr>"
    return f'<details><summary>All steps</summary><div class="wide"><table>\n{head}\n{rows}\n</table></div></details>'


def _text(text: str) -> str:
    """As HTML; half a character (a lone surrogate), which no file takes, as a replacement character."""
    return escape(text.encode("utf-8", "replace").decode("utf-8"))
