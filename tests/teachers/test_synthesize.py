"""New questions from a teacher: four methods through the same store, provenance, sieves, resuming, prices."""
# ruff: noqa: E501 (command lines)

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from asked import ENVIRONMENT, Server, write_questions
from test_ask_crash import answered
from test_ask_serve import Serving

from shoestring.cli import main
from shoestring.core.atomic import read_lines
from shoestring.core.nouns import Message
from shoestring.curate._writing import OPERATORS, WANTED, Request, judgement, read, rejected, unfit
from shoestring.data.store import Store
from shoestring.data.traces import TraceStore
from shoestring.models.checkpoint import save
from shoestring.models.dense import Dense, DenseConfig
from shoestring.text.chat import render, user_opening
from shoestring.text.tokenizer import Tokenizer

SEEDS = [f"What is the sum of {i} and {i + 3}, and why?" for i in range(12)]
CHATML = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


@pytest.fixture
def inventive(start: Callable[..., Server]) -> Server:
    return start("--invent")


def command(server: Server, folder: Path, method: str, count: int, *more: str) -> list[str]:
    seeds = [] if method == "nothing" else ["--seeds", str(write_questions(folder / "seeds.jsonl", SEEDS))]
    template = ["--template", "chatml"] if method == "nothing" else []
    return [
        "synthesize", "--method", method, "--count", str(count), *seeds, *template, "--teacher", server.url, "--model", "m",
        "--name", "t", "--price", "1,2", "--budget", "1", "--out", str(folder / "prompts"), "--quiet", "--json", *more,
    ]  # fmt: skip


def made(capsys: pytest.CaptureFixture[str], arguments: list[str], code: int = 0) -> dict[str, Any]:
    assert main(arguments) == code
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return read_lines(folder / "prompts" / "questions.jsonl")


@pytest.mark.parametrize(("method", "operators"), [
    ("self_instruct", {"self_instruct"}), ("evolve", set(OPERATORS)), ("persona", set(WANTED)), ("nothing", {"nothing"}),
])  # fmt: skip
def test_each_method(
    inventive: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str, operators: set[str]
) -> None:
    """As many as wanted, each with where it is from; the same command again costs nothing; more ask what is missing."""
    count = 25 if method == "persona" else 60
    found = made(capsys, command(inventive, tmp_path, method, count))
    rows = rows_of(tmp_path)
    assert found["questions"] == len(rows) == len({row["question"] for row in rows}) == count and found["ended"] is None
    assert {row["synthesis"]["operator"] for row in rows} == operators
    traces = {trace.id: trace for trace in TraceStore(tmp_path / "prompts")}
    ids = {row["id"] for row in rows} | {str(i) for i in range(len(SEEDS))}
    for row in rows:
        told = row["synthesis"]
        assert row["question"] in traces[told["trace"]].answer and told["method"] == method and told["teacher"] == "t"
        assert bool(told["parents"]) == (method != "nothing") and told["licence"] == "unknown" and told["date"]
        if method in ("evolve", "self_instruct"):
            assert set(told["parents"]) <= ids
        if method == "persona":
            assert any(told["person"] in trace.answer for trace in traces.values())
    assert found["dropped"].get("cut off") and found["dropped"].get("repeat" if method != "persona" else "cut off")

    requests, before = inventive.stats()["requests"], (tmp_path / "prompts" / "questions.jsonl").stat().st_mtime_ns
    assert made(capsys, command(inventive, tmp_path, method, count))["answers_now"] == 0
    assert inventive.stats()["requests"] == requests
    assert (tmp_path / "prompts" / "questions.jsonl").stat().st_mtime_ns == before
    more = made(capsys, command(inventive, tmp_path, method, count + 5))
    assert more["questions"] == count + 5 and more["answers_now"] < 20
    assert [row["id"] for row in rows_of(tmp_path)[:count]] == [row["id"] for row in rows]


def test_the_teacher_judges_what_it_evolved(
    inventive: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each new question beside the one it was made of, once; what it rejects is not kept, nor evolved further."""
    found = made(capsys, command(inventive, tmp_path, "evolve", 40, "--judge"))
    rows = {row["id"]: row for row in rows_of(tmp_path)}
    seeds = {str(i): text for i, text in enumerate(SEEDS)}
    texts = seeds | {one: row["question"] for one, row in rows.items()}
    asked = {trace.messages[0]["content"]: trace.answer for trace in TraceStore(tmp_path / "prompts")}
    for row in rows.values():
        (parent,) = row["synthesis"]["parents"]
        request = judgement(texts[parent], row["question"]).messages[0][1]
        assert asked[request] == "<changed>yes</changed> <answerable>yes</answerable>"
    kinds = ("judged to ask the same", "judged not to be answerable", "not judged")
    verdicts = [rejected(answer, "stop") for text, answer in asked.items() if "<answerable>" in text]
    assert found["questions"] == len(rows) == 40 and all(found["dropped"].get(why) for why in kinds)
    assert len(verdicts) >= 40 + sum(found["dropped"][why] for why in kinds[:2])
    assert made(capsys, command(inventive, tmp_path, "evolve", 40, "--judge"))["answers_now"] == 0
    (tmp_path / "poor").mkdir()
    arguments = command(inventive, tmp_path / "poor", "evolve", 40, "--judge", "--max-tokens", "50")
    arguments[arguments.index("--budget") + 1] = "0.008"
    poor = made(capsys, arguments, code=1)
    assert "budget" in poor["ended"] and poor["questions"] < 40
    arguments[arguments.index("--budget") + 1] = "1"
    assert made(capsys, arguments)["questions"] == 40


def test_verdicts_of_the_teacher() -> None:
    for answer, told in (
        ("<changed>yes</changed> <answerable>yes</answerable>", ""),
        ("<think>no</think><Changed>Yes.</Changed>\n<answerable> yes </answerable>", ""),
        ("<changed>no</changed><answerable>yes</answerable>", "judged to ask the same"),
        ("<changed>yes</changed><answerable>no</answerable>", "judged not to be answerable"),
        ("<changed>yes</changed>", "not judged"), ("Yes and yes.", "not judged"),
    ):  # fmt: skip
        assert rejected(answer, "stop") == told
    assert rejected("<changed>yes</changed> <answerable>yes</answerable>", "length") == "not judged"


def test_the_file_is_what_ask_reads(inventive: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made(capsys, command(inventive, tmp_path, "evolve", 20))
    assert main([
        "ask", "--teacher", inventive.url, "--model", "m", "--price", "1,2", "--budget", "1", "--quiet", "--json",
        "--questions", str(tmp_path / "prompts" / "questions.jsonl"), "--out", str(tmp_path / "traces"),
    ]) == 0  # fmt: skip
    assert json.loads(capsys.readouterr().out)["answered"] == 20
    rows = {row["id"]: row["question"] for row in rows_of(tmp_path)}
    assert {trace.problem_id: trace.messages[0]["content"] for trace in TraceStore(tmp_path / "traces")} == rows


def test_what_stands_in_an_evaluation_set_or_is_nearly_there_is_dropped(
    inventive: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made(capsys, command(inventive, tmp_path, "nothing", 30))
    first = [row["question"] for row in rows_of(tmp_path)]
    long = [text for text in first if len(text.split()) > 10]
    near = [text.replace("What is the", "Say: what is the") for text in long[5:10]]
    write_questions(tmp_path / "test.jsonl", long[:5])
    write_questions(tmp_path / "seeds.jsonl", near)
    found = made(
        capsys,
        [
            *command(inventive, tmp_path, "nothing", 20),
            "--seeds",
            str(tmp_path / "seeds.jsonl"),
            "--against",
            str(tmp_path / "test.jsonl"),
        ],
    )
    assert found["dropped"]["in an evaluation set"] == 5 and found["dropped"]["near repeat"] == 5
    kept = [row["question"] for row in rows_of(tmp_path)]
    assert not set(kept) & set(long[:10]) and len(kept) == 20


def test_a_budget_holds_and_the_rest_goes_on(
    inventive: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*command(inventive, tmp_path, "evolve", 60), "--max-tokens", "50"]
    arguments[arguments.index("--budget") + 1] = "0.003"
    found = made(capsys, arguments, code=1)
    assert "budget" in found["ended"] and 0 < found["questions"] < 60
    store = Store(tmp_path / "prompts")
    assert store.read_purse().spent + store.read_purse().doubt <= 3 * 10**9
    store.close()
    arguments[arguments.index("--budget") + 1] = "1"
    assert made(capsys, arguments)["questions"] == 60


@pytest.mark.parametrize("method", ["evolve", "persona"])
def test_a_dry_run_prices_the_rest(
    inventive: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    told = made(capsys, [*command(inventive, tmp_path, method, 40), "--dry-run"])["forecast"]
    assert told["questions"] > 5 and told["usd_95"][0] < told["usd"] < told["usd_95"][1]
    found = made(capsys, command(inventive, tmp_path, method, 40))
    store = Store(tmp_path / "prompts")
    spent = store.read_purse().spent / 1e12
    store.close()
    assert found["questions"] == 40 and 0.5 * spent < told["usd"] < 2 * spent
    assert main([one for one in command(inventive, tmp_path, method, 40) if one != "--json"] + ["--dry-run"]) == 0
    assert "would take about" in capsys.readouterr().out


def test_kill_9_and_the_same_questions(
    start: Callable[..., Server], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed twice, it ends with the questions of a run that was not, and pays for each request once."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir(), killed.mkdir()
    plain = start("--invent")
    made(capsys, command(plain, whole, "evolve", 80))
    slow = start("--invent", "--latency", "0.05", "--remember")
    arguments = [sys.executable, "-m", "shoestring.cli", *command(slow, killed, "evolve", 80), "--concurrency", "8"]
    for more in (15, 60):
        process = subprocess.Popen(arguments, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline and answered(killed / "prompts") < more:
            time.sleep(0.003)
        process.kill()
        process.wait()
    done = subprocess.run(arguments, env=ENVIRONMENT, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr

    def said(folder: Path) -> list[tuple[str, str, list[str]]]:
        return [(row["question"], row["synthesis"]["operator"], row["synthesis"]["parents"]) for row in rows_of(folder)]

    assert said(whole) == said(killed)
    assert slow.stats()["billed"] == slow.stats()["questions"] == plain.stats()["billed"]


def test_a_teacher_that_brings_nothing_ends_it(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = made(capsys, command(server, tmp_path, "self_instruct", 5), code=1)
    assert "brought nothing new" in found["ended"] and found["dropped"] == {
        "no question in the answer": found["requests"]
    }
    found = made(capsys, [*command(server, tmp_path, "evolve", 5000)], code=1)
    assert "nothing more can be asked" in found["ended"] and found["requests"] == len(SEEDS) * len(OPERATORS)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that says nonsense and now and then ends its turn."""
    tokenizer = Tokenizer.train(["question 0 1 2 3 4 5 6 7 8 9 answer"], 280)
    config = DenseConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("local") / "teacher"
    save(Dense(config, generator=torch.Generator().manual_seed(0)), tokenizer, folder)
    return folder


def test_from_nothing_in_this_process(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The prompt is the template up to the user's words, token by token; what came up to the turn's end is the question."""
    arguments = ["synthesize", "--method", "nothing", "--teacher", str(model), "--count", "6", "--out", str(tmp_path / "prompts"),
                 "--max-tokens", "120", "--seed", "4", "--filters", "dedup", "--fewest-words", "1", "--quiet", "--json"]  # fmt: skip
    found = made(capsys, arguments)
    traces, tokenizer = {trace.id: trace for trace in TraceStore(tmp_path / "prompts")}, Tokenizer.load(model)
    opening = render([Message("user", "question")], tokenizer).ids[: -len(tokenizer.encode("question"))]
    assert found["questions"] == 6 and all(trace.prompt_ids == opening for trace in traces.values())
    for row in rows_of(tmp_path):
        trace = traces[row["synthesis"]["trace"]]
        assert (
            trace.token_ids is not None
            and trace.finish_reason == "stop"
            and trace.token_ids[-1] in (tokenizer.id_of("<|assistant|>"), tokenizer.end)
        )
        assert (
            row["question"] == tokenizer.decode(trace.token_ids[:-1], specials=False).rpartition("</think>")[2].strip()
            and "<|" not in row["question"]
        )
    before = rows_of(tmp_path)
    assert made(capsys, arguments)["answers_now"] == 0 and rows_of(tmp_path) == before


@pytest.mark.slow
def test_from_nothing_through_our_server(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Text completions of `shoestring serve`: the same opening, ended by the template's own token."""
    serving, tokenizer = Serving(model, tmp_path), Tokenizer.load(model)
    try:
        serving.wait()
        found = made(capsys, [
            "synthesize", "--method", "nothing", "--teacher", f"http://127.0.0.1:{serving.port}", "--model", "teacher",
            "--template", str(model), "--count", "5", "--out", str(tmp_path / "prompts"), "--max-tokens", "120", "--quiet",
            "--json", "--filters", "dedup", "--fewest-words", "1", "--concurrency", "8",
        ])  # fmt: skip
    finally:
        serving.stop(signal.SIGTERM)
    traces = TraceStore(tmp_path / "prompts").read()
    opening, ending = user_opening(tokenizer)
    assert found["questions"] == len(rows_of(tmp_path)) == 5
    assert {trace.messages[0]["content"] for trace in traces} == {opening}
    assert {trace.usage["prompt_tokens"] for trace in traces} == {len(tokenizer.encode(opening, specials=True))}
    assert len({trace.answer for trace in traces}) > 5 and not any(
        ending in row["question"] for row in rows_of(tmp_path)
    )


def test_from_nothing_by_a_template(model: Path) -> None:
    """What is sent is what the template writes before the user's words, with and without a system prompt."""
    tokenizer = Tokenizer.load(model)
    before, after = user_opening(tokenizer)
    ids = render([Message("user", "question 7")], tokenizer).ids
    assert tokenizer.encode(before, specials=True) + tokenizer.encode("question 7") == ids and after == "<|assistant|>"
    before, _ = user_opening(tokenizer, "Ask of <|user|> sums.")
    assert before.endswith("sums.<|user|>")
    tokenizer.chat_template = CHATML
    assert user_opening(tokenizer, "S") == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant",
    )


@pytest.mark.parametrize(("more", "told"), [
    (["--method", "guess"], 'no method "guess"'),
    (["--method", "persona", "--seeds", "SEEDS", "--judge", "--price", "0,0"], "--judge belongs to --method evolve"),
    (["--method", "evolve"], "--method evolve writes from something: give --seeds FILE"),
    (["--method", "persona"], "--personas FILE or --seeds FILE"),
    (["--method", "evolve", "--seeds", "SEEDS", "--prefix", "x"], "belong to --method nothing"),
    (["--method", "evolve", "--seeds", "SEEDS", "--personas", "SEEDS"], "belong to --method persona"),
    (["--method", "persona", "--personas", "SEEDS"], 'line 1 is not a JSON object with "persona"'),
    (["--method", "nothing"], "needs the teacher's template"),
    (["--method", "nothing", "--template", "nowhere"], "neither a folder"),
    (["--method", "nothing", "--template", "chatml", "--system", "x"], "--system needs the tokenizer's own template"),
    (["--method", "nothing", "--template", "chatml", "--temperature", "0"], "a --temperature above 0"),
    (["--method", "nothing", "--template", "chatml", "--about", "sums"], "steer it with --system"),
    (["--method", "nothing", "--template", "chatml", "--count", "0"], "--count is 0"),
    (["--method", "nothing", "--template", "chatml", "--price", "1,2"], "needs a limit"),
    (["--method", "nothing", "--template", "chatml", "--filters", "nosuch"], 'no "nosuch" in curate'),
    (["--method", "nothing", "--template", "chatml", "--out", "SEEDS"], "--out is a folder"),
    (["--method", "evolve", "--seeds", "SEEDS", "--against", "nowhere.jsonl", "--price", "0,0"], "there is no file nowhere.jsonl"),
])  # fmt: skip
def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], told: str) -> None:
    write_questions(tmp_path / "seeds.jsonl", SEEDS)
    more = [str(tmp_path / "seeds.jsonl") if one == "SEEDS" else one for one in more]
    out = [] if "--out" in more else ["--out", str(tmp_path / "prompts")]
    assert main(["synthesize", "--teacher", "http://127.0.0.1:9", "--model", "m", "--count", "3", *out, *more]) == 2
    assert told in capsys.readouterr().err


def test_terms_that_forbid_it(inventive: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = command(inventive, tmp_path, "evolve", 3)
    arguments[arguments.index("--model") + 1] = "gpt-4o"
    assert main(arguments) == 2 and "--i-have-permission" in capsys.readouterr().err
    made(capsys, [*arguments, "--i-have-permission", "a letter"])
    assert {row["synthesis"]["permission"] for row in rows_of(tmp_path)} == {"a letter"}


def test_reading_answers() -> None:
    request = Request((("user", "x"),), "deepen")
    assert read(request, "<think><question>no</question></think><question> a\nb </question>", "stop") == (["a\nb"], "")
    assert read(request, "<question>a</question>", "length") == ([], "cut off")
    assert read(request, "a question", "stop") == ([], "no question in the answer")
    assert read(Request((("raw", "x"),), "nothing"), " hello<|im_end|>and on", "stop", ("<|im_end|>",)) == (
        ["hello"],
        "",
    )
    assert read(Request((("raw", "x"),), "nothing"), "<|im_end|>", "stop", ("<|im_end|>",)) == (
        [],
        "no question in the answer",
    )
    assert (
        unfit("what is <|pad|> it", 3, 9) == "special token in it"
        and unfit("is 3 <| 4 |> 5", 3, 9) == "special token in it"
    )
    assert unfit("two words", 3, 9) == "too short" and unfit("a b c d", 1, 3) == "too long"
    assert unfit("三加五等于多少", 3, 9) == "" and unfit("Answer the given question.", 3, 9) == "speaks of its prompt"
