"""A taxonomy as one page of HTML that needs no server and no network."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

_STYLE = """
:root { --ink: #1d2330; --soft: #5c6573; --line: #dde1e7; --bar: #3b6ea8; --back: #fbfbfc; }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back);
  max-width: 60rem; margin: 0 auto; padding: 2rem 1.2rem 4rem; }
h1 { font-size: 1.5rem; margin: 0 0 .2rem; }
h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; }
p.soft, .soft { color: var(--soft); }
input { font: inherit; width: 100%; padding: .5rem .7rem; margin: 1rem 0 .4rem;
  border: 1px solid var(--line); border-radius: 6px; background: white; }
details { border: 1px solid var(--line); border-radius: 6px; background: white;
  margin: .45rem 0; padding: .45rem .8rem; }
details details { margin-left: .4rem; }
summary { cursor: pointer; display: grid; grid-template-columns: 1fr 7rem 4.5rem; gap: .8rem;
  align-items: center; }
summary::marker { content: ""; }
.name { font-weight: 600; overflow-wrap: anywhere; }
.bar { height: .55rem; background: var(--line); border-radius: 3px; overflow: hidden; }
.bar i { display: block; height: 100%; background: var(--bar); }
.count { text-align: right; font-variant-numeric: tabular-nums; }
blockquote { margin: .4rem 0; padding: .1rem .8rem; border-left: 3px solid var(--line);
  white-space: pre-wrap; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th, td { text-align: left; vertical-align: top; padding: .3rem .6rem .3rem 0;
  border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
td.count { padding-right: 1.2rem; }
"""

_SCRIPT = """
const box = document.getElementById("find");
box.addEventListener("input", () => {
  const words = box.value.toLowerCase();
  let shown = 0;
  for (const label of document.querySelectorAll("#labels > details")) {
    const fits = label.textContent.toLowerCase().includes(words);
    label.hidden = !fits;
    shown += fits;
  }
  document.getElementById("shown").textContent = shown;
});
"""


def page(content: Mapping[str, Any]) -> str:
    """The page.

    Args:
        content: as `tnt_report.taxonomy_content` makes it. Whatever stands in it is shown as it is:
            nothing in it becomes markup, and no script runs but the one of the page.
    """
    labels = sorted(content["labels"], key=lambda label: -label["primary"])
    most = max((label["primary"] for label in labels), default=0)
    digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Taxonomy</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>Taxonomy</h1>
<p class="soft">{escape(content["use_case"])}</p>
<p class="soft">{content["documents"]:,} documents,
<span id="shown">{len(labels)}</span> labels shown, answers of {escape(content["answers_of"])}.</p>
<input id="find" type="search" placeholder="Find in labels and examples" aria-label="Find">
<main id="labels">
{"".join(_label(label, most) for label in labels)}
</main>
<h2>How it came about</h2>
{_steps(content["steps"])}
<script>{_SCRIPT}</script>
</body>
</html>
"""


def _label(label: Mapping[str, Any], most: int) -> str:
    share = 100 * label["primary"] / most if most else 0
    inside = label.get("inside", ())
    largest = max((inner["primary"] for inner in inside), default=0)
    examples = "".join(
        f'<blockquote title="{escape(example["id"])}">{escape(example["text"])}</blockquote>'
        for example in label["examples"]
    )
    return (
        f'<details><summary><span class="name">{escape(label["name"])}</span>'
        f'<span class="bar"><i style="width:{share:.1f}%"></i></span>'
        f'<span class="count">{label["primary"]:,}</span></summary>'
        f"<p>{escape(label['description'])}</p>"
        f'<p class="soft">Primary label of {label["primary"]:,} documents, applies to '
        f"{label['applicable']:,}.</p>"
        f"{''.join(_label(inner, largest) for inner in inside)}{examples}</details>\n"
    )


def _steps(steps: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for step in steps:
        rating = "" if step["rating"] is None else str(step["rating"])
        compared = {None: "", True: "better than before", False: "not better"}[step["chosen"]]
        edits = "".join(f"<div>{escape(edit)}</div>" for edit in step["edits"])
        explanation = f'<div class="soft">{escape(step["explanation"])}</div>'
        rows.append(
            f"<tr><td>{escape(step['place'])}</td><td>{step['chain']}.{step['number']}</td>"
            f'<td>{escape(step["kind"])}</td><td class="count">{rating}</td>'
            f'<td class="count">{len(step["labels"])}</td><td>{edits}{explanation}</td>'
            f"<td>{compared}</td></tr>\n"
        )
    head = "".join(
        f"<th>{name}</th>"
        for name in ("inside", "chain and step", "", "rating", "labels", "edits", "compared")
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
