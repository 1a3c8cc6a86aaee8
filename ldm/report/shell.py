"""The shell of a page: one file without scripts, network or server, light or dark as its reader's system is."""

from __future__ import annotations

from pathlib import Path

from ldm import disk
from ldm.report import curves
from ldm.report.markup import escaped

PAGE = """<!DOCTYPE html>
<html xmlns="http://www.w3.org/1999/xhtml" lang="en">
<head>
<meta charset="utf-8"/>
<meta name="viewport" content="width=device-width, initial-scale=1"/>
<meta name="color-scheme" content="light dark"/>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'"/>
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

LAYOUT = """
*{box-sizing:border-box}
body{margin:0;font:16px/1.5 system-ui,sans-serif;background:var(--paper);color:var(--ink)}
main{max-width:64rem;margin:0 auto;padding:1.5rem 1rem 4rem}
h1{font-size:1.6rem;margin:0;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:2.5rem 0 .75rem;padding-bottom:.25rem;border-bottom:1px solid var(--rule)}
h3{font-size:1rem;margin:1.5rem 0 .5rem}h4,h5,h6{font-size:.95rem;margin:1rem 0 .4rem}
p{margin:.5rem 0;max-width:46rem;overflow-wrap:anywhere}
.note,figcaption{color:var(--quiet);font-size:.875rem}
.say{border-left:3px solid var(--accent);padding:.1rem 0 .1rem .75rem}
.attention{border:1px solid var(--accent);border-radius:6px;padding:.5rem 1rem;margin:.75rem 0}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:.6rem;margin:1.25rem 0}
.figures div{border:1px solid var(--rule);border-radius:6px;padding:.5rem .75rem}
dt{color:var(--quiet);font-size:.875rem}
dd{margin:0;font-size:1.2rem;font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
dd small{display:block;font-size:.8rem;color:var(--quiet)}
figure{margin:0 0 1rem;min-width:0}
.curves{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,25rem),1fr));gap:.5rem 1.5rem}
.chart{overflow-x:auto}.chart svg{display:block;width:100%;min-width:23rem;height:auto}
main>.chart svg{min-width:32rem;max-width:48rem}
.sheets{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,18rem),1fr));gap:1rem}
.sheets figure:first-child{grid-column:1/-1}
.pairs{display:grid;grid-template-columns:repeat(auto-fill,minmax(13rem,1fr));gap:.5rem 1rem}
img{max-width:100%;height:auto;background:#fff;display:block;border-radius:4px}
table{border-collapse:collapse;font-size:.9rem}.wide{overflow-x:auto}
th,td{text-align:left;vertical-align:top;padding:.2rem 1rem .2rem 0;border-bottom:1px solid var(--rule)}
th{font-weight:600}td{overflow-wrap:anywhere;min-width:6rem;font-variant-numeric:tabular-nums}
ul{margin:.4rem 0;padding-left:1.25rem}li{overflow-wrap:anywhere}
pre{overflow-x:auto;padding:.75rem;border:1px solid var(--rule);border-radius:6px;font-size:.85rem;line-height:1.4}
summary{cursor:pointer}
"""
LIGHT = "--paper:#ffffff;--ink:#1d222b;--quiet:#59616e;--rule:#dfe3ea;--accent:#b4531a"
DARK = "--paper:#16191f;--ink:#e4e8ee;--quiet:#a3acb9;--rule:#303641;--accent:#ee9a63"


def write_page(path: Path, title: str, body: str) -> None:
    """Writes a page, whole or not at all.

    Args:
        title: any text.
        body: well-formed XHTML in which all that people wrote is `escaped`.
    """
    dark = f"@media (prefers-color-scheme:dark){{:root{{{DARK}}}{curves.style(curves.DARK)}}}"
    style = f":root{{{LIGHT}}}{LAYOUT}{curves.style(curves.LIGHT)}{dark}"
    disk.write_text(disk.expand_user(path), PAGE.format(title=escaped(title), style=style, body=body))
