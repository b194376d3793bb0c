"""The chat page where it is hard: answers made to hurt, storage of any shape, two tabs, a phone, keys alone, dark."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("selenium.webdriver", reason="the page is tested through selenium, which is not here")
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from test_page import CONTRAST, Page, chromium, forget, page, pytestmark, scripted  # noqa: F401

DRAWN = """
const done = arguments[arguments.length - 1];
import("/page/markdown.js").then(({ markdown }) => {
  const found = {};
  for (const [name, text] of Object.entries(arguments[0])) {
    const began = performance.now();
    try {
      const node = document.createElement("div");
      node.append(markdown(text));
      let depth = 0;
      const took = performance.now() - began;
      for (let level = [node]; level.length; depth += 1) level = level.flatMap((one) => [...one.children]);
      found[name] = [took, depth, node.textContent];
    } catch (error) {
      found[name] = [0, 0, String(error)];
    }
  }
  done(found);
});
"""
HARD = {
    "heading": "# a" + " " * 20_000 + "b", "fence": "~" * 20_000 + "`", "rule": "- " * 10_000 + "x",
    "quotes": "> " * 5_000 + "x", "spaces": " " * 50_000 + "x", "table": "x|y\n|" + " " * 50_000 + "x",
    "bold": "**a " * 10_000, "under": "__a " * 10_000, "em": "*a " * 10_000, "low": "_a " * 10_000,
    "del": "~~a " * 10_000,
    "link": "[a](" * 10_000, "image": "![a](" * 10_000, "brackets": "[" * 40_000, "ticks": "`a" * 10_000,
    "dollars": "$a " * 10_000, "display": "$$a " * 5_000, "paren": "\\(a" * 10_000, "braces": "$" + "{" * 5_000 + "$",
    "fractions": "$$" + "\\frac{" * 3_000 + "x" + "}{y}" * 3_000 + "$$", 
    "subs": "$a" + "_{a" * 3_000 + "}" * 3_000 + "$",
    "sups": "$a" + "^a" * 3_000 + "$", "nested": "\n".join("  " * depth + "- a" for depth in range(800)),
    "word": "a" * 300_000, "lines": "a  \n" * 10_000, "marks": "*_~`[<$!" * 3_000,
}  # fmt: skip


def test_no_answer_holds_the_page_up(page: Page) -> None:  # noqa: F811
    """Each takes time in proportion to its length (hours before, some), nests little, and loses no letter."""
    found = page.driver.execute_async_script(DRAWN, HARD)
    assert set(found) == set(HARD)
    for name, (milliseconds, depth, text) in found.items():
        assert milliseconds < 3_000 and depth < 200, (name, milliseconds, depth)
        assert "Error" not in text and text.count("a") == HARD[name].count("a"), (name, text[:100])


def test_an_answer_made_to_hurt_is_there_after_a_reload(page: Page) -> None:  # noqa: F811
    for text in ("- ", "> ", "**a _b "):
        page.ask(f"repeat 2000 {json.dumps(text)}")
    page.driver.refresh()
    page.until(lambda: len(page.all(".turn")) == 3)
    page.ask("hello")
    assert "teacher answers" in page.texts(".said")[-1]


ODD = [
    "[]", "{}", "null", "7", '"x"', "[null]", "[{}]", "{half", '[{"id": "a"}]',
    '[{"id": "a", "title": "t", "turns": {"x": {"id": "x"}}, "children": {}, "active": {}}]',
    '[{"id": "a", "title": "t", "turns": {"x": {"id": "x", "parent": "root", "question": "q", "answers": {"0": [{}]},'
    '"chosen": {}}}, "children": {"root": ["x"]}, "active": {"root": "x"}}]',
    '[{"id": "a", "title": "t", "turns": {}, "children": [], "active": {"root": "gone"}}]',
]  # fmt: skip


def test_storage_of_any_shape_lets_the_page_open(page: Page, scripted: Any) -> None:  # noqa: F811
    good = {
        "id": "g", "title": "a good one", "updated": 1, "children": {"root": ["x"]}, "active": {"root": "x"},
        "turns": {"x": {"id": "x", "parent": "root", "question": "q", "chosen": {"0": 0},
                        "answers": {"0": [{"model": "teacher", "text": "kept", "state": "done"}]}}},
    }  # fmt: skip
    settings = ['{"theme": 3, "models": "x", "temperature": "hot"}', "[1]", "{half", '{"theme": "x"}', "null"]
    for number, text in enumerate([*ODD, json.dumps([{"id": "broken"}, good])]):
        forget(page.driver, scripted.url)
        store = "localStorage.setItem('shoestring.conversations', arguments[0]);"
        page.driver.execute_script(
            store + "localStorage.setItem('shoestring.settings', arguments[1])", text, settings[number % 5]
        )
        page.driver.get(scripted.url)
        page.until(lambda: page.all("#model-0 option"))
        if number < len(ODD) and number % 4 == 0:
            page.ask("hello")
            assert "teacher answers" in page.texts(".said")[0]
    assert page.texts(".said") == ["kept"] and page.texts(".entry .title") == ["a good one"]


def test_two_tabs_keep_each_other_s_conversations(page: Page, scripted: Any) -> None:  # noqa: F811
    driver = page.driver
    page.ask("from the first tab")
    first = driver.current_window_handle
    driver.switch_to.new_window("tab")
    second = driver.current_window_handle
    try:
        driver.get(scripted.url)
        page.until(lambda: page.all(".entry"))
        page.press("+ New conversation")
        page.ask("from the second tab")
        driver.switch_to.window(first)
        page.until(lambda: len(page.all(".entry")) == 2)
        assert page.texts(".bubble") == ["from the first tab"]  # what is open here stays open
        page.ask("more from the first")
        driver.switch_to.window(second)
        page.until(lambda: len(page.all(".entry")) == 2)
        driver.refresh()
        page.until(lambda: len(page.all(".entry")) == 2)
        page.press("Delete from the second tab")
        page.until(lambda: len(page.all(".entry")) == 1)
    finally:
        driver.switch_to.window(second)
        driver.close()
        driver.switch_to.window(first)
    page.until(lambda: page.texts(".entry .title") == ["from the first tab"])
    driver.refresh()
    page.until(lambda: page.texts(".bubble") == ["from the first tab", "more from the first"])
    assert page.texts(".entry .title") == ["from the first tab"]


def test_a_page_put_aside_in_the_middle_keeps_what_it_has(page: Page) -> None:  # noqa: F811
    """A phone gives no last word: what it is told is that the page is hidden."""
    page.ask("endless", wait=False)
    page.until(lambda: "20 " in "".join(page.texts(".said")))
    page.driver.execute_script(
        "Object.defineProperty(document, 'hidden', { value: true, configurable: true });"
        "document.dispatchEvent(new Event('visibilitychange'))"
    )
    assert "19 20" in page.driver.execute_script("return localStorage.getItem('shoestring.conversations')")
    page.press("Stop")
    page.done()


def test_the_dark_of_the_system(page: Page) -> None:  # noqa: F811
    """Nobody has chosen colours here: the system's are taken, and can be read."""
    try:
        page.driver.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
        )
        page.ask("think, then markdown")
        ground = page.driver.execute_script("return getComputedStyle(document.body).backgroundColor")
        red, green, blue = (int(part) for part in ground.strip("rgba() ").split(",")[:3])
        assert max(red, green, blue) < 80
        ratios = page.driver.execute_script(CONTRAST)
        assert len(ratios) > 8 and min(ratios)[0] >= 4.5, min(ratios)
    finally:
        page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def keys(page: Page, *pressed: str) -> Any:  # noqa: F811
    """Press keys where the focus is; where it is then."""
    for key in pressed:
        page.driver.switch_to.active_element.send_keys(key)
    return page.driver.switch_to.active_element


def reach(page: Page, label: str) -> Any:  # noqa: F811
    """Tab on until something of this name has the focus."""
    for _ in range(60):
        active = keys(page, Keys.TAB)
        if label in (active.get_attribute("aria-label") or "", active.text, active.get_attribute("id")):
            return active
    raise AssertionError(f"{label} is not reached by keyboard")


def test_a_conversation_by_keys_alone(page: Page) -> None:  # noqa: F811
    keys(page, "endless", Keys.ENTER)
    page.until(lambda: "5 " in "".join(page.texts(".said")))
    keys(page, Keys.ESCAPE)
    page.until(lambda: page.texts(".note") == ["Stopped."])
    reach(page, "Answer once more")
    keys(page, Keys.ENTER)
    page.until(lambda: "1/2" not in "".join(page.texts(".stepper")) and len(page.all(".streaming")) == 1)
    keys(page, Keys.ESCAPE)
    page.done()
    assert page.texts(".stepper span") == ["2/2"]
    page.one("#composer-text").send_keys("")
    keys(page, Keys.ARROW_UP)
    assert keys(page).get_attribute("aria-label") == "Edit the question"
    keys(page, Keys.CONTROL + "a", "hello instead", Keys.ENTER)
    page.until(lambda: "teacher answers" in "".join(page.texts(".said")))
    assert page.texts(".bubble") == ["hello instead"]
    reach(page, "settings-open")
    keys(page, Keys.ENTER)
    assert page.one("#settings").is_displayed() and keys(page).get_attribute("id") == "system"
    keys(page, Keys.ESCAPE)
    assert not page.one("#settings").is_displayed() and keys(page).get_attribute("id") == "settings-open"


def test_thinking_is_opened_by_keys_while_it_grows_and_stays_so(page: Page) -> None:  # noqa: F811
    page.ask("slowly", wait=False)
    page.until(lambda: page.all(".thinking summary"))
    assert not page.one(".thinking").get_attribute("open")
    page.driver.execute_script("document.querySelector('.thinking summary').focus()")
    before = len(page.texts(".thought")[0])
    page.until(lambda: len(page.texts(".thought")[0]) > before + 20)
    assert keys(page).tag_name == "summary"  # it is the same one, and has the focus still
    keys(page, Keys.ENTER)
    page.until(lambda: page.one(".thinking").get_attribute("open"))
    page.done()
    assert page.one(".thinking").get_attribute("open") and keys(page).tag_name == "summary"
    assert (
        page.texts(".thought")[0].split()
        == ["a", "thought", "that", "takes", "its", "time", "and", "then", "some", "more", "of", "it"] * 8
    )
    assert page.texts(".said") == ["Done thinking."]


WIDE = [
    "w" * 400, "$$" + "+".join(f"x_{{{i}}}" for i in range(90)) + "$$", "https://example.com/" + "p" * 300,
    "```\n" + "code " * 80 + "\n```", "|" + "cell|" * 30 + "\n|" + "-|" * 30 + "\n|" + "a long cell|" * 30,
]  # fmt: skip
OVER = """
return [...document.querySelectorAll(".bubble, .answer, .said > *, .tools, #composer, #send, #bar > *")]
    .filter(e => e.checkVisibility()).map(e => [e.getBoundingClientRect(), e])
    .filter(([box, e]) => box.right > 391 || box.left < -1)
    .map(([box, e]) => `${e.tagName} ${e.id} ${e.className} ${box.right}`);
"""


def test_nothing_is_wider_than_a_phone(page: Page) -> None:  # noqa: F811
    page.driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    )
    try:
        page.ask(f"repeat 1 {json.dumps(chr(10).join(text + chr(10) for text in WIDE))}")
        assert page.driver.execute_script("return document.documentElement.scrollWidth") == 390
        over = page.driver.execute_script(OVER)
        assert over == []
        page.one("#settings-open").click()
        page.until(lambda: page.one("#settings").is_displayed())
        box = page.one("#settings").rect
        assert box["x"] >= 0 and box["x"] + box["width"] <= 391
        page.one("#settings-close").click()
        small = page.driver.execute_script(
            "return ['send', 'menu', 'settings-open'].map(n => document.getElementById(n).getBoundingClientRect())"
            ".map(r => Math.min(r.width, r.height))"
        )
        assert min(small) >= 24  # WCAG 2.2's least target
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_wrong_key_is_said_to_be_wrong(chromium: Any, metered: Any, new_key: Callable[..., str]) -> None:  # noqa: F811
    """Again and again, until it is right; a key blocked in the middle says so beside what was asked."""
    driver = chromium
    forget(driver, metered.url)
    driver.get(metered.url)

    def until(check: Callable[[], Any]) -> None:
        end = time.monotonic() + 60
        while not check():
            assert time.monotonic() < end, driver.find_element(By.TAG_NAME, "body").text
            time.sleep(0.05)

    def enter(text: str) -> None:
        box = driver.find_element(By.ID, "key")
        until(box.is_displayed)
        driver.execute_script("arguments[0].value = ''", box)
        box.send_keys(text, Keys.TAB)

    def banner() -> str:
        return str(driver.find_element(By.ID, "banner").text)

    until(lambda: "wants an API key" in banner())
    enter("sk-wrong")
    until(lambda: "not known" in banner() or "no such key" in banner().lower())
    assert not driver.find_elements(By.CSS_SELECTOR, "#model-0 option")
    enter(new_key())
    until(lambda: driver.find_elements(By.CSS_SELECTOR, "#model-0 option"))
    assert banner() == ""
    driver.execute_script("sessionStorage.setItem('shoestring.key', 'sk-gone')")
    driver.find_element(By.ID, "composer-text").send_keys("hello", Keys.ENTER)
    until(lambda: driver.find_elements(By.CSS_SELECTOR, ".trouble"))
    assert driver.find_element(By.ID, "settings").is_displayed()
    driver.get_log("browser")
