"""The environment becomes one frozen value, or one error that tells all that is wrong with it."""
import logging
import sys
from pathlib import Path
from typing import Any, Dict, List, Tuple
from urllib.parse import urlsplit

import pytest

from ais_runtime_min import VARIABLES, ConfigError, Exit, RedactingFormatter, Settings, configure_logging, parse_bool

TARGET = "http://10.0.0.5:51081/v1/etl/_object/my-etl/s3cr3t-Xy9"
TOKEN = "eyJhbGciOi.t0ken"
TRUE_WORDS = ("true", "True", "TRUE", "1", "yes", "YES", "y", "Y", "on", "t", "T", " true ")
FALSE_WORDS = ("false", "False", "0", "no", "off", "f", "n", "2", "maybe", "truee", " ")

DEFAULTS: Dict[str, Any] = {
    "payload": "", "payload_file": "", "packages": "", "os_packages": "", "workers": 4, "threads": None, "target": "",
    "direct_put": False, "direct_fqn": False, "direct_put_retries": 3, "skip_verify": False, "client_ca": "",
    "client_cert": "", "client_key": "", "token": "", "port": 8000, "log_level": "INFO", "fqn_roots": None,
    "server": "", "ws_failure": "break", "host": "",
}

GOOD: List[Tuple[str, str, str, Any]] = [
    ("ETL_CLASS_PAYLOAD", "gAWV", "payload", "gAWV"),
    ("PACKAGES", "numpy==1.26,pillow", "packages", "numpy==1.26,pillow"),
    ("OS_PACKAGES", "ffmpeg,file", "os_packages", "ffmpeg,file"),
    ("NUM_WORKERS", "1", "workers", 1),
    ("NUM_WORKERS", "256", "workers", 256),
    ("NUM_WORKERS", " 7 ", "workers", 7),
    ("NUM_WORKERS", "08", "workers", 8),
    ("NUM_THREADS", "1", "threads", 1),
    ("NUM_THREADS", "1024", "threads", 1024),
    ("AIS_TARGET_URL", TARGET, "target", TARGET),
    ("AIS_TARGET_URL", TARGET + "/", "target", TARGET),
    ("AIS_TARGET_URL", "https://node-1.example/v1/etl", "target", "https://node-1.example/v1/etl"),
    ("AIS_TARGET_URL", "http://[fd00::5]:51081/v1", "target", "http://[fd00::5]:51081/v1"),
    ("AIS_DIRECT_PUT_RETRIES", "0", "direct_put_retries", 0),
    ("AIS_DIRECT_PUT_RETRIES", "100", "direct_put_retries", 100),
    ("AIS_AUTHN_TOKEN", TOKEN, "token", TOKEN),
    ("PORT", "0", "port", 0),
    ("PORT", "65535", "port", 65535),
    ("LOG_LEVEL", "debug", "log_level", "DEBUG"),
    ("LOG_LEVEL", "Warning", "log_level", "WARNING"),
    ("ETL_FQN_ROOTS", "/usr", "fqn_roots", ("/usr",)),
    ("ETL_FQN_ROOTS", "/usr:/etc/", "fqn_roots", ("/usr", "/etc")),
    ("ETL_SERVER", "fastapi", "server", "fastapi"),
    ("ETL_SERVER", "Native", "server", "native"),
    ("ETL_WS_FAILURE", "empty", "ws_failure", "empty"),
    ("ETL_WS_FAILURE", "BREAK", "ws_failure", "break"),
]

BAD_URLS = ("10.0.0.5:51081", "ftp://host/x", "http://:80", "http:///path", "http://host:port/x", "http://host:99999/x",
            "http://host:0/x", "http://host/x?y=1", "http://host/x#y", "http://ho st/x", "http://host/\tx", "not a URL",
            "file:///no/such/folder", "file://host/tmp", "http://[::1/x")
BAD: List[Tuple[str, str, str]] = [  # the variable, its value, what the complaint says is allowed
    *[("NUM_WORKERS", text, "a whole number from 1 to 256") for text in ("0", "-1", "257", "four", "1.5", "1e2", "٣", "9" * 40)],
    *[("NUM_THREADS", text, "a whole number from 1 to 1024") for text in ("0", "1025", "many")],
    *[("AIS_DIRECT_PUT_RETRIES", text, "a whole number from 0 to 100") for text in ("-1", "101", "x")],
    *[("PORT", text, "a whole number from 0 to 65535") for text in ("-1", "65536", "http", "80,81")],
    ("LOG_LEVEL", "LOUD", "one of DEBUG, INFO, WARNING, ERROR, CRITICAL"),
    ("ETL_SERVER", "uvicorn", "one of native, fastapi, flask"),
    ("ETL_WS_FAILURE", "text", "one of break, empty"),
    ("ETL_FQN_ROOTS", "relative/folder", "absolute folders, separated by colons"),
    ("ETL_FQN_ROOTS", "/usr:relative", "absolute folders, separated by colons"),
    ("ETL_FQN_ROOTS", ":", "absolute folders, separated by colons"),
    *[(name, "/no/such/file", "a file that can be read")
      for name in ("ETL_CLASS_PAYLOAD_FILE", "AIS_CLIENT_CA", "AIS_CRT")],
]


def complaint(environ: Dict[str, str], *required: str) -> str:
    """Return what is said of an environment that cannot be used."""
    with pytest.raises(ConfigError) as caught:
        Settings.from_env(environ, required)
    assert caught.value.exit is Exit.CONFIG
    text = str(caught.value)
    assert "\n" not in text
    return text


# == One variable ==


def test_an_empty_environment_gives_the_defaults() -> None:
    assert Settings.from_env({})._asdict() == DEFAULTS
    assert Settings()._asdict() == DEFAULTS


def test_an_empty_variable_counts_as_unset() -> None:
    for variable in VARIABLES:
        assert Settings.from_env({variable.name: ""}) == Settings(), variable.name


@pytest.mark.parametrize("name, text, field, value", GOOD, ids=["%s=%s" % row[:2] for row in GOOD])
def test_a_good_value_fills_its_field_and_no_other(name: str, text: str, field: str, value: Any) -> None:
    assert Settings.from_env({name: text})._asdict() == {**DEFAULTS, field: value}


def test_a_variable_may_name_a_file_that_is_there_and_no_folder(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("content")
    for name, field in [
        ("ETL_CLASS_PAYLOAD_FILE", "payload_file"), ("AIS_CLIENT_CA", "client_ca"),
        ("AIS_CRT", "client_cert"),
    ]:
        assert Settings.from_env({name: str(file)})._asdict() == {**DEFAULTS, field: str(file)}
        told = complaint({name: str(tmp_path)})
        assert told == "%s=%r must be a file that can be read" % (name, str(tmp_path))


def test_a_folder_may_stand_in_for_the_target(tmp_path: Path) -> None:
    (tmp_path / "a folder").mkdir()
    url = "file://" + str(tmp_path / "a folder").replace(" ", "%20")
    assert Settings.from_env({"AIS_TARGET_URL": url}).target == url
    assert urlsplit(Settings.from_env({"AIS_TARGET_URL": "file:///"}).target).path == "/"


def test_the_roots_of_readable_files_are_resolved(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert Settings.from_env({"ETL_FQN_ROOTS": str(tmp_path / "link")}).fqn_roots == (str((tmp_path / "real").resolve()),)


@pytest.mark.parametrize("name, text, allowed", BAD, ids=["%s=%.20s" % row[:2] for row in BAD])
def test_a_bad_value_is_told_with_its_variable_and_what_is_allowed(name: str, text: str, allowed: str) -> None:
    assert complaint({name: text}) == "%s=%r must be %s" % (name, text, allowed)


def test_a_bad_target_url_is_told_without_its_value_which_may_be_secret() -> None:
    for url in BAD_URLS:
        told = complaint({"AIS_TARGET_URL": url})
        assert told.startswith("AIS_TARGET_URL must be http://host[:port]/path"), url
        assert url not in told
    for url in ("http://host:51081/%s x", "10.0.0.5/%s", "http:///%s", "http://h/a?%s"):
        assert "s3cr3t-Xy9" not in complaint({"AIS_TARGET_URL": url % "s3cr3t-Xy9"})


# == Booleans ==

BOOLEANS = [("direct_put", "direct_put"), ("DIRECT_PUT", "direct_put"), ("ETL_DIRECT_FQN", "direct_fqn"),
            ("AIS_SKIP_VERIFY_CRT", "skip_verify"), ("AIS_SKIP_VERIFY", "skip_verify")]


@pytest.mark.parametrize("name, field", BOOLEANS)
def test_words_for_true_are_true_and_any_other_is_false(name: str, field: str) -> None:
    values = {word: Settings.from_env({name: word})._asdict() for word in TRUE_WORDS + FALSE_WORDS}
    assert values == {word: {**DEFAULTS, field: word in TRUE_WORDS} for word in values}


def test_parse_bool_takes_none_for_false() -> None:
    assert parse_bool(None) is False
    assert parse_bool("") is False


@pytest.mark.parametrize("new, old, field", [
    ("DIRECT_PUT", "direct_put", "direct_put"), ("AIS_SKIP_VERIFY_CRT", "AIS_SKIP_VERIFY", "skip_verify"),
])
def test_of_two_names_the_new_one_wins_unless_it_is_empty(new: str, old: str, field: str) -> None:
    for new_word, old_word, value in [
        ("true", "false", True), ("false", "true", False), ("", "true", True), ("true", "", True),
        ("", "false", False),
    ]:
        for environ in ({new: new_word, old: old_word}, {old: old_word, new: new_word}):
            assert Settings.from_env(environ)._asdict()[field] is value, environ


# == The payload ==


def test_pieces_of_the_payload_are_joined_by_number_and_not_by_name() -> None:
    environ = {"ETL_CLASS_PAYLOAD_%d" % number: "<%d>" % number for number in (11, 3, 2, 10, 9, 8, 7, 6, 5, 4)}
    joined = Settings.from_env({**environ, "ETL_CLASS_PAYLOAD": "<1>"}).payload
    assert joined == "".join("<%d>" % number for number in range(1, 12))


@pytest.mark.parametrize("present, missing", [((1, 3), [2]), ((1, 2, 5), [3, 4]), ((1, 4), [2, 3])])
def test_a_gap_between_pieces_is_refused(present: Tuple[int, ...], missing: List[int]) -> None:
    environ = {"ETL_CLASS_PAYLOAD" + ("_%d" % number if number > 1 else ""): "text" for number in present}
    told = complaint(environ)
    assert all("ETL_CLASS_PAYLOAD_%d is not set" % number in told for number in missing)


def test_pieces_without_the_first_one_are_refused() -> None:
    assert "ETL_CLASS_PAYLOAD is not set" in complaint({"ETL_CLASS_PAYLOAD_2": "text"})


@pytest.mark.parametrize("name", ["ETL_CLASS_PAYLOAD_0", "ETL_CLASS_PAYLOAD_1", "ETL_CLASS_PAYLOAD_02"])
def test_a_piece_whose_number_is_none_of_a_further_piece_is_refused(name: str) -> None:
    assert name in complaint({"ETL_CLASS_PAYLOAD": "text", name: "more"})


def test_a_variable_that_only_looks_like_a_piece_is_left_to_the_users_class() -> None:
    names = ("ETL_CLASS_PAYLOAD_X", "ETL_CLASS_PAYLOADS", "ETL_CLASS_PAYLOAD_2_OLD")
    environ = {"ETL_CLASS_PAYLOAD": "a", "ETL_CLASS_PAYLOAD_2": "", **dict.fromkeys(names, "b")}
    assert Settings.from_env(environ).payload == "a"


def test_a_payload_told_twice_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "payload"
    file.write_text("gAWV")
    told = complaint({"ETL_CLASS_PAYLOAD": "gAWV", "ETL_CLASS_PAYLOAD_FILE": str(file)})
    assert told == "ETL_CLASS_PAYLOAD and ETL_CLASS_PAYLOAD_FILE are both set"
    assert "ETL_CLASS_PAYLOAD" in complaint({"ETL_CLASS_PAYLOAD_2": "gAWV", "ETL_CLASS_PAYLOAD_FILE": str(file)})


# == All together ==


def test_all_complaints_are_told_at_once() -> None:
    told = complaint({"NUM_WORKERS": "x", "PORT": "y", "AIS_TARGET_URL": "z", "AIS_CRT": "/no/cert"}, "ETL_CLASS_PAYLOAD")
    for name in ("NUM_WORKERS='x'", "PORT='y'", "AIS_TARGET_URL must be", "AIS_CRT='/no/cert'", "ETL_CLASS_PAYLOAD is not set"):
        assert told.count(name) == 1
    assert told.count("; ") == 4


def test_what_is_required_and_not_set_is_told() -> None:
    for environ in ({}, {"AIS_TARGET_URL": ""}):
        told = complaint(environ, "ETL_CLASS_PAYLOAD", "AIS_TARGET_URL")
        assert told == "ETL_CLASS_PAYLOAD is not set; AIS_TARGET_URL is not set"


def test_a_key_without_its_certificate_is_refused(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("key")
    told = complaint({"AIS_CRT_KEY": str(key)})
    assert "AIS_CRT_KEY" in told and "AIS_CRT " in told + " "


def test_variables_of_others_are_let_be() -> None:
    assert Settings.from_env({"HOST": "::", "NUM_WORKERS_X": "x", "MODEL": "y", "port": "z"}) == Settings()


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        Settings().port = 1  # type: ignore[misc]


# == Secrets ==


def test_redacting_hides_the_target_path_and_the_token_and_keeps_the_rest() -> None:
    settings = Settings(target=TARGET, token=TOKEN)
    for text, redacted in [
        ("GET %s/ais%%2Fobj failed" % TARGET, "GET http://10.0.0.5:51081***/ais%2Fobj failed"),
        ("no such path: /v1/etl/_object/my-etl/s3cr3t-Xy9/obj", "no such path: ***/obj"),
        ("secret s3cr3t-Xy9 was refused", "secret *** was refused"),
        ("Authorization: Bearer %s" % TOKEN, "Authorization: Bearer ***"),
        ("%s of 10.0.0.5:51081, bucket/object" % TOKEN, "*** of 10.0.0.5:51081, bucket/object"),
        ("GET /health", "GET /health"),
    ]:
        assert settings.redact(text) == redacted


def test_without_secrets_nothing_is_hidden() -> None:
    text = "/a/b/c of http://10.0.0.5/a and /srv/objects/a"
    for target in ("", "http://10.0.0.5:51081", "http://10.0.0.5/", "file:///srv/objects"):
        assert Settings(target=target).redact(text) == text


def test_redacting_hides_an_escaped_secret_both_ways() -> None:
    settings = Settings(target="http://10.0.0.5/v1/etl/_object/my-etl/s%2Bcr3t")
    redacted = settings.redact("s%2Bcr3t, s+cr3t and /v1/etl/_object/my-etl/s+cr3t")
    assert "cr3t" not in redacted


def test_log_records_and_their_tracebacks_are_redacted() -> None:
    try:
        raise ValueError("cannot read %s/obj with %s" % (TARGET, TOKEN))
    except ValueError as error:
        raised = error
    record = logging.LogRecord("x", logging.ERROR, __file__, 1, "token %s", (TOKEN,), (ValueError, raised, raised.__traceback__))
    text = RedactingFormatter(Settings(target=TARGET, token=TOKEN)).format(record)
    assert "ValueError: cannot read" in text
    assert TOKEN not in text and "s3cr3t-Xy9" not in text


def test_the_log_of_the_users_own_modules_is_redacted_too(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    try:
        configure_logging(Settings(target=TARGET, token=TOKEN))
        logging.getLogger("of.a.user").info("token %s", TOKEN)
    finally:
        root.handlers[:] = before[0]
        root.setLevel(before[1])
    printed = capsys.readouterr().out
    assert "of.a.user - INFO - token ***" in printed


def test_a_log_line_tells_what_was_raised_where_its_traceback_cannot_be_formatted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging, "traceback", None)  # as where no file can be opened to load what it needs
    try:
        raise ValueError("out of files with s3cr3t")
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, "", 0, "object %s", ("o",), sys.exc_info())
    line = RedactingFormatter(Settings(token="s3cr3t")).format(record)
    assert "object o\nValueError: out of files with" in line and "s3cr3t" not in line
