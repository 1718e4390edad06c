"""Reads the built site as people do: `make docs-check`.

    python docs/check_site.py build/docs

Links lead somewhere; in Chromium, figures are there, text can be read in light and dark, and the search finds. Shots
of pages are left in build/docs-shots for people to look at.
"""

import functools
import html
import http.server
import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
    *("--hide-scrollbars", "--window-size=1400,1600", "--virtual-time-budget=5000"),
)
# What the operating system says, and what the reader has chosen on the page.
SCHEMES = {"light": ("light", "auto"), "dark": ("dark", "auto"), "chosen dark": ("light", "dark")}
PAGES = {
    "concepts.html": ("light", "dark", "chosen dark"),  # figures
    "api.html": ("light", "dark"),
    "status.html": ("dark",),  # a wide table
}
SEARCHES = {
    "low_latency_dispatch": "api.html#deep_ep.low_latency_dispatch",
    "checkpointing": "how_to/checkpointing.html",
}

CONTRAST = 4.5
"""Of text and what is behind it: the least that WCAG 2 allows (AA)."""

MIN_TEXTS = 20
"""Fewer on a page: it has not been laid out."""

MIN_FIGURES = 5
"""Those of concepts.md."""

# Run on each page: figures, the text that stands out least from what is behind it, and what the search has found.
PROBE = """
const parsed = color => color.match(/[\\d.]+/g).map(Number);
const luminance = color => parsed(color).slice(0, 3).map(c => c / 255)
  .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
  .reduce((sum, c, n) => sum + c * [0.2126, 0.7152, 0.0722][n], 0);
const behind = element => {
  const color = element ? getComputedStyle(element).backgroundColor : "rgb(255, 255, 255)";
  return (parsed(color)[3] ?? 1) > 0.5 ? color : behind(element.parentElement);
};
const contrast = element => {
  const [a, b] = [luminance(getComputedStyle(element).color), luminance(behind(element))];
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
};
addEventListener("load", () => setTimeout(() => {
  const texts = [...document.querySelectorAll("article *, .sidebar-tree a")].filter(element =>
    element.checkVisibility() && [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim())
    && !element.matches(".headerlink, script, style, .visually-hidden"));
  const found = {
    figures: [...document.querySelectorAll("article img")].map(image => {
      const {x, y, width, height} = image.getBoundingClientRect();
      return {name: image.getAttribute("src"), loaded: image.naturalWidth > 0, box: [x, y, x + width, y + height]};
    }),
    faint: texts.map(element => [contrast(element), element.textContent.slice(0, 60)])
      .sort((a, b) => a[0] - b[0]).slice(0, 3),
    texts: texts.length,
    found: [...document.querySelectorAll("#search-results li a")].map(link => link.getAttribute("href")),
  };
  const place = document.createElement("script");
  place.type = "application/json";
  place.id = "probe";
  place.textContent = JSON.stringify(found).replaceAll("<", "\\\\u003c");
  document.body.append(place);
}, 2000));
"""


class Page(HTMLParser):
    """What a page links to, and what can be linked to on it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors = {"", "top"}
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name in ("href", "src") and value:
                self.links.append(value)
            elif name == "id" and value:
                self.anchors.add(value)


def dead_links(site: Path) -> list[str]:
    """Links from page to page, to figures and to files that lead nowhere. Other sites are not asked."""
    pages = {path: Page(path) for path in site.rglob("*.html")}
    dead = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            exists = target.exists() and (target not in pages or unquote(parts.fragment) in pages[target].anchors)
            if not exists:
                dead.append(f"{path.relative_to(site)}: {link}")
    return dead


class Served(http.server.SimpleHTTPRequestHandler):
    """The site, with the probe in each page and the reader's choice of `?theme=` in its place."""

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        path = Path(self.translate_path(parts.path))
        if path.suffix != ".html" or not path.exists():
            super().do_GET()
            return
        theme = parse_qs(parts.query).get("theme", ["auto"])[0]
        choice = f'<script>localStorage.setItem("theme", {json.dumps(theme)})</script>'
        text = path.read_text().replace("<head>", f"<head>{choice}", 1)
        body = text.replace("</body>", f"<script>{PROBE}</script></body>").encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@contextmanager
def served(site: Path) -> Iterator[str]:
    """The address of the site on this machine."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Served, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def look(browser: str, url: str, scheme: str, *options: str) -> str:
    """What Chromium prints for a page, in a scheme of the operating system."""
    with tempfile.TemporaryDirectory() as profile:
        setting = f"--blink-settings=preferredColorScheme={int(scheme == 'light')}"
        command = [browser, *FLAGS, f"--user-data-dir={profile}", setting, *options, url]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def probed(browser: str, url: str, scheme: str) -> dict[str, Any]:
    text = look(browser, url, scheme, "--dump-dom")
    found = re.search(r'<script type="application/json" id="probe">(.*?)</script>', text, re.DOTALL)
    if found is None:
        raise RuntimeError(f"{url}: the page has not been loaded:\n{html.unescape(text)[:2000]}")
    return json.loads(found[1])


def brightness(shot: Path, box: list[float]) -> float | None:
    """Of what a shot has in a box, from 0 to 1; None if the box is below the shot."""
    from PIL import Image

    image = Image.open(shot).convert("L")
    left, top, right, bottom = map(round, box)
    if bottom > image.height:
        return None
    part = image.crop((left, top, right, bottom))
    return sum(level * count for level, count in enumerate(part.histogram())) / (255 * part.width * part.height)


def wrong_pages(browser: str, address: str, shots: Path) -> Iterator[str]:
    """What is wrong with pages as they are displayed."""
    for page, scheme in ((page, scheme) for page, schemes in PAGES.items() for scheme in schemes):
        system, theme = SCHEMES[scheme]
        is_light = (system if theme == "auto" else theme) == "light"
        url, where = f"{address}/{page}?theme={theme}", f"{page}, {scheme}"
        seen = probed(browser, url, system)
        shot = shots / f"{Path(page).stem}-{scheme.replace(' ', '-')}.png"
        look(browser, url, system, f"--screenshot={shot}")
        yield from (f"{where}: contrast {c:.1f}: {text!r}" for c, text in seen["faint"] if c < CONTRAST)
        if seen["texts"] < MIN_TEXTS:
            yield f"{where}: {seen['texts']} texts"
        if page == "concepts.html" and len(seen["figures"]) < MIN_FIGURES:
            yield f"{where}: {len(seen['figures'])} figures"
        for figure in seen["figures"]:
            level = brightness(shot, figure["box"])
            if not figure["loaded"]:
                yield f"{where}: no figure {figure['name']}"
            elif level is not None and (level > 0.5) != is_light:
                yield f"{where}: {figure['name']} has the brightness {level:.2f}"


def wrong_searches(browser: str, address: str) -> Iterator[str]:
    """Searches that do not find what they must."""
    for query, wanted in SEARCHES.items():
        found = probed(browser, f"{address}/search.html?q={query}", "light")["found"]
        if not any(link.partition("?")[0] == wanted or link.startswith(wanted) for link in found):
            yield f"search.html: {query} finds {found}, not {wanted}"


def main(site: Path) -> int:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        print("there is no Chromium to look at the pages with (Debian: chromium)", file=sys.stderr)
        return 1
    shots = site.with_name(f"{site.name}-shots")
    shots.mkdir(exist_ok=True)
    wrong = dead_links(site)
    with served(site) as address:
        wrong += [*wrong_searches(browser, address), *wrong_pages(browser, address, shots)]
    print(*wrong, f"{len(wrong)} faults; what the pages look like is in {shots}", sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve()))
