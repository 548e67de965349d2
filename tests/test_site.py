"""The site as a reader finds it: every internal link, anchor and image resolves, and no page needs the network."""
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import pytest

ROOT = Path(__file__).resolve().parent.parent


class Page(HTMLParser):
    "Ids, links to follow, and what the browser loads by itself."
    def __init__(self, text: str):
        super().__init__()
        self.ids, self.links, self.loads = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.ids |= {a[k] for k in ("id", "name") if a.get(k)}
        if tag == "a" and a.get("href"): self.links.append(a["href"])
        if tag in ("img", "script", "iframe") and a.get("src"): self.loads.append(a["src"])
        if tag == "link" and a.get("href") and "canonical" not in a.get("rel", ""): self.loads.append(a["href"])


def faults(site: Path) -> list[str]:
    "What does not resolve inside `site`."
    pages, out = {p.resolve(): Page(p.read_text()) for p in site.rglob("*.html")}, []
    for p, page in pages.items():
        here = p.relative_to(site.resolve())
        for url in page.links + page.loads:
            parts = urlsplit(url)
            if parts.scheme in ("data", "mailto", "javascript"): continue
            if parts.scheme or parts.netloc:
                if parts.netloc.endswith("craft-nb.github.io"): out.append(f"{here}: {url} is a page of this site")
                if url in page.loads: out.append(f"{here}: loads {url}")
                continue
            path, anchor = urldefrag(url)
            path = unquote(urlsplit(path).path)
            target = (site / path.lstrip("/") if path.startswith("/") else p.parent / path).resolve() if path else p
            if target.is_dir(): target /= "index.html"
            if not target.is_relative_to(site.resolve()) or not target.is_file():
                out.append(f"{here}: {url} is not there")
            elif anchor and target in pages and unquote(anchor) not in pages[target].ids:
                out.append(f"{here}: {url} has no such anchor")
    out += [f"{p.relative_to(site)}: loads {url}" for p in site.rglob("*.css")
            for url in re.findall(r"""(?:url\(|@import\s)\s*["']?(https?://[^"')]*)""", p.read_text())]
    return out


@pytest.fixture(scope="module")
def site():
    if not (ROOT / "_docs" / "index.html").exists():
        subprocess.run([sys.executable, ROOT / "tools" / "docs.py", "--quiet"], check=True, capture_output=True)
    return ROOT / "_docs"


def test_everything_resolves(site):
    assert faults(site) == []


@pytest.mark.parametrize("body, says", [
    ('<a href="gone.html">x</a>', "index.html: gone.html is not there"),
    ('<a href="#gone">x</a>', "index.html: #gone has no such anchor"),
    ('<a href="other.html#gone">x</a>', "index.html: other.html#gone has no such anchor"),
    ('<img src="gone.png">', "index.html: gone.png is not there"),
    ('<a href="../outside.html">x</a>', "index.html: ../outside.html is not there"),
    ('<script src="https://cdn.example/x.js"></script>', "index.html: loads https://cdn.example/x.js"),
    ('<a href="https://craft-nb.github.io/craft_nb/dual.html#dual">x</a>',
     "index.html: https://craft-nb.github.io/craft_nb/dual.html#dual is a page of this site"),
])
def test_the_crawl_finds_what_is_broken(tmp_path, body, says):
    (tmp_path / "site").mkdir()
    (tmp_path / "outside.html").write_text("outside the site")
    (tmp_path / "site" / "other.html").write_text('<h2 id="there">x</h2>')
    (tmp_path / "site" / "index.html").write_text(f'<a href="other.html#there">fine</a><a '
                                                  f'href="https://example.org">fine</a>{body}')
    assert faults(tmp_path / "site") == [says]


def test_a_sheet_that_asks_the_network_is_found(tmp_path):
    (tmp_path / "a.css").write_text("@import url(https://fonts.example/x;y);.a{background:url(data:x)}")
    assert faults(tmp_path) == ["a.css: loads https://fonts.example/x;y"]


def test_a_name_in_prose_leads_to_its_page_and_unfolds_its_source(site):
    page = (site / "10k_training.html").read_text()
    assert 'href="10h_caches.html#build_cache"' in page and page.count('<details class="source">') > 5
