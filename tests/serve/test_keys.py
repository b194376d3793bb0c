"""The store of keys, and `shoestring keys`."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest

from shoestring.cli import main
from shoestring.core.errors import UserError
from shoestring.serve.keys import KeyStore, hashed


@pytest.fixture
def store(tmp_path: Path) -> KeyStore:
    return KeyStore(tmp_path / "keys.db")


def usage(key_id: str, usd: float = 0.5, **more):
    row = {
        "key_id": key_id, "request_id": "r", "time": 100.0, "model": "m", "endpoint": "/v1/chat/completions",
        "prompt": 10, "cached": 2, "completion": 5, "reasoning": 1, "usd": usd, "status": 200, "seconds": 0.1,
    }  # fmt: skip
    return row | more


def test_the_secret_is_nowhere_in_the_file(store: KeyStore, tmp_path: Path):
    secret, key = store.create("ann", rpm=5, models=["m"])
    store.close()
    data = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert secret.encode() not in data and hashed(secret).encode() in data
    assert key.hash == hashed(secret) and "hash" not in key.public() and key.models == ("m",)


def test_usage_and_what_was_spent_are_one_transaction(store: KeyStore):
    _, key = store.create("ann")
    store.record([usage(key.id), usage(key.id, 0.25), usage("")])
    assert store.find("ann").spent_usd == 0.75
    row = next(row for row in store.totals() if row["key"] == "ann")
    assert (row["requests"], row["prompt"], row["usd"]) == (2, 20, 0.75)
    with pytest.raises(Exception, match="NOT NULL"):
        store.record([usage(key.id), usage(key.id, model=None)])
    assert store.find("ann").spent_usd == 0.75


def test_changes_raise_the_version(store: KeyStore):
    versions = [store.version()]
    store.create("ann")
    for change in (lambda: store.change("ann", rpm=3), lambda: store.add_credit("ann", 5), lambda: store.revoke("ann")):
        versions.append(store.version())
        change()
    versions.append(store.version())
    assert versions == sorted(set(versions))
    assert store.find("ann").credit_usd == 5 and store.find("ann").revoked


def test_mistakes(store: KeyStore, tmp_path: Path):
    store.create("ann")
    for call, words in (
        (lambda: store.create("ann"), "already"),
        (lambda: store.find("anm"), 'Did you mean "ann"'),
        (lambda: store.change("ann", rpm=-1), "must not be negative"),
        (lambda: KeyStore(tmp_path), "cannot be opened"),
    ):
        with pytest.raises(UserError, match=words):
            call()


def test_wal(store: KeyStore, tmp_path: Path):
    assert sqlite3.connect(tmp_path / "keys.db").execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    where = ["--store", str(tmp_path / "keys.db")]

    def keys(*arguments: str):
        assert main(["keys", *arguments, *where, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    made = keys("create", "ann", "--credit", "5", "--rpm", "60", "--no-logprobs")
    assert made["key"].startswith("sk-") and made["flags"] == {"logprobs": False}
    assert keys("set", "ann", "--max-n", "2", "--block", "unpaid")["flags"] == {"logprobs": False, "max_n": 2}
    assert keys("set", "ann", "--unblock")["blocked"] is None
    assert keys("credit", "ann", "2.5")["credit_usd"] == 7.5
    assert keys("revoke", "ann")["revoked"]
    assert [key["name"] for key in keys("list")] == ["ann"] and "key" not in keys("list")[0]
    assert keys("usage") == []
    assert main(["keys", "revoke", "bob", *where]) == 2 and "no key called" in capsys.readouterr().err
    assert main(["keys", "list", *where]) == 0 and "revoked" in capsys.readouterr().out


def test_only_create_makes_a_store_and_none_in_a_foreign_database(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert main(["keys", "list"]) == 2 and "There is no store of keys" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    sqlite3.connect("other.db").execute("CREATE TABLE answers(x)")
    assert main(["keys", "create", "ann", "--store", "other.db"]) == 2
    assert "something else" in capsys.readouterr().err
    assert sqlite3.connect("other.db").execute("SELECT count(*) FROM sqlite_master").fetchone() == (1,)
    assert main(["keys", "create", "ann"]) == 0
    assert (tmp_path / "shoestring-keys.db").stat().st_mode & 0o077 == 0  # remembered answers lie in it
    capsys.readouterr()
    assert main(["keys", "usage", "--days", "2"]) == 0 and "Nothing was asked" in capsys.readouterr().out


@pytest.mark.parametrize("amount", ["nan", "inf", "-inf"])
def test_no_credit_without_an_amount(tmp_path: Path, capsys: pytest.CaptureFixture[str], amount: str):
    """NaN is neither more nor less than anything: it would be credit without end."""
    where = ["--store", str(tmp_path / "keys.db")]
    assert main(["keys", "create", "ann", f"--credit={amount}", *where]) == 2
    assert main(["keys", "create", "ann", *where]) == 0
    assert main(["keys", "credit", *where, "--", "ann", amount]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_password_in_the_address_is_not_shown():
    with pytest.raises(UserError) as error:
        KeyStore("postgresql+nodriver://ann:s3cret@127.0.0.1:9/keys")
    assert "s3cret" not in str(error.value) and "ann" in str(error.value)
