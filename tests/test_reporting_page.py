"""The page in a browser, and what of it needs none: escaping, the security policy, contrast."""

import base64
import hashlib
import json
import re
import shutil
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
from reporting_examples import write_pass, write_run

from phi3v.reporting.join import build_tables
from phi3v.reporting.page import as_markdown, build_report
from phi3v.settings import ReportSettings

ROW = "phi3-docvqa-full-bf16"
HOSTILE = '<script>window.hacked = 1</script><img src=x onerror="window.hacked = 2">&amp; </script> {{ 7 * 7 }}'


@pytest.fixture(scope="module")
def page(root, tmp_path_factory) -> Path:
    """index.html of a finished demo, one row of which answers with HTML."""
    _, results = write_run(root, tmp_path_factory.mktemp("page"))
    scores = [0.0] * 60 + [1.0] * 40
    images = [[f"val/{i}-0.jpg"] for i in range(6)]
    write_pass(results / "evaluate" / ROW / "after", scores, "anls", images, text=HOSTILE)
    log = results / "logs/train/phi3-docvqa-lora-fp16.log"
    log.parent.mkdir(parents=True)
    log.write_text(f"Traceback: {HOSTILE}\n")
    (results / "train/phi3-docvqa-lora-fp16/manifest.json").unlink()
    shutil.rmtree(results / "evaluate/phi3-docvqa-lora-fp16")
    build_report(ReportSettings(config=str(root / "config/demo.yaml"), results=str(results)))
    return results / "report" / "index.html"


class _Tags(HTMLParser):
    """Start tags with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def tags(page):
    return _Tags(page.read_text(encoding="utf-8")).tags


def test_texts_are_escaped(page, tags):
    text = page.read_text(encoding="utf-8")
    assert "<script>window.hacked" not in text and "&lt;script&gt;window.hacked" in text
    assert "{{ 7 * 7 }}" in text
    assert len([tag for tag, _ in tags if tag == "script"]) == 3
    assert not any(name.startswith("on") for _, attributes in tags for name in attributes)


def test_the_policy_names_exactly_the_two_scripts(page):
    text = page.read_text(encoding="utf-8")
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text).group(1)
    assert policy.startswith("default-src 'none'") and "unsafe-eval" not in policy
    scripts = re.findall(r"<script>(.*?)</script>", text, flags=re.S)
    digests = {
        "'sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() + "'" for script in scripts
    }
    assert len(digests) == 2 and digests == set(re.findall(r"'sha256-[^']*'", policy))


def test_nothing_is_loaded_from_elsewhere(tags):
    for tag, attributes in tags:
        for name in ("src", "href", "srcset", "action", "data"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:")), (tag, name, value)


def test_pictures_have_alternative_texts_and_tables_headers(tags):
    pictures = [attributes for tag, attributes in tags if tag == "img"]
    assert pictures and all(attributes.get("alt") for attributes in pictures)
    assert all(attributes.get("scope") in ("col", "row") for tag, attributes in tags if tag == "th")
    tables = sum(tag == "table" for tag, _ in tags)
    assert tables == sum(tag == "caption" for tag, _ in tags)
    assert all(attributes.get("aria-label") for tag, attributes in tags if "data-plot" in attributes)


def test_each_picture_is_embedded_once(page):
    text = page.read_text(encoding="utf-8")
    data = json.loads(re.search(r'id="report-data">(.*?)</script>', text, flags=re.S).group(1))
    assert 0 < len(data["pictures"]) == len(set(data["pictures"].values()))
    for uri in data["pictures"].values():
        assert text.count(uri[:400]) == 1


def test_markdown_cells_cannot_break_the_table(root, page):
    from phi3v.settings import load_run

    run = load_run(root / "config/demo.yaml", root)
    settings = run.settings.model_copy(update={"title": "a | b <script>"})
    text = as_markdown(build_tables(run.model_copy(update={"settings": settings}), page.parent.parent))
    assert text.startswith("# a \\| b &lt;script>")


def _luminance(colour: str) -> float:
    digits = colour.lstrip("#")
    digits = "".join(2 * d for d in digits) if len(digits) == 3 else digits
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_contrast_meets_wcag_aa(root, theme):
    css = (root / "src/phi3v/reporting/assets/style.css").read_text()
    start = ":root{" if theme == "light" else ":root[data-theme=dark]{"
    colours = dict(re.findall(r"(--[\w-]+):(#[0-9a-f]+)", css[css.index(start) :].split("}")[0]))
    on_page = [
        (name, ground)
        for name in ("--text", "--muted", "--accent", "--good", "--bad", "--warn")
        for ground in ("--bg", "--surface", "--raised")
    ]
    on_pills = [("--warn", "--warn-bg"), ("--good", "--good-bg"), ("--bad", "--bad-bg"), ("--text", "--pill")]
    for name, ground in on_page + on_pills:
        high, low = sorted((_luminance(colours[name]), _luminance(colours[ground])), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 4.5, (theme, name, ground)
    marks = [name for name in colours if name.startswith("--series-")] + [
        "--after",
        "--before",
        "--control",
        "--published",
    ]
    for name in marks:  # graphics need 3 : 1
        high, low = sorted((_luminance(colours[name]), _luminance(colours["--raised"])), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 3, (theme, name)


@pytest.fixture
def opened(browser, page):
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.get("about:blank")
    browser.get_log("performance")  # forgets what the browser itself loaded
    browser.get(page.as_uri())
    browser.execute_script("try { localStorage.clear() } catch {}")
    return browser


def until(driver, expression: str):
    """Wait for a JavaScript expression to be true; returns it."""
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(driver, 60).until(lambda d: d.execute_script(f"return {expression}"), expression)


def test_it_opens_without_an_error_or_a_request(opened, page):
    # Draw everything there is, so that every code path that could fetch has run.
    opened.execute_script(
        "for (const d of document.querySelectorAll('details')) d.open = true; document.querySelector('.plots').scrollIntoView()"
    )
    until(opened, "document.querySelectorAll('.plots .main-svg').length > 0")
    opened.execute_script("window.scrollTo(0, document.body.scrollHeight)")
    errors = [entry for entry in opened.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
    assert errors == []
    requests = []
    for entry in opened.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            requests.append(message["params"]["request"]["url"])
    outside = [url for url in requests if not url.startswith(("data:", "about:", page.as_uri()))]
    assert page.as_uri() in requests and outside == []
    assert opened.execute_script("return window.hacked") is None


def test_sorting_turns_round_and_says_so(opened):
    column = "[...document.querySelectorAll('table.sortable th button')].find(b => b.textContent === 'After')"
    values = "return [...document.querySelector('table.sortable').querySelectorAll('td[data-label=After]')].map(c => +c.dataset.sort)"
    opened.execute_script(f"{column}.click()")
    rising = opened.execute_script(values)
    assert rising == sorted(rising) and len(set(rising)) > 1
    assert opened.execute_script(f"return {column}.parentElement.getAttribute('aria-sort')") == "ascending"
    opened.execute_script(f"{column}.click()")
    assert opened.execute_script(values) == rising[::-1]
    assert opened.execute_script(f"return {column}.parentElement.getAttribute('aria-sort')") == "descending"


def test_filters_hide_rows_and_count_them(opened):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import Select

    visible = (
        "return [...document.querySelectorAll('tr[data-row]')].filter(r => r.offsetParent).map(r => r.dataset.row)"
    )
    everything = opened.execute_script(visible)
    opened.find_element(By.ID, "filter-text").send_keys("qlora")
    assert opened.execute_script(visible) == ["phi3-hateful_memes-qlora-bf16"]
    assert opened.find_element(By.ID, "filter-count").text == f"1 of {len(everything)} rows"
    opened.find_element(By.ID, "filter-text").clear()
    Select(opened.find_element(By.ID, "filter-status")).select_by_visible_text("did not finish")
    assert opened.execute_script(visible) == ["phi3-docvqa-lora-fp16"]


def test_a_click_on_a_row_opens_its_part_with_curve_and_pictures(opened):
    opened.execute_script(f"document.querySelector('a[href=\"#row-{ROW}\"]').click()")
    part = f"document.getElementById('row-{ROW}')"
    until(opened, f"{part}.open")
    # A plot is drawn when it comes near the window.
    opened.execute_script(f"{part}.querySelector('[data-plot]').scrollIntoView({{behavior: 'instant'}})")
    until(opened, f"{part}.querySelector('.main-svg')")
    until(opened, f"[...{part}.querySelectorAll('img')].every(i => i.complete && i.naturalWidth > 0)")
    text = opened.execute_script(f"return {part}.textContent")
    assert "<script>window.hacked = 1</script>" in text and "in the table: 5e-06" in text and "decoder" in text
    assert len(opened.execute_script(f"return [...{part}.querySelectorAll('.example')].map(e => e.className)")) == 12
    opened.execute_script(f"{part}.querySelector('[data-table]').open = true")
    assert until(opened, f"{part}.querySelectorAll('[data-table] tbody tr').length") == 60
    assert opened.execute_script("return window.hacked") is None


def test_hovering_a_plot_shows_its_numbers(opened):
    from selenium.webdriver.common.action_chains import ActionChains

    opened.execute_script("document.querySelector('.plots').scrollIntoView({behavior: 'instant'})")
    until(opened, "document.querySelector('.plots .main-svg .scatterlayer .point')")
    points = opened.find_elements("css selector", "[data-plot^=forest] .scatterlayer .trace:last-child .point")
    ActionChains(opened).move_to_element(points[0]).perform()
    assert "after" in until(opened, "document.querySelector('.hoverlayer .hovertext')?.textContent")


def test_dark_mode_changes_page_and_plots(opened):
    from selenium.webdriver.common.by import By

    opened.execute_script("document.querySelector('.plots').scrollIntoView({behavior: 'instant'})")
    until(opened, "document.querySelector('.plots .main-svg text')")
    colours = "return [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.querySelector('.plots .main-svg .xtick text')).fill]"
    light = opened.execute_script(colours)
    button = opened.find_element(By.ID, "theme")
    assert button.text == "Dark mode"
    opened.execute_script("arguments[0].click()", button)
    until(opened, f"getComputedStyle(document.querySelector('.plots .main-svg .xtick text')).fill !== '{light[1]}'")
    dark = opened.execute_script(colours)
    assert dark[0] != light[0] and button.get_attribute("textContent") == "Light mode"
    opened.execute_script("arguments[0].click()", button)


def test_a_link_lands_on_its_section_though_plots_above_are_drawn_later(opened):
    opened.set_window_size(1440, 900)
    opened.execute_script("document.querySelector('a[href=\"#speed\"]').click()")
    until(opened, "document.querySelectorAll('.plots .main-svg').length > 1")
    time.sleep(1)
    assert 0 <= opened.execute_script("return document.querySelector('#speed').getBoundingClientRect().top") < 150


def test_a_phone_needs_no_sideways_scrolling(opened):
    opened.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    )
    opened.execute_script(f"location.hash = 'row-{ROW}'")
    until(opened, "window.outerWidth > 0 && document.documentElement.clientWidth")
    assert opened.execute_script("return document.documentElement.scrollWidth") == 390


def test_it_prints(opened):
    pdf = base64.b64decode(opened.execute_cdp_cmd("Page.printToPDF", {"printBackground": False})["data"])
    assert pdf.startswith(b"%PDF") and len(pdf) > 20_000


def test_paper_is_white_whatever_the_screen(opened):
    opened.execute_script("document.documentElement.dataset.theme = 'dark'")
    ground = "return getComputedStyle(document.body).backgroundColor"
    dark = opened.execute_script(ground)
    opened.execute_script("window.dispatchEvent(new Event('beforeprint'))")
    assert opened.execute_script(ground) == "rgb(255, 255, 255)" != dark
    # Every plot in sight of a reader of paper is drawn, also those far below the window.
    hidden = "[...document.querySelectorAll('[data-plot]')].filter(c => c.clientWidth && !c.querySelector('.main-svg')).length"
    assert opened.execute_script(f"return {hidden}") == 0
    opened.execute_script("window.dispatchEvent(new Event('afterprint'))")
    assert opened.execute_script(ground) == dark
