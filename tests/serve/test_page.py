"""The chat page in headless Chromium, against the real server; answers come from a model or from a written script."""

from __future__ import annotations

import random
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

webdriver = pytest.importorskip("selenium.webdriver", reason="the page is tested through selenium, which is not here")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium with chromedriver here")
QUIET = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
)  # fmt: skip


@pytest.fixture(scope="module")
def scripted(start: Any, provider: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with start("--upstream", provider, "--price", "1,1,10", folder=tmp_path_factory.mktemp("page")) as running:
        yield running


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    for argument in (*QUIET, f"--user-data-dir={tmp_path_factory.mktemp('profile')}", "--window-size=1280,900"):
        options.add_argument(argument)
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_script_timeout(60)
    yield driver
    driver.quit()


def forget(driver: Any, url: str) -> None:
    """Clear what the page keeps, from beside it: the page itself saves when it is left."""
    driver.get(f"{url}/version")
    driver.execute_script("localStorage.clear(); sessionStorage.clear()")


# For every text on the page: its contrast with what is behind it, by WCAG 2's formula.
CONTRAST = """
const linear = v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
const light = color => {
  const [r, g, b] = color.match(/[\\d.]+/g).map(v => linear(v / 255));
  return .2126 * r + .7152 * g + .0722 * b;
};
const ground = e => {
  for (; e; e = e.parentElement) {
    const color = getComputedStyle(e).backgroundColor;
    if (!/, 0\\)|transparent/.test(color)) return color;
  }
};
const wanted = ".bubble, .said, .thinking summary, .figures span, .hint, .plain, header b, .brand";
return [...document.querySelectorAll(wanted)].filter(e => e.checkVisibility()).map(e => {
  const [a, b] = [light(getComputedStyle(e).color), light(ground(e))].sort((x, y) => y - x);
  return [(a + .05) / (b + .05), e.className];
});
"""


class Page:
    """What a person does with the page."""

    def __init__(self, driver: Any, url: str) -> None:
        self.driver = driver
        driver.get_log("browser")
        driver.set_window_size(1280, 900)
        forget(driver, url)
        driver.get(url)
        self.until(lambda: self.all("#model-0 option"))

    def all(self, selector: str) -> list[Any]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str) -> Any:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def texts(self, selector: str) -> list[str]:
        return self.driver.execute_script(
            "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)", selector
        )

    def until(self, check: Callable[[], Any], seconds: float = 60) -> Any:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := check():
                return found
            time.sleep(0.05)
        raise AssertionError(f"not within {seconds} s; the page says: {self.one('body').text}")

    def ask(self, text: str, *, wait: bool = True) -> None:
        before = len(self.all(".turn"))
        box = self.one("#composer-text")
        box.send_keys(text)
        box.send_keys(Keys.ENTER)
        self.until(lambda: len(self.all(".turn")) == before + 1)
        if wait:
            self.done()

    def done(self) -> None:
        self.until(lambda: self.all(".answer") and not self.all(".answer.streaming"))

    def press(self, label: str, index: int = -1) -> None:
        found = [b for b in self.all("button") if b.text == label or b.get_attribute("aria-label") == label]
        self.driver.execute_script("arguments[0].click()", found[index])

    def errors(self) -> list[str]:
        return [row["message"] for row in self.driver.get_log("browser") if row["level"] in ("SEVERE", "WARNING")]


@pytest.fixture
def page(chromium: Any, scripted: Any) -> Iterator[Page]:
    found = Page(chromium, scripted.url)
    yield found
    assert found.errors() == []


def test_send_and_read(page: Page):
    page.ask("hello")
    assert page.texts(".bubble") == ["hello"] and "teacher answers number" in page.texts(".said")[0]
    assert any("12 + 20 tokens" in text for text in page.texts(".figures"))
    assert any("$0.00021" in text for text in page.texts(".figures span"))
    assert page.texts(".entry .title") == ["hello"]
    assert "has answered" in page.one("#status").text or page.texts("#status") == ["teacher has answered."]


def test_a_real_model(chromium: Any, server: Any):
    page = Page(chromium, server.url)
    page.one("#settings-open").click()
    page.one("#max_tokens").send_keys("12")
    page.one("#seed").send_keys("1")  # a random model ends when it likes: with this seed not within twelve tokens
    page.one("#settings-close").click()
    page.ask("last digit of 3 + 8 ?")
    page.ask("and of 4 + 9 ?")
    assert any("+ 12 tokens" in text for text in page.texts(".turn:last-child .figures span")), page.texts(".figures")
    assert any("tokens/s" in text for text in page.texts(".turn:last-child .figures span"))
    page.press("Show token probabilities")
    tokens = page.all(".turn:last-child .token")
    assert len(tokens) == 12
    tokens[0].send_keys(Keys.ARROW_RIGHT)
    assert page.driver.switch_to.active_element == tokens[1]
    assert len(page.texts("#tip .alternative")) in (5, 6) and "%" in page.texts("#tip .alternative")[0]
    assert page.errors() == []


def test_thinking_folds_and_tells_its_time(page: Page):
    page.ask("think about 3 + 8 + 4")
    summary = page.one(".thinking summary")
    assert "Thought for" in summary.text and page.texts(".said") == ["The last digit is 5."]
    assert not page.one(".thought").is_displayed()
    summary.click()
    assert page.one(".thought").is_displayed() and "Check: 3 + 8 + 4" in page.one(".thought").text


def test_stop_in_the_middle(page: Page):
    from written_answers import Provider

    Provider.left.clear()
    page.ask("endless", wait=False)
    page.until(lambda: "5 " in "".join(page.texts(".said")))
    page.one("#composer-text").send_keys(Keys.ESCAPE)
    page.done()
    kept = page.texts(".said")
    assert kept[0].startswith("0 1 2") and page.texts(".answer .note") == ["Stopped."]
    assert Provider.left.wait(60), "the provider was not told"
    page.ask("go on")
    assert page.texts(".said")[0] == kept[0]


def test_regenerate_and_versions(page: Page):
    page.ask("hello")
    first = page.texts(".said")
    page.press("Answer once more")
    page.until(lambda: page.texts(".said") not in ([], first))
    page.done()
    assert page.texts(".answer .stepper span") == ["2/2"]
    page.press("Earlier version of this answer")
    assert page.texts(".said") == first and page.texts(".answer .stepper span") == ["1/2"]


def test_edit_makes_a_branch(page: Page):
    page.ask("first question")
    page.ask("second question")
    page.press("Edit the question", 0)
    box = page.one(".editing textarea")
    box.send_keys(Keys.CONTROL, "a")
    box.send_keys("another question")
    box.send_keys(Keys.ENTER)
    page.until(lambda: page.texts(".bubble") == ["another question"])
    page.done()
    assert page.texts(".bubble") == ["another question"] and page.texts(".question .stepper span") == ["2/2"]
    page.press("Earlier version of this question")
    assert page.texts(".bubble") == ["first question", "second question"]


def test_side_by_side(page: Page):
    page.press("Side by side")
    page.ask("think about it")
    page.ask("hello")
    assert page.texts(".turn:last-child .answer header b") == ["teacher", "student"]
    said = page.texts(".turn:last-child .said")
    assert said[0].startswith("teacher answers") and said[1].startswith("student answers")
    from written_answers import Provider

    history = [m["content"] for m in Provider.seen[-1]["messages"]]
    assert history == ["think about it", "The last digit is **5**.", "hello"]
    boxes = [node.rect for node in page.all(".turn:last-child .answer")]
    assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]


def test_model_and_sampling_are_what_was_picked(page: Page):
    from written_answers import Provider

    page.driver.execute_script(
        "const s = document.getElementById('model-0'); s.value = 'student'; s.dispatchEvent(new Event('change'))"
    )
    page.one("#settings-open").click()
    for name, value in (("temperature", "0.2"), ("top_p", "0.9")):  # sliders
        page.driver.execute_script(
            "const e = document.getElementById(arguments[0]); e.value = arguments[1];"
            "for (const kind of ['input', 'change']) e.dispatchEvent(new Event(kind, { bubbles: true }))",
            name, value,
        )  # fmt: skip
    for name, value in (("max_tokens", "77"), ("seed", "5"), ("system", "be brief")):
        page.one(f"#{name}").send_keys(value)
    page.one("#settings-close").click()
    page.ask("hello")
    asked = Provider.seen[-1]
    assert (asked["model"], asked["temperature"], asked["top_p"], asked["seed"]) == ("student", 0.2, 0.9, 5)
    assert asked.get("max_tokens", asked.get("max_completion_tokens")) == 77
    assert asked["messages"][0] == {"role": "system", "content": "be brief"}
    assert page.texts(".said")[0].startswith("student answers")
    page.driver.refresh()  # and it is so after a reload
    page.until(lambda: page.all("#model-0 option"))
    page.until(lambda: page.one("#temperature").get_attribute("value") == "0.2")


def test_copy(page: Page):
    page.driver.execute_cdp_cmd(
        "Browser.grantPermissions", {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
    )
    page.ask("think")
    page.driver.execute_script("""
        window.said = [];
        new MutationObserver(() => window.said.push(document.body.textContent.includes("Copied")))
            .observe(document.body, { childList: true, subtree: true, characterData: true })""")
    page.press("Copy the answer")
    page.until(lambda: page.driver.execute_script("return window.said.includes(true)"))  # said for a second only
    read = "const done = arguments[0]; navigator.clipboard.readText().then(done, e => done(String(e)))"
    assert page.driver.execute_async_script(read) == "The last digit is **5**."


def test_the_problems_of_a_run_are_examples(chromium: Any, start: Any, checkpoint: Path, tmp_path: Path):
    """One of each kind, unseen in training; a press asks it."""
    from shoestring.recipes import quickstart
    from shoestring.road import run_recipe
    from shoestring.train.configs import Optim, Recipe, SftStage, Textbook

    stage = SftStage(
        name="sft", inputs={"model": str(checkpoint)}, textbook=Textbook(mix=quickstart.LEARN), problems=4, steps=1,
        examples_per_step=2, optim=Optim(lr=1e-4), compute=quickstart.COMPUTE, row_tokens=512,
    )  # fmt: skip
    run = run_recipe(Recipe(name="t", stages=(stage,)), tmp_path / "runs", quiet=True).runs["sft"]
    with start(f"mine={run.path}", folder=tmp_path) as running:
        told = running.get("/page/about.json").json()["examples"]
        assert {example["task"] for example in told} == {"questions", "logic", "programs"}
        page = Page(chromium, running.url)
        assert page.texts(".examples h2") == [example["task"] for example in told]
        page.all(".example")[0].click()
        page.until(lambda: page.texts(".bubble") == [told[0]["text"]])
        page.one("#composer-text").send_keys(Keys.ESCAPE)  # stops it where it has not ended by itself
        page.done()


def test_markup_and_scripts_stay_text(page: Page):
    page.ask("evil <b>bold</b>")
    assert page.driver.execute_script("return window.hacked") is None
    assert page.all(".said img, .said script, .said svg, .bubble b") == []
    said = page.texts(".said")[0]
    assert '<img src=x onerror="window.hacked=1">' in said and "<script>window.hacked = 1</script>" in said
    assert [a.get_attribute("href") for a in page.all(".said a")] == ["https://example.com/pixel.png"]
    page.press("Show token probabilities")
    assert page.all(".tokens img, .tokens script, #tip b b") == []


def test_markdown_code_and_maths(page: Page):
    page.ask("markdown please")
    assert page.texts(".said h4") == ["How the sum goes"] and page.texts(".said strong") == ["digit by digit"]
    assert len(page.all(".said ol > li")) == 3 and len(page.all(".said ol ul > li")) == 2
    assert page.texts(".said td") == ["1", "8", "2", "2"]
    assert "return sum(numbers) % 10" in page.texts(".said pre code")[0]
    assert len(page.all(".said math mfrac")) == 1 and len(page.all(".said math")) == 4
    link = page.one(".said blockquote a")
    assert link.get_attribute("rel") == "noopener noreferrer nofollow"


def test_conversations_stay_after_a_reload(page: Page):
    page.ask("remember this")
    page.press("+ New conversation")
    page.ask("another one")
    page.driver.refresh()
    page.until(lambda: page.all(".turn"))
    assert page.texts(".bubble") == ["another one"]
    assert page.texts(".entry .title") == ["another one", "remember this"]
    page.all(".entry .title")[1].click()
    page.until(lambda: page.texts(".bubble") == ["remember this"])
    assert "teacher answers" in page.texts(".said")[0]


def a_port_of_our_own() -> str:
    """Free, and below those that systems give to whoever asks for any: free again when our server is gone."""
    for port in random.SystemRandom().sample(range(10_000, 30_000), 100):
        with socket.socket() as found, suppress(OSError):
            found.bind(("127.0.0.1", port))
            return str(port)
    raise AssertionError("no port is free")


def test_the_server_goes_and_comes_back(chromium: Any, start: Any, provider: str, tmp_path: Path):
    port = a_port_of_our_own()
    with start("--upstream", provider, "--port", port, folder=tmp_path) as running:
        page = Page(chromium, running.url)
        page.ask("endless", wait=False)
        page.until(lambda: "5 " in "".join(page.texts(".said")))
        running.process.kill()
        running.process.wait()
        page.done()
    assert page.texts(".said")[0].startswith("0 1 2") and "went away in the middle" in page.texts(".trouble")[0]
    page.until(lambda: "Looking for it" in page.texts("#banner")[0])
    with start("--upstream", provider, "--port", port, folder=tmp_path):
        page.until(lambda: "The server is back" in page.texts("#banner")[0])
        page.ask("hello")
        assert "teacher answers" in page.texts(".said")[-1]


def test_half_an_answer_is_said_to_be_half(page: Page):
    page.ask("half")
    assert page.texts(".said") == ["Half of it"] and "broke off" in page.texts(".trouble")[0]


def test_a_key_is_asked_for(chromium: Any, metered: Any, new_key: Callable[..., str]):
    forget(chromium, metered.url)
    chromium.get(metered.url)
    end = time.monotonic() + 60
    while not chromium.find_element(By.ID, "key").is_displayed() and time.monotonic() < end:
        time.sleep(0.05)
    assert "wants an API key" in chromium.find_element(By.ID, "banner").text
    key = chromium.find_element(By.ID, "key")
    key.send_keys(new_key(), Keys.TAB)
    while not chromium.find_elements(By.CSS_SELECTOR, "#model-0 option") and time.monotonic() < end:
        time.sleep(0.05)
    assert not chromium.find_element(By.ID, "banner").is_displayed()
    chromium.get_log("browser")


def test_a_phone(page: Page):
    page.driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    )
    try:
        page.ask("markdown please")
        wide = page.driver.execute_script("return document.documentElement.scrollWidth")
        assert wide == 390 and not page.one("#sidebar").is_displayed()
        page.one("#menu").click()
        page.until(lambda: page.one("#sidebar").rect["x"] == 0)
        page.one("#conversations .title").click()
        page.until(lambda: not page.one("#sidebar").is_displayed())
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_everything_has_a_name_and_is_reached_by_keyboard(page: Page):
    page.ask("think, then markdown")
    names = page.driver.execute_script("""
        return [...document.querySelectorAll("button, input, select, textarea, summary, a")]
            .filter(e => e.checkVisibility())
            .map(e => (e.getAttribute("aria-label") || e.labels?.[0]?.textContent || e.textContent || "").trim())""")
    assert all(names)
    seen = set()
    for _ in range(40):
        page.driver.switch_to.active_element.send_keys(Keys.TAB)
        active = page.driver.switch_to.active_element
        seen.add(active.get_attribute("id") or active.text or active.get_attribute("class"))
    assert {"new", "model-0", "compare", "settings-open", "composer-text", "send"} <= seen


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_stands_out_from_its_ground(page: Page, theme: str):
    """WCAG AA: 4.5 to 1 for text, in both colours."""
    page.ask("think")
    while page.driver.execute_script("return document.documentElement.dataset.theme || ''") != theme:
        page.driver.execute_script("document.getElementById('theme').click()")
    ratios = page.driver.execute_script(CONTRAST)
    assert len(ratios) > 8 and min(ratios)[0] >= 4.5, min(ratios)


def test_the_policy_is_strict(scripted: Any):
    headers = scripted.get("/").headers
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    for name in ("/page/app.js", "/page/style.css", "/page/icon.svg", "/page/math.js"):
        assert scripted.get(name).status_code == 200
    for name in ("/page/../app.py", "/page/%2e%2e/app.py", "/page/none.js", "/page/app.py"):
        assert scripted.get(name).status_code == 404
