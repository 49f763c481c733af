"""The page of a taxonomy: self-contained, escaped, and as a browser shows it."""

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from jaxconv.recipes.tnt_page import page

HOSTILE = "<script>document.title = 'owned'</script><img src=x onerror=alert(1)>\"' &amp;"


def content(**changed):
    label = {
        "id": 1,
        "name": "lost cards",
        "description": "A card is gone.",
        "primary": 30,
        "applicable": 41,
        "examples": [{"id": "a-1", "text": "where is my card?"}],
        "inside": [
            {
                "id": 1,
                "name": "stolen",
                "description": "",
                "primary": 4,
                "applicable": 4,
                "examples": [],
            }
        ],
    }
    step = {
        "place": "",
        "chain": 0,
        "number": 1,
        "kind": "update",
        "rating": 71,
        "explanation": "too coarse",
        "edits": ["split cards"],
        "chosen": True,
        "labels": ["lost cards", "fees"],
    }
    other = label | {"id": 2, "name": "fees", "primary": 15, "inside": [], "examples": []}
    return {
        "use_case": "what customers ask",
        "answers_of": "rules",
        "documents": 45,
        "labels": [label, other],
        "steps": [step],
    } | changed


class Shown(HTMLParser):
    """Tags, and the text outside of style and script."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.text, self._inside = [], "", ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._inside = tag

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside not in ("style", "script"):
            self.text += data


def test_it_needs_no_network_and_shows_counts_examples_and_steps():
    text = page(content())
    shown = Shown(text)
    loads = [a for _, attributes in shown.tags for a in attributes if a in ("src", "href")]
    assert not loads and not re.search(r"https?://|url\(|@import", text)
    for said in ("lost cards", "stolen", "where is my card?", "30", "41", "71", "split cards"):
        assert said in shown.text
    assert "width:100.0%" in text and "width:50.0%" in text


def test_nothing_in_a_taxonomy_becomes_markup():
    hostile = content(use_case=HOSTILE, answers_of=HOSTILE)
    for label in hostile["labels"]:
        label |= {"name": HOSTILE, "description": HOSTILE}
        label["examples"] = [{"id": HOSTILE, "text": HOSTILE}]
    hostile["steps"][0] |= {"explanation": HOSTILE, "edits": [HOSTILE], "place": HOSTILE}
    text = page(hostile)
    plain, found = Shown(page(content())), Shown(text)
    assert [tag for tag, _ in found.tags].count("script") == 1
    assert not [tag for tag, _ in found.tags if tag == "img"]
    assert found.text.count(HOSTILE) >= 8  # it is shown as it stands
    names = {name for _, attributes in found.tags for name in attributes}
    assert names == {name for _, attributes in plain.tags for name in attributes}


# ---------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def chromium() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    pytest.skip("no Chromium is installed (Debian: apt-get install chromium)")


def browse(chromium: str, file: Path, *options: str) -> subprocess.CompletedProcess:
    command = [
        chromium,
        *("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
        *(
            "--virtual-time-budget=3000",
            "--enable-logging=stderr",
            f"--user-data-dir={file}.profile",
        ),
        *options,
        file.as_uri(),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_a_browser_shows_the_labels_and_runs_nothing_foreign(chromium, tmp_path):
    hostile = content()
    hostile["labels"][1] |= {"name": HOSTILE, "examples": [{"id": "x", "text": HOSTILE}]}
    file = tmp_path / "taxonomy.html"
    file.write_text(page(hostile), encoding="utf-8")
    done = browse(chromium, file, "--dump-dom")
    assert done.returncode == 0, done.stderr
    dom = Shown(done.stdout)
    assert "lost cards" in dom.text and HOSTILE in dom.text
    assert "<title>Taxonomy</title>" in done.stdout  # nobody has changed it
    assert "CONSOLE" not in done.stderr, done.stderr


def test_its_own_script_finds_labels(chromium, tmp_path):
    file = tmp_path / "taxonomy.html"
    # The policy of the page lets no other script run: so it is asked without one.
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page(content()))
    typed = (
        '<script>addEventListener("load", () => { const box = document.getElementById("find");'
        'box.value = "WHERE is"; box.dispatchEvent(new Event("input")); })</script></body>'
    )
    file.write_text(text.replace("</body>", typed), encoding="utf-8")
    dom = browse(chromium, file, "--dump-dom").stdout
    assert '<span id="shown">1</span>' in dom
    assert len(re.findall(r"<details hidden", dom)) == 1


def test_a_screenshot_shows_bars_and_words(chromium, tmp_path):
    from matplotlib.image import imread

    file, picture = tmp_path / "taxonomy.html", tmp_path / "page.png"
    file.write_text(page(content()), encoding="utf-8")
    browse(chromium, file, f"--screenshot={picture}", "--window-size=900,1000")
    pixels = imread(picture)[..., :3]
    assert pixels.shape == (1000, 900, 3)
    bar = (abs(pixels - [0x3B / 255, 0x6E / 255, 0xA8 / 255]).max(axis=-1) < 0.02).sum(axis=1)
    rows = sorted({int(count) for count in bar if count > 5})
    # Two bars, that of 15 documents half as long as that of 30.
    assert rows and rows[-1] == pytest.approx(2 * rows[0], rel=0.1)
    assert (pixels.max(axis=-1) < 0.35).sum() > 500  # letters
