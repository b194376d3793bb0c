"""The filters, the chain over a store, and that the contract catches filters that break it."""
# ruff: noqa: E501 (tables of cases)

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from shoestring.cli import main
from shoestring.core.errors import UserError
from shoestring.core.nouns import Trace
from shoestring.core.parts import check
from shoestring.core.registry import load_part
from shoestring.curate._contract import example, traces
from shoestring.curate._sieve import Filter, View, grade_all, keep, run
from shoestring.data.export import JSON_COLUMNS, chat_row, export
from shoestring.data.store import Store
from shoestring.data.traces import TraceStore
from shoestring.tasks import gsm8k

DRAW = random.Random(3)
VOCABULARY = ["".join(DRAW.choices("abcdefghijklmnopqrstuvwxyz", k=7)) for _ in range(3000)]


@pytest.fixture(autouse=True)
def the_same_texts() -> None:
    """Whichever tests this process has run before."""
    DRAW.seed(3)


def text(words: int, draw: random.Random = DRAW) -> str:
    return " ".join(draw.choices(VOCABULARY, k=words))


def reasons(name: str, given: list[Trace], **options: Any) -> list[str]:
    return list(load_part("curate", name).judge(given, **options))


def answers(*said: str, **fields: Any) -> list[Trace]:
    return [example(id=f"t{i}", answer=one, thinking=None, **fields) for i, one in enumerate(said)]


def test_correct_keeps_what_is_verified_and_finished() -> None:
    assert [trace.id for trace in keep(load_part("curate", "correct"), traces())] == ["a0", "a4", "a5", "a6"]
    assert reasons("correct", [example(finish_reason="length")]) == ["cut off"]
    assert reasons("not_wrong", traces()) == ["", "wrong", "", "", "", "", ""]


def test_dedup_keeps_the_first_of_equal_answers() -> None:
    same = [example(), example(id="b", date="2027-01-01T00:00:00+00:00"), example(id="c", thinking=None)]
    other = example(id="d", messages=[{"role": "user", "content": "3 + 9 ?"}])
    assert reasons("dedup", [*same, other]) == ["", "repeat", "", ""]


def test_finished() -> None:
    given = [example(), example(finish_reason="length"), example(finish_reason="content_filter"), example(answer=" ")]
    assert reasons("finished", given) == ["", "cut off", "finished by content_filter", "no text"]


def test_empty() -> None:
    """Tokens that are no well-formed answer are said all the same; the token that ends a turn says nothing."""
    silent = example(answer=" ", thinking=None)
    given = [example(), replace(silent, thinking="3 + 8"), silent, replace(silent, token_ids=[1]),
             replace(silent, token_ids=[7, 1]), replace(silent, token_ids=[7], finish_reason="length"),
             replace(silent, token_ids=[], finish_reason="length")]  # fmt: skip
    assert reasons("empty", given) == ["", "", "empty", "empty", "", "", "empty"]


def test_repeated() -> None:
    loop = "so we add one and then we add one more " * 20
    assert reasons("repeated", answers(loop, text(300), "yes yes yes yes", text(100) + loop)) == [
        "repeats itself", "", "", "repeats itself",
    ]  # fmt: skip
    with pytest.raises(UserError, match="repeated"):
        reasons("repeated", answers("a"), most=2)


def test_one_language() -> None:
    english = "Let x be the number of apples. " * 5
    given = answers(english, english + "因此我们得到答案是十二个苹果", english + "α + β = π", "Тогда получаем ответ: 12",
                    "café naïve Größe", "12 + 7 = 19")  # fmt: skip
    assert reasons("one_language", given) == ["", "mixes Latin and Chinese or Japanese", "", "", "", ""]


def test_refused() -> None:
    given = answers(
        "I'm sorry, but I can't help with that.", "As an AI language model, I have no opinion.", "I cannot assist with this.",
        "The sorry knight said: I can't. The answer is 12.", "12", "We must decline the noun." + " x" * 200 + " I cannot help",
    )  # fmt: skip
    assert reasons("refused", given) == ["refuses", "refuses", "refuses", "", "", ""]


def changed(words: list[str], share: float, draw: random.Random) -> list[str]:
    """The words with a share of them replaced."""
    return [draw.choice(VOCABULARY) if draw.random() < share else word for word in words]


def jaccard(one: str, two: str, n: int = 5) -> float:
    a, b = ({tuple(t.split()[i : i + n]) for i in range(len(t.split()) - n + 1)} for t in (one, two))
    return len(a & b) / len(a | b)


def test_near_duplicates_finds_what_is_alike() -> None:
    """Planted pairs by their true Jaccard similarity, computed here: all above 0.8, none below 0.5."""
    draw = random.Random(5)
    given, alike, unlike = [], [], []
    for i in range(400):
        words = text(200, draw).split()
        given.append(" ".join(words))
        if i % 2:
            given.append(" ".join(changed(words, draw.choice([0.005, 0.02, 0.08]), draw)))
            similarity = jaccard(given[-2], given[-1]) if len(words) else 0
            (alike if similarity >= 0.8 else unlike if similarity < 0.5 else []).append(len(given) - 1)
    asked = [
        example(id=str(i), thinking=None, answer=one, messages=[{"role": "user", "content": ""}])
        for i, one in enumerate(given)
    ]
    found = reasons("near_duplicates", asked)
    assert len(alike) > 60 and len(unlike) > 20
    assert all(found[i] == "near repeat" for i in alike)
    originals = [i for i in range(len(given)) if i not in alike and not found[i]]
    assert all(not found[i] for i in unlike) and len(originals) >= 400
    assert reasons("near_duplicates", asked) == found
    with pytest.raises(UserError, match="near_duplicates"):
        reasons("near_duplicates", asked, threshold=0)


def test_near_duplicates_leaves_short_texts_to_dedup() -> None:
    assert reasons("near_duplicates", answers("a b", "a b", "", messages=[])) == ["", "", ""]


def test_decontaminate(tmp_path: Path) -> None:
    draw = random.Random(9)
    question = "Natalia sold clips to " + text(30, draw) + " how many clips did she sell in May"
    short = "what is seven times six"
    path = tmp_path / "eval.jsonl"
    path.write_text("".join(json.dumps({"question": q}) + "\n" for q in (question, text(40, draw), short)))
    words = question.split()
    said_13, said_12 = " ".join(words[5:18]), " ".join(words[5:17])
    edited = " ".join(draw.choice(VOCABULARY) if i in (3, 20) else word for i, word in enumerate(words))

    def asks(content: str, answer: str = "12") -> Trace:
        return example(messages=[{"role": "user", "content": content}], answer=answer, thinking=None)

    given = [
        asks("unrelated " + text(20, draw)), asks(question), asks(text(5, draw), f"see {said_13} so"),
        asks(text(5, draw), f"see {said_12} so"), asks(f"Please: {question.upper()}!"), asks(edited), asks(short.title() + "?"),
        asks(f"{short} plus one"), asks(" ".join(words[:6]), " ".join(words[6:14])),  # across question and answer
    ]  # fmt: skip
    exact, fuzzy = "in an evaluation set", "like a question of an evaluation set"
    found = reasons("decontaminate", given, against=str(path))
    assert found == ["", exact, exact, "", exact, exact, exact, "", exact]
    every_9 = " ".join("another" if i % 9 == 8 else word for i, word in enumerate(words))  # no run of 13 is left
    assert reasons("decontaminate", [asks(every_9)], against=[str(path)]) == [fuzzy]
    assert reasons("decontaminate", given * 200, against=str(path)) == found * 200
    for bad, message in (
        ("", "holds no questions"),
        ("{}\n", "line 1 has no question"),
        ("no\n", "line 1 has no question"),
    ):
        path.write_text(bad)
        with pytest.raises(UserError, match=message):
            reasons("decontaminate", given, against=str(path))
    with pytest.raises(UserError, match="there is no file"):
        reasons("decontaminate", given, against="nowhere.jsonl")


def test_decontaminate_against_a_plain_twin(tmp_path: Path) -> None:
    """The batch of hashes finds what sets of tuples of words find."""
    draw = random.Random(1)
    sets = [text(draw.randrange(13, 60), draw) for _ in range(50)]
    path = tmp_path / "eval.txt"
    path.write_text("\n".join(sets))
    pieces = [one.split() for one in sets]
    given = []
    for _ in range(300):
        held = draw.choice(pieces)
        start = draw.randrange(len(held))
        part = held[start : start + draw.randrange(8, 20)]
        given.append(example(messages=[{"role": "user", "content": text(9, draw)}], thinking=None,
                             answer=" ".join([text(9, draw), *part, text(9, draw)])))  # fmt: skip
    known = {tuple(words[i : i + 13]) for words in pieces for i in range(len(words) - 12)}

    def plain(trace: Trace) -> bool:
        words = f"{trace.messages[0]['content']} {trace.answer}".split()
        return any(tuple(words[i : i + 13]) in known for i in range(len(words) - 12))

    found = reasons("decontaminate", given, against=str(path), fuzzy=1.0)
    assert [why == "in an evaluation set" for why in found] == [plain(trace) for trace in given]
    assert 30 < sum(map(plain, given)) < 270


def test_majority() -> None:
    asked = answers("so \\boxed{12}", "It is 12.", "12.0", "13", "The answer: 7")
    assert reasons("majority", asked) == ["", "", "", "against the majority", "against the majority"]
    assert reasons("majority", asked[:2]) == ["too few answers to agree"] * 2
    assert reasons("majority", answers("1", "2", "3")) == ["no majority"] * 3


def test_difficulty() -> None:
    def of(question: str, *verdicts: bool | None) -> list[Trace]:
        return [example(messages=[{"role": "user", "content": question}], correct=v) for v in verdicts]

    given = [*of("easy", True, True), *of("mid", True, False), *of("hard", False, False), *of("free", None)]
    assert reasons("difficulty", given, lowest=0.1, highest=0.9) == ["too easy"] * 2 + [""] * 2 + ["too hard"] * 2 + [
        ""
    ]
    with pytest.raises(UserError, match="no band"):
        reasons("difficulty", given, lowest=0.9, highest=0.1)


def test_balance() -> None:
    given = [example(id=str(i), task="a" if i < 30 else None) for i in range(35)]
    found = reasons("balance", given, most=10)
    assert found[:30].count("") == 10 and found[30:] == [""] * 5
    backwards = reasons("balance", given[::-1], most=10)[::-1]
    assert backwards == found  # the same ones, in whatever order


def test_length() -> None:
    given = [
        example(id=str(i), usage={"prompt_tokens": 1, "completion_tokens": n}) for i, n in enumerate((5, 9, 7, 100))
    ]
    other = "another length was wanted"
    assert reasons("length", given, policy="short", per_question=2) == ["", other, "", other]
    assert reasons("length", given, policy="long", per_question=1) == [other, other, other, ""]
    assert reasons("length", given, policy="mixed", per_question=2) == ["", other, other, ""]
    assert reasons("length", given, policy="long", per_question=1, most_tokens=50) == [other, "", other, "too long"]
    assert reasons("length", given, policy="mixed", per_question=9) == [""] * 4
    with pytest.raises(UserError, match="policy"):
        reasons("length", given, policy="tall")


# ---- the chain over a store -----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    given = [example(id=f"g{i}", answer=f"{text(30)} {i}", correct=i % 3 != 0) for i in range(60)]
    given += [example(id=f"c{i}", answer=text(30), finish_reason="length") for i in range(5)]
    given += [example(id=f"r{i}", answer=given[1].answer) for i in range(4)]
    TraceStore(tmp_path / "traces").append(given)
    return tmp_path / "traces"


CHAIN = [Filter("finished"), Filter("correct"), Filter("dedup")]


def test_a_chain_marks_and_never_deletes(folder: Path) -> None:
    store = Store(folder)
    steps, view = run(store, CHAIN)
    assert [(s.name, s.seen, dict(s.dropped)) for s in steps] == [
        ("finished", 69, {"cut off": 5}), ("correct", 64, {"wrong": 20}), ("dedup", 44, {"repeat": 4}),
    ]  # fmt: skip
    kept = list(view)
    assert len(kept) == 40 and kept == list(view)
    plain = list(TraceStore(folder))
    for one in CHAIN:
        plain = keep(one.load(), plain)
    assert kept == plain  # over a list, the same
    assert len(TraceStore(folder)) == 69
    assert {trace.id for trace in steps[0].samples["cut off"]} <= {f"c{i}" for i in range(5)}
    store.close()


def test_a_chain_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Done again: nothing is judged. New answers: stateless filters judge those alone."""
    store = Store(folder)
    run(store, CHAIN)
    seen: list[str] = []
    for name in ("finished", "correct", "dedup"):
        module = load_part("curate", name)
        judge = module.judge
        monkeypatch.setattr(module, "judge", lambda given, j=judge, n=name: j((seen.append(n), t)[1] for t in given))
    first = run(store, CHAIN)[0]
    assert seen == [] and [dict(s.dropped) for s in first] == [{"cut off": 5}, {"wrong": 20}, {"repeat": 4}]
    TraceStore(folder).append([example(id="new", answer="x"), example(id="new2", finish_reason="length")])
    steps, view = run(store, CHAIN)
    assert seen.count("finished") == 2 and seen.count("correct") == 1 and seen.count("dedup") == 45
    assert len(list(view)) == 41 and steps[0].dropped["cut off"] == 6
    other = run(store, [Filter("correct"), Filter("finished")])[0]  # another chain lies beside it
    assert [dict(s.dropped) for s in other] == [{"wrong": 20, "cut off": 6}, {}]
    store.close()


def test_a_kill_in_a_filter_costs_that_filter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(folder)
    module = load_part("curate", "dedup")
    judge = module.judge

    def dies(given: Any) -> Any:
        for i, why in enumerate(judge(given)):
            if i == 20:
                raise KeyboardInterrupt
            yield why

    with monkeypatch.context() as patch:
        patch.setattr("shoestring.curate._sieve.CHUNK", 7)
        patch.setattr(module, "judge", dies)
        with pytest.raises(KeyboardInterrupt):
            run(store, CHAIN)
    steps, view = run(store, CHAIN)
    assert [dict(s.dropped) for s in steps] == [{"cut off": 5}, {"wrong": 20}, {"repeat": 4}] and len(list(view)) == 40
    store.close()


def test_answers_that_come_late_are_judged(folder: Path) -> None:
    """A row before those that were judged: its answer took longer, or failed and was asked for again."""
    store = Store(folder)
    late = store.sql.execute("SELECT * FROM answers WHERE row IN (3, 4, 62)").fetchall()
    store.sql.execute("DELETE FROM answers WHERE row IN (3, 4, 62)")
    assert len(list(run(store, CHAIN)[1])) == 39
    store.sql.executemany("INSERT INTO answers VALUES (?, ?, ?, ?, ?, ?, ?, ?)", late)
    steps, view = run(store, CHAIN)
    assert [dict(s.dropped) for s in steps] == [{"cut off": 5}, {"wrong": 20}, {"repeat": 4}] and len(list(view)) == 40
    store.close()


def test_a_kill_in_a_filter_that_judges_each_by_itself(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes on near where it was; an answer that came late, before that place, makes it begin anew."""
    store, seen = Store(folder), list[str]()
    late = store.sql.execute("SELECT * FROM answers WHERE row = 3").fetchall()
    store.sql.execute("DELETE FROM answers WHERE row = 3")
    module, ends = load_part("curate", "finished"), [40]
    judge = module.judge

    def dies(given: Any) -> Any:
        for i, (trace, why) in enumerate(zip(given, judge(given), strict=True)):
            if i == ends[0]:
                raise KeyboardInterrupt
            seen.append(trace.id)
            yield why

    monkeypatch.setattr("shoestring.curate._sieve.CHUNK", 7)
    monkeypatch.setattr(module, "judge", dies)
    with pytest.raises(KeyboardInterrupt):
        run(store, CHAIN)
    ends[0] = 30
    with pytest.raises(KeyboardInterrupt):
        run(store, CHAIN)
    assert len(seen) == 70 and seen[40] == "g36"  # 35 of the first 40 were on record, and one is not there yet
    store.sql.executemany("INSERT INTO answers VALUES (?, ?, ?, ?, ?, ?, ?, ?)", late)
    ends[0] = 1000
    steps, _ = run(store, CHAIN)
    assert len(seen) == 70 + 69 and [dict(s.dropped) for s in steps] == [{"cut off": 5}, {"wrong": 20}, {"repeat": 4}]
    store.close()


def test_a_store_of_the_first_schema(folder: Path) -> None:
    """It is brought up to date when it is opened; what was judged before is judged anew."""
    store = Store(folder)
    run(store, CHAIN)
    store.sql.execute("ALTER TABLE filters DROP COLUMN judged")
    store.sql.execute("PRAGMA user_version = 1")
    store.close()
    assert len(list(TraceStore(folder))) == 69
    store = Store(folder)
    steps, view = run(store, CHAIN)
    assert [dict(s.dropped) for s in steps] == [{"cut off": 5}, {"wrong": 20}, {"repeat": 4}] and len(list(view)) == 40
    assert store.sql.execute("PRAGMA user_version").fetchone() == (2,)
    store.close()


def test_grading_fills_in_verdicts(tmp_path: Path) -> None:
    store = Store(tmp_path / "traces", create=True)
    problem = {
        "task": "gsm8k",
        "version": gsm8k.VERSION,
        "id": "p",
        "prompt": "q",
        "gold": "12",
        "difficulty": 1,
        "seed": 0,
        "meta": {},
    }
    TraceStore(tmp_path / "traces").append(
        [
            example(id=str(i), answer=said, correct=None, task=None, problem_id=None)
            for i, said in enumerate(("\\boxed{12}", "13", "12"))
        ]
    )
    store.base.execute("UPDATE questions SET problem = ?", (json.dumps(problem),))
    before = run(store, [Filter("correct")], grade=False)[0]
    assert dict(before[0].dropped) == {"not verified": 3}
    assert grade_all(store) == 3 and grade_all(store) == 0
    assert dict(run(store, [Filter("correct")])[0][0].dropped) == {"wrong": 1}  # judged anew, with their verdicts
    assert [trace.correct for trace in View(store.base, [])] == [True, False, True]
    store.close()


def test_exports(folder: Path, tmp_path: Path) -> None:
    given = list(TraceStore(folder))
    assert export(folder, tmp_path / "all.jsonl") == 69 and TraceStore(tmp_path / "all.jsonl").read() == given
    assert export(folder, tmp_path / "all.parquet") == 69
    columns = pq.read_table(tmp_path / "all.parquet").to_pylist()
    assert [Trace.from_dict(row | {name: json.loads(row[name]) for name in JSON_COLUMNS}) for row in columns] == given
    assert export(given, tmp_path / "all.chat.jsonl") == 69
    rows = [json.loads(line) for line in (tmp_path / "all.chat.jsonl").read_text().splitlines()]
    assert rows[0] == chat_row(given[0]) and rows[0]["messages"][-1] == {
        "role": "assistant", "content": given[0].answer, "reasoning_content": given[0].thinking,
    }  # fmt: skip
    with pytest.raises(UserError, match="exported as"):
        export(folder, tmp_path / "all.csv")
    assert not list(tmp_path.glob(".*"))


def test_the_verb(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evals = tmp_path / "eval.txt"
    evals.write_text(text(20) + "\n")
    base = [
        "curate",
        str(folder),
        "--filters",
        "finished,correct,dedup,length",
        "--against",
        str(evals),
        "--json",
        "--quiet",
    ]
    assert main([*base, "--dry-run", "--export", str(tmp_path / "no.jsonl")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["answers"] == 69 and found["kept"] == 2 and not (tmp_path / "no.jsonl").exists()
    assert [step["filter"] for step in found["funnel"]] == ["finished", "correct", "dedup", "length", "decontaminate"]
    page, card = tmp_path / "page.html", tmp_path / "CARD.md"
    assert main([*base, "--option", "length.per_question=30", "--export", str(tmp_path / "kept.jsonl"), "--page", str(page),
                 "--card", str(card)]) == 0  # fmt: skip
    assert json.loads(capsys.readouterr().out)["exported"] == {str(tmp_path / "kept.jsonl"): 30}
    assert "cut off (5)" in page.read_text() and "http" not in page.read_text().replace("http-equiv", "")
    assert "30 traces" in card.read_text() and "| finished" in card.read_text() and "MIT: 30" in card.read_text()
    for arguments, message in (
        (["--filters", "shiny"], 'no "shiny"'), (["--filters", "decontaminate"], "--against"),
        (["--option", "length.policy=short"], "not among those"), (["--filters", "length", "--option", "length.x=1"], "no option"),
        (["--option", "oops"], "FILTER.OPTION=VALUE"), (["--filters", ","], "names none"),
    ):  # fmt: skip
        assert main(["curate", str(folder), "--quiet", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert main(["curate", str(tmp_path / "nowhere")]) == 2
    assert "no traces store" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("body", "breach"),
    [
        ("", "judge"),
        ("def judge(traces): return ['' for _ in traces]", "STATELESS is missing"),
        ("STATELESS = True\ndef judge(traces): return [traces[0].id]", "raises IndexError"),
        ("STATELESS = True\ndef judge(traces): return ['']", "one reason"),
        ("STATELESS = True\ndef judge(traces): return [None for _ in traces]", "one reason"),
        (
            "STATELESS = True\ndef judge(traces):\n    for t in traces:\n        t.answer = ''\n        yield ''",
            "alters",
        ),
        (
            "STATELESS = False\ncalls = []\ndef judge(traces):\n    calls.append(1)\n    return ['x' * (len(calls) % 2) for _ in traces]",
            "differently",
        ),
        ("STATELESS = True\ndef judge(traces): return ['x' * (i % 2) for i, _ in enumerate(traces)]", "two parts"),
        (
            "STATELESS = True\ndef judge(traces): return ['x' if len(t.thinking) > 3 else '' for t in traces]",
            "raises TypeError",
        ),
    ],
)
def test_the_contract_catches(tmp_path: Path, body: str, breach: str) -> None:
    file = tmp_path / "mine.py"
    file.write_text(f'"""A filter."""\n{body}\n')
    failures = check("curate", file)
    assert any(breach in failure for failure in failures), failures
