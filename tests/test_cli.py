"""The face on the command line: verbs, examples, exit codes, one JSON document, and no torch for help."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest

import shoestring
from shoestring import cli
from shoestring.cli_options import short
from shoestring.core.config import Config
from shoestring.core.errors import UserError
from shoestring.core.run import Run

STAGES = ("tokenizer", "pretrain", "sft", "rl", "reject", "ask", "capture", "distill", "eval")
VERBS = (
    "run", *STAGES, "prune", "curate", "synthesize", "plan", "check", "chat", "serve", "keys", "report", "export",
    "provenance", "runs", "runs show", "runs diff", "list", "check-part",
)  # fmt: skip


@pytest.fixture
def call(capsys):
    def run(*words):
        code = cli.main(list(words))
        out = capsys.readouterr()
        return code, out.out, out.err

    return run


@pytest.fixture
def road(monkeypatch):
    """A road that trains nothing, with the functions the verbs call; what was asked of it is in `.asked`."""
    fake = ModuleType("shoestring.road")
    fake.asked = []
    fake.rows = [{"stage": "rl", "name": "grpo", "tokens": 12345, "seconds": 75.0, "usd": 0.00123}]

    def resolve_recipe(name, sets):
        if name != "quickstart":
            raise UserError(f'There is no recipe "{name}".')
        fake.asked.append(("resolve", name, sets))
        return SimpleNamespace(name=name)

    def stage_recipe(kind, sets, inputs):
        fake.asked.append(("stage", kind, sets, inputs))
        return SimpleNamespace(name=kind)

    def run_recipe(recipe, runs_dir, *, again, quiet, command):
        fake.command = command
        fake.asked.append(("run", recipe.name, str(runs_dir), again, quiet))
        return SimpleNamespace(
            rows=fake.rows, tables={}, report_path="runs/report.html", to_json=lambda: {"rows": fake.rows}
        )

    fake.command_line = lambda name, sets: f"shoestring run {name} with {sets}"
    fake.resolve_recipe, fake.stage_recipe, fake.run_recipe = resolve_recipe, stage_recipe, run_recipe
    fake.priced = {"about_tokens": 9, "about_flops": 8.0, "about_seconds": 7.0, "about_usd": 0.5}
    fake.planned = [{"stage": "rl", "headline": True, **fake.priced}]
    fake.plan_rows = lambda recipe, runs: fake.planned
    monkeypatch.setitem(sys.modules, "shoestring.road", fake)
    return fake


# ---- help -------------------------------------------------------------------------------------------------------


def test_help_reads_like_the_road(call):
    code, out, err = call("--help")
    assert code == 0
    assert err == ""
    places = [re.search(rf"^\W*{verb} ", out, re.MULTILINE).start() for verb in (*("run", *STAGES), "runs", "list")]
    assert places == sorted(places)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_two_examples(call, verb):
    code, out, _ = call(*verb.split(), "--help")
    assert code == 0
    examples = re.findall(rf"^ *(?:\$ )?shoestring {verb}(?= |$)", out, re.MULTILINE)
    assert len(examples) >= 2


def test_every_verb_is_in_this_list(call):
    shown = set(re.findall(r"^│ ([a-z][a-z-]*) ", call("--help")[1], re.MULTILINE))
    assert shown == {verb.partition(" ")[0] for verb in VERBS}


def test_no_words_show_the_help(call):
    code, out, err = call()
    assert (code, err) == (2, "")
    assert "shoestring [OPTIONS] COMMAND" in out


@pytest.mark.parametrize("code", ["import shoestring", "from shoestring.cli import main; main(['--help'])"])
def test_importing_and_help_load_no_torch(code):
    heavy = "print([m for m in ('torch', 'numpy', 'transformers', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", f"import sys; {code}; {heavy}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_promised_names_are_lazy_and_there():
    code = "import shoestring as ss; print(ss.load, ss.save, ss.Engine, ss.Sampling, ss.UserError)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        getattr(shoestring, "lod")  # noqa: B009


# ---- exit codes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["run", "quickstrat"], 'There is no recipe "quickstrat"'),
        (["run"], "Missing argument"),
        (["rum"], "Did you mean 'run'"),
        (["run", "quickstart", "--dryrun"], "No such option"),
        (["sft", "--from", "model"], "not of the form ROLE=RUN"),
        (["sft", "--from", "model=a", "--from", "model=b"], 'gives "model" twice'),
        (["list", "rewrads"], 'Did you mean "rewards"'),
        (["check-part", "absent.py", "--kind", "tasks"], "There is no file absent.py"),
        (["check-part", "absent.py"], "--kind"),
        (["runs", "show", "x"], 'There is no run "x"'),
        (["chat", "no/such/folder"], "no/such/folder"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_2(call, road, words, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(*words)
    assert code == 2
    assert out == ""
    assert sentence in err
    assert err.count("\n") == 1
    assert "Traceback" not in err


def test_a_recipes_own_tables_take_the_place_of_the_stages(call, road):
    row = {"label": "after RL", "pass@1": 0.795, "pass@1 stderr": 0.009, "mean_tokens": 30.0, "mean_tokens stderr": 0.4}
    ran = road.run_recipe(SimpleNamespace(name="quickstart"), "runs", again=False, quiet=True, command="")
    ran.tables = {"accuracy": [row]}
    road.run_recipe = lambda *_, **__: ran
    code, out, _ = call("run", "quickstart")
    assert code == 0
    assert "accuracy" in out and "79.5 ± 0.9 %" in out and "30.0 ± 0.4" in out and "grpo" not in out
    assert out.splitlines()[-1] == "report: runs/report.html"


def test_a_failed_stage_exits_1_and_says_where_it_is(call, road):
    def fail(*_, **__):
        error = ZeroDivisionError("oh")
        error.add_note("run directory: runs/rl-x")
        raise error

    road.run_recipe = fail
    code, out, err = call("run", "quickstart")
    assert (code, out) == (1, "")
    assert err.splitlines()[:2] == ["Failed: ZeroDivisionError: oh", "run directory: runs/rl-x"]
    assert "goes on" in err
    assert "Traceback" not in err


def test_a_fault_of_the_program_shows_its_traceback(call, road):
    road.plan_rows = lambda recipe, runs: 1 / 0
    code, _, err = call("run", "quickstart", "--dry-run")
    assert code == 1
    assert "ZeroDivisionError" in err
    assert "Traceback" in err


def test_interrupted_exits_1_and_says_how_to_go_on(call, road):
    def stop(*_, **__):
        raise KeyboardInterrupt

    road.run_recipe = stop
    code, _, err = call("run", "quickstart")
    assert code == 1
    assert err == "Interrupted. The same command goes on from a stage's last checkpoint.\n"


def test_the_program_itself_exits_with_these_codes():
    def code(*words):
        return subprocess.run([sys.executable, "-m", "shoestring.cli", *words], capture_output=True).returncode

    assert code("--version") == 0
    assert code("list", "rewrads") == 2


# ---- run and the stages -----------------------------------------------------------------------------------------


def test_run(call, road):
    code, out, _ = call("run", "quickstart", "--set", "a=1", "--set", "b=2", "--runs", "else", "--again", "-q")
    assert code == 0
    assert road.asked == [("resolve", "quickstart", ["a=1", "b=2"]), ("run", "quickstart", "else", True, True)]
    assert road.command == "shoestring run quickstart with ['a=1', 'b=2']"
    assert re.search(r"rl +grpo +12\.3k +1m 15s +\$0\.0012", out)
    assert out.endswith("report: runs/report.html\n")


def test_dry_run_runs_nothing(call, road):
    code, out, _ = call("run", "quickstart", "--dry-run", "--json")
    assert code == 0
    totals = {name: road.priced for name in ("headline", "everything")}
    assert json.loads(out) == {"schema": 1, "recipe": "quickstart", "plan": road.planned, "totals": totals}
    assert [asked[0] for asked in road.asked] == ["resolve"]


def test_json_is_one_document(call, road):
    _, out, _ = call("run", "quickstart", "--json")
    assert json.loads(out) == {"rows": road.rows}


@pytest.mark.parametrize("kind", STAGES)
def test_stage_verbs(call, road, kind):
    code, _, _ = call(kind, "--from", "model=runs/a", "--from", "traces=runs/b=c", "--set", "steps=3")
    assert code == 0
    assert road.asked == [
        ("stage", kind, ["steps=3"], {"model": "runs/a", "traces": "runs/b=c"}),
        ("run", kind, "runs", False, False),
    ]


# ---- runs -------------------------------------------------------------------------------------------------------


class Stage(Config):
    steps: int = 3
    options: dict[str, float] = {}


@pytest.fixture
def runs(tmp_path):
    """pretrain -> sft -> (rl, failed) and an evaluation beside it."""

    def make(stage, parents=(), config=None, fail=False, **kwargs):
        parents = {role: run.digest for role, run in parents}
        run = Run.open(tmp_path, stage=stage, recipe="r", config=config or Stage(), parents=parents, **kwargs)
        try:
            with run.attempt():
                run.metric(1, loss=1.0, tokens=1000, flops=1e6)
                if fail:
                    raise ZeroDivisionError
                cost = {"seconds": 60.0, "tokens": 1000, "flops": 1e6, "usd": 0.5}
                run.finish(outputs=[], headline_metric={"name": "loss", "value": 1.0, "stderr": 0.125}, cost=cost)
        except ZeroDivisionError:
            pass
        return run

    pretrain = make("pretrain")
    sft = make("sft", [("model", pretrain)])
    rl = make("rl", [("model", sft)], config=Stage(steps=4, options={"kl": 0.1}), fail=True)
    evaluation = make("eval", [("model", sft), ("base", pretrain)], headline=False)
    return SimpleNamespace(root=tmp_path, pretrain=pretrain, sft=sft, rl=rl, eval=evaluation)


def test_the_tree_and_two_totals(call, runs):
    code, out, _ = call("runs", "--runs", str(runs.root))
    assert code == 0
    lines = {
        name: line
        for line in out.splitlines()
        for name in ("pretrain-r", "sft-r", "rl-r", "eval-r")
        if name in line[:30]
    }
    indent = {name: len(line) - len(line.lstrip(" │├└─")) for name, line in lines.items()}
    assert indent["pretrain-r"] < indent["sft-r"] < indent["rl-r"] == indent["eval-r"]
    assert "finished  loss 1 ± 0.125  1m 00s  $0.5" in lines["sft-r"]
    assert "failed" in lines["rl-r"]
    assert "not in the headline" in lines["eval-r"]
    assert f"+ {runs.pretrain.name}" in lines["eval-r"]
    assert re.search(r"headline +2 ", out)
    assert re.search(r"everything ", out)


@pytest.mark.parametrize(
    ("value", "told"),
    [(999_960, "1M"), (999_400, "999k"), (999_960_000, "1G"), (999_960_000_000, "1.00e+12"), (9999, "9999")],
)
def test_no_number_is_a_thousand_of_a_unit(value, told):
    assert short(value) == told


@pytest.mark.parametrize("folder", ["a[b]c", "a[/b]c", "[red]"])
def test_a_folder_is_no_markup(call, tmp_path, folder):
    Run.open(tmp_path / folder, stage="pretrain", recipe="r", config=Stage())
    code, out, _ = call("runs", "--runs", str(tmp_path / folder))
    assert code == 0 and f"/{folder}\n" in out


def test_runs_as_json(call, runs):
    document = json.loads(call("runs", "--runs", str(runs.root), "--json")[1])
    assert [run["status"] for run in document["runs"]] == ["finished", "finished", "failed", "finished"]
    assert document["totals"]["headline"]["tokens"] == 2000
    assert document["totals"]["everything"]["tokens"] == 4000
    assert document["totals"]["everything"]["attempts"] == 4


def test_show_by_name_digest_or_path(call, runs):
    for name in (runs.rl.name, runs.rl.digest[:6], str(runs.rl.path)):
        document = json.loads(call("runs", "--runs", str(runs.root), "show", name, "--json")[1])
        assert document == runs.rl.manifest
    _, out, _ = call("runs", "show", "--runs", str(runs.root), "rl-r")
    assert re.search(r"error +ZeroDivisionError", out)
    assert re.search(r"cost\.usd|cost ", out)


def test_a_run_that_may_be_several_is_a_mistake(call, runs):
    Run.open(runs.root, stage="pretrain", recipe="s", config=Stage())
    code, _, err = call("runs", "--runs", str(runs.root), "show", "pretrain")
    assert code == 2
    assert "may be any of" in err


def test_diff(call, runs):
    document = json.loads(call("runs", "--runs", str(runs.root), "diff", runs.sft.name, runs.rl.name, "--json")[1])
    differ = document["differ"]
    assert differ["config.steps"] == [3, 4]
    assert differ["config.options.kl"] == [None, 0.1]
    assert differ["status"] == ["finished", "failed"]
    assert "versions.python" not in differ
    _, out, _ = call("runs", "--runs", str(runs.root), "diff", runs.sft.digest, runs.rl.digest)
    assert re.search(r"config\.steps +3 +4", out)
    assert call("runs", "--runs", str(runs.root), "diff", runs.sft.name, runs.sft.name)[1] == "They do not differ.\n"


def test_a_diff_pairs_files_by_name_and_tells_empty_from_nothing(call, tmp_path):
    def make(options, names):
        run = Run.open(tmp_path, stage="rl", recipe="r", config=Stage(options=options))
        for name in names:
            (run.path / name).write_text(f"{name} {options}")
        with run.attempt():
            run.finish(outputs=[run.path / name for name in names], headline_metric=None, cost={})
        return run

    first, second = make({}, ["b.txt"]), make({"kl": 0.1}, ["a.txt", "b.txt"])
    code, out, _ = call("runs", "--runs", str(tmp_path), "diff", first.name, second.name)
    assert code == 0
    assert re.search(r"config\.options +\(empty\) +-", out)
    assert re.search(r"outputs\.a\.txt\.path +- +a\.txt", out)
    assert "outputs.b.txt.path" not in out and "outputs.b.txt.sha256" in out


def test_an_empty_folder_of_runs(call, tmp_path):
    code, _, err = call("runs", "--runs", str(tmp_path))
    assert code == 2
    assert "There are no runs" in err


# ---- parts ------------------------------------------------------------------------------------------------------


def test_list(call):
    _, out, _ = call("list")
    assert re.search(r"^losses$", out, re.MULTILINE)
    assert re.search(r"^  next_token +Next-token", out, re.MULTILINE)
    document = json.loads(call("list", "losses", "--json")[1])
    assert list(document) == ["losses"]
    assert "next_token" in document["losses"]


def test_check_part(call, tmp_path, monkeypatch):
    path = tmp_path / "mine.py"
    path.write_text('"""Mine."""\n')
    monkeypatch.setattr(
        "shoestring.core.parts.check", lambda kind, file: [] if kind == "tasks" else ["RANGE is missing"]
    )
    assert call("check-part", str(path), "--kind", "tasks")[:2] == (0, f"{path} keeps the contract of tasks.\n")
    code, out, _ = call("check-part", str(path), "--kind", "rewards")
    assert code == 1
    assert out.splitlines()[0] == "- RANGE is missing"
    document = json.loads(call("check-part", str(path), "--kind", "rewards", "--json")[1])
    assert document == {"file": str(path), "kind": "rewards", "ok": False, "failures": ["RANGE is missing"]}


# ---- chat -------------------------------------------------------------------------------------------------------


def test_chat_remembers_and_begins_anew(call, monkeypatch):
    """Against doubles of the model and engine: what is rendered, and what is shown."""
    import shoestring.infer.engine
    import shoestring.models.checkpoint
    import shoestring.text.chat

    seen = []

    class Engine:
        def __init__(self, *_):
            self.pieces = []

        def add(self, prompt_ids, sampling):
            self.pieces = ["<think>", "hm", "</think>", "4", "2"]

        def step(self):
            return [SimpleNamespace(text=self.pieces.pop(0))]

        @property
        def has_work(self):
            return bool(self.pieces)

    def render(turns, tokenizer):
        seen.append([(turn["role"], turn["content"]) for turn in turns])
        return [1]

    tokenizer = SimpleNamespace(decode=lambda ids: "<|assistant|>")
    monkeypatch.setattr(shoestring.models.checkpoint, "load", lambda path: ("model", tokenizer))
    monkeypatch.setattr(shoestring.infer.engine, "Engine", Engine)
    monkeypatch.setattr(shoestring.text.chat, "render_turns", render)
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n\n/new\nthree\n"))
    code, out, _ = call("chat", "folder", "--system", "Be brief.")
    assert code == 0
    assert out.count("42") == 3
    system = ("system", "Be brief.")
    assert seen == [
        [system, ("user", "one")],
        [system, ("user", "one"), ("assistant", "42"), ("user", "two")],
        [system, ("user", "three")],
    ]


# ---- where it is used -------------------------------------------------------------------------------------------


def _examples():
    """Every line that some --help shows behind a dollar sign, as a shell would take it."""
    import typer

    def walk(command, path):
        for text in re.findall(r"\$ (shoestring (?:.*\\\n)*.*)", command.help or ""):
            yield path, text
        for name, inner in getattr(command, "commands", {}).items():
            yield from walk(inner, [*path, name])

    return list(walk(typer.main.get_command(cli.app), []))


@pytest.mark.parametrize(("path", "text"), _examples(), ids=lambda value: value if isinstance(value, str) else "")
def test_every_example_is_one_that_can_be_typed(path, text):
    """Its words are those of a verb and of options that exist; nothing a shell expands, no line too wide to copy."""
    import shlex

    import typer

    assert all(len(line) < 76 for line in text.splitlines())
    assert "$" not in re.sub(r"'[^']*'", "", text) and "…" not in text
    words = shlex.split(text.replace("\\\n", ""))[1:]
    command = typer.main.get_command(cli.app)
    while words and words[0] in getattr(command, "commands", {}):
        command = command.commands[words.pop(0)]
    command = getattr(command, "commands", {}).get("run", command)  # `plan MODEL` is `plan run MODEL`
    with command.make_context("shoestring", list(words)):
        pass


def test_a_place_that_cannot_be_had_is_a_sentence(call, road, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    for words in (["plan", "validate", "--out", "file/page.md"], ["keys", "create", "ann", "--store", "file/keys.db"],
                  ["check", "--news", "--out", "."], ["plan", "calibrate", "--out", "file/here.json"]):  # fmt: skip
        code, _, err = call(*words)
        assert code == 2 and err.count("\n") == 1 and "Traceback" not in err, words

    def run_recipe(*_, **__):
        raise OSError(30, "Read-only file system", "runs/x")

    road.run_recipe = run_recipe
    code, _, err = call("run", "quickstart")
    assert (code, err) == (2, "runs/x: Read-only file system; give another place, or mend this one.\n")


SELF = [sys.executable, "-m", "shoestring"]


def test_output_that_cannot_be_kept_is_no_success():
    with open("/dev/full", "w") as full:
        done = subprocess.run([*SELF, "list"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and done.stderr.startswith("No space left on device") and done.stderr.count("\n") == 1


def test_a_reader_that_leaves_is_no_traceback():
    command = f"'{sys.executable}' -m shoestring check --news | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.stdout == "# The claims of the news, checked\n" and not done.stderr


def test_letters_that_the_output_lacks_are_written_otherwise():
    done = subprocess.run([sys.executable, "-m", "shoestring", "check", "--news"], capture_output=True,
                          env={"PYTHONIOENCODING": "ascii"})  # fmt: skip
    assert done.returncode == 0 and not done.stderr and done.stdout.isascii()


def test_a_terminal_too_narrow_for_a_table_gets_its_rows(capsys, monkeypatch):
    from rich.console import Console

    from shoestring import cli_options

    name = "teacher-pretrain-of-a-long-name"
    rows = [{"stage": name, "tokens": 1234567, "seconds": 75.0, "usd": -12.5, "note": "[x]"}]
    cli_options.print_table(rows)
    wide = capsys.readouterr().out
    assert name in wide and "-$12.50" in wide and "[x]" in wide
    monkeypatch.setattr(cli_options, "console", lambda: Console(width=40))
    cli_options.print_table(rows)
    narrow = capsys.readouterr().out
    assert name in narrow and "tokens 1.23M" in narrow and "note [x]" in narrow
    assert max(map(len, narrow.splitlines())) <= 40
