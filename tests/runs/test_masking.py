"""No credential leaves the process in a text, and no text does anything to a terminal."""

import io
import json
import logging
import random
import re
from pathlib import Path

import pytest

from selfray.cluster.shipping import Shipper, Tracked
from selfray.console import Console, LogFormatter, printable
from selfray.masking import masked
from selfray.runs.spool import SpoolWriter
from selfray.storage import Location

SECRET = "Hunter2x"  # what no text may hold
SCHEMES = (
    "s3",
    "gs",
    "http",
    "https",
    "postgresql",
    "postgresql+psycopg2",
    "mysql",
    "mssql+pyodbc",
)
LETTERS = "abXY019-._~!$&*+,=;%/@:"


def passwords(count: int) -> list[str]:
    """Passwords with the secret somewhere in them, also with / and @, which should be encoded."""
    rng = random.Random(0)
    found = []
    for _ in range(count):
        before, after = ("".join(rng.choices(LETTERS, k=rng.randint(0, 12))) for _ in range(2))
        found.append(f"{before}{SECRET}{after}")
    return found


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_password_in_a_uri_is_hidden_whatever_letters_it_has(scheme: str) -> None:
    for password in passwords(300):
        uri = f"{scheme}://user:{password}@host.example/folder/x"
        for text in (uri, f"cannot open {uri}: no answer", json.dumps({"path": uri}), f"({uri})"):
            shown = masked(text)
            assert SECRET not in shown, text
            assert "host.example/folder/x" in shown, text


@pytest.mark.parametrize(
    "key",
    ["password", "sslpassword", "passwd", "pwd", "token", "access_token", "api_key", "secret",
     "X-Amz-Signature", "X-Amz-Credential", "X-Amz-Security-Token", "pass%77ord", "odbc_connect"],
)  # fmt: skip
def test_secret_keys_behind_a_question_mark_are_hidden_and_others_are_not(key: str) -> None:
    for password in passwords(50):
        value = re.sub("[&;]", "", password)
        shown = masked(f"see postgresql://h/db?driver=x&{key}={value}&sslmode=require now")
        assert SECRET not in shown
        assert "driver=x" in shown
        assert "sslmode=require" in shown


def test_what_is_a_credential_of_its_own_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    assert masked(f"http://{SECRET}@host:5000/x") == "http://***@host:5000/x"
    assert masked(f"s3:/AKIA:{SECRET}@bucket/x") == "s3:/***@bucket/x"  # as a path is normalised
    assert masked(f"host=h password={SECRET} dbname=d") == "host=h password=*** dbname=d"
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", SECRET)
    assert masked(f"Authorization: Bearer {SECRET}") == "Authorization: Bearer ***"


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/photos@2x/a.png",
        "http://host:5000/#/experiments/1/runs/0123",
        "sqlite:////home/a@b/mlflow.db",
        "file:///home/a@b",
        "https://host/x?author=me&page=2",
        "mail me@example.org about it: 3:4@5",
        "--method.mask-ratio 0.6, epoch 3/4 at 12:30",
        "C:/Users/me@work/x",
    ],
)
def test_what_holds_no_credential_stays_as_it_is(text: str) -> None:
    assert masked(text) == text


@pytest.mark.parametrize("key", ["AKIA:Hunter2x", "AKIA:Hun/ter2x", "Hunter2x"])
def test_a_path_with_credentials_is_refused_without_telling_them(key: str) -> None:
    with pytest.raises(ValueError, match="AWS_ACCESS_KEY_ID") as raised:
        Location.of(f"s3://{key}@bucket/x")
    assert "unter2x" not in str(raised.value)
    assert "ter2x" not in str(raised.value)


def test_parameters_tags_and_the_spool_hold_no_credentials(tmp_path: Path) -> None:
    uri = f"s3://AKIA:{SECRET}@bucket/x"
    folder = Location.of(tmp_path)
    tracked = Tracked("sqlite:///x.db", "e", "r", folder, {"data.path": uri}, {"run.folder": uri})
    shipper = Shipper(tracked)
    assert {**shipper._params, **shipper._tags} == dict.fromkeys(
        ("data.path", "run.folder"), "s3://***@bucket/x"
    )
    writer = SpoolWriter(folder / "spool", "w")
    writer.tags({"failure": f"cannot open {uri}"})
    writer.event("warning", text=uri)
    writer.close()
    assert SECRET not in (tmp_path / "spool/w.jsonl").read_text()


def test_a_log_holds_no_credentials_in_its_tracebacks() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(LogFormatter())
    log = logging.Logger("of a test")
    log.addHandler(handler)
    try:
        raise ValueError(f"s3://AKIA:{SECRET}@bucket/x \x1b[2J")
    except ValueError:
        log.exception("opening %s failed", f"http://{SECRET}@host")
    assert SECRET not in stream.getvalue()
    assert "\x1b" not in stream.getvalue()
    assert "\n  File" in stream.getvalue()


# Terminals

ATTACKS = {
    "colour": "\x1b[31mRED", "title": "\x1b]0;pwned\x07", "clear": "\x1b[2J", "bell": "\x07",
    "C1": "\x9b2J\x9d0;x\x9c", "back": "a\b\b\rb", "bidi": "\u202egnp.exe", "isolate": "\u2066x",
    "delete": "\x7f", "line": "a\u2028b\u0085c", "hidden": "a\u200bb\ufeff", "half": "caf\udce9",
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_control_characters_are_shown_and_do_nothing(name: str) -> None:
    shown = printable(f"run {ATTACKS[name]} failed")
    assert shown.isprintable(), ascii(shown)
    assert "\\" in shown
    assert printable(shown) == shown


def test_texts_of_any_language_stay_as_they_are() -> None:
    text = "épée 漢字 עברית عربى 🙂 µ ± a\nb"
    assert printable(text) == text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_console_escapes_what_it_is_told() -> None:
    terminal = Terminal()
    console = Console(terminal, None)
    for attack in ATTACKS.values():
        console.say(f"{attack}: failed")
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", terminal.getvalue())
    console.say(f"s3://AKIA:{SECRET}@bucket/x")
    assert SECRET not in terminal.getvalue()
