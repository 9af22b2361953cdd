"""The environment becomes one frozen value, or one error that tells all that is wrong with it."""
import logging
import sys
from pathlib import Path
from typing import Any, Dict, List, Tuple
from urllib.parse import urlsplit

import pytest

from ais_runtime_min import VARIABLES, ConfigError, Exit, RedactingFormatter, Settings, parse_bool

TARGET = "http://10.0.0.5:51081/v1/etl/_object/my-etl/s3cr3t-Xy9"
TOKEN = "eyJhbGciOi.t0ken"
DEFAULTS: Dict[str, Any] = {
    "payload": "", "payload_file": "", "packages": "", "os_packages": "", "workers": 4, "threads": None, "target": "",
    "direct_put": False, "direct_fqn": False, "direct_put_retries": 3, "skip_verify": False, "client_ca": "",
    "client_cert": "", "client_key": "", "token": "", "port": 8000, "log_level": "INFO", "fqn_roots": None,
    "server": "", "ws_failure": "break", "host": "",
}
GOOD: List[Tuple[str, str, str, Any]] = [
    ("ETL_CLASS_PAYLOAD", "gAWV", "payload", "gAWV"), ("AIS_AUTHN_TOKEN", TOKEN, "token", TOKEN),
    ("PACKAGES", "numpy==1.26,pillow", "packages", "numpy==1.26,pillow"),
    ("OS_PACKAGES", "ffmpeg,file", "os_packages", "ffmpeg,file"),
    ("NUM_WORKERS", "256", "workers", 256), ("NUM_WORKERS", " 07 ", "workers", 7),
    ("NUM_THREADS", "1", "threads", 1), ("NUM_THREADS", "1024", "threads", 1024),
    ("AIS_TARGET_URL", TARGET + "/", "target", TARGET),
    ("AIS_TARGET_URL", "http://10.0.0.5/", "target", "http://10.0.0.5"),
    ("AIS_TARGET_URL", "https://[fd00::5]:51081/v1", "target", "https://[fd00::5]:51081/v1"),
    ("AIS_DIRECT_PUT_RETRIES", "0", "direct_put_retries", 0),
    ("AIS_DIRECT_PUT_RETRIES", "100", "direct_put_retries", 100),
    ("PORT", "0", "port", 0), ("PORT", "65535", "port", 65535),
    ("LOG_LEVEL", "Warning", "log_level", "WARNING"),
    ("ETL_FQN_ROOTS", "/usr:/etc/", "fqn_roots", ("/usr", "/etc")),
    ("ETL_WS_FAILURE", "empty", "ws_failure", "empty"),
]
BAD_URLS = ("10.0.0.5:51081", "ftp://host/x", "http://:80", "http:///path", "http://host:port/x", "http://host:99999/x",
            "http://host:0/x", "http://host/x?y=1", "http://host/x#y", "http://ho st/x", "http://host/\tx", "not a URL",
            "file:///no/such/folder", "file://host/tmp", "http://[::1/x")
WORKERS, FOLDERS = "a whole number from 1 to 256", "absolute folders, separated by colons"
BAD: List[Tuple[str, str, str]] = [  # the variable, its value, what the complaint says is allowed
    *[("NUM_WORKERS", text, WORKERS)
      for text in ("0", "-1", "257", "four", "1.5", "1e2", "\u0663", "9" * 40)],
    ("NUM_THREADS", "1025", "a whole number from 1 to 1024"),
    ("AIS_DIRECT_PUT_RETRIES", "101", "a whole number from 0 to 100"),
    ("PORT", "65536", "a whole number from 0 to 65535"),
    ("LOG_LEVEL", "LOUD", "one of DEBUG, INFO, WARNING, ERROR, CRITICAL"),
    ("ETL_WS_FAILURE", "text", "one of break, empty"),
    ("ETL_FQN_ROOTS", "/usr:relative", FOLDERS), ("ETL_FQN_ROOTS", ":", FOLDERS),
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


def test_an_empty_environment_gives_the_defaults_and_an_empty_variable_counts_as_unset() -> None:
    assert Settings.from_env({})._asdict() == Settings()._asdict() == DEFAULTS
    for variable in VARIABLES:
        assert Settings.from_env({variable.name: ""}) == Settings(), variable.name


def test_a_good_value_fills_its_field_and_no_other() -> None:
    for name, text, field, value in GOOD:
        assert Settings.from_env({name: text})._asdict() == {**DEFAULTS, field: value}, (name, text)


def test_a_variable_may_name_a_file_that_can_be_read(tmp_path: Path) -> None:
    names = {"ETL_CLASS_PAYLOAD_FILE": "payload_file", "AIS_CLIENT_CA": "client_ca",
             "AIS_CRT": "client_cert"}
    for name, field in names.items():
        assert Settings.from_env({name: __file__})._asdict() == {**DEFAULTS, field: __file__}
        for path in (str(tmp_path), "/no/such/file"):
            assert complaint({name: path}) == "%s=%r must be a file that can be read" % (name, path)


def test_a_folder_may_stand_in_for_the_target(tmp_path: Path) -> None:
    (tmp_path / "a folder").mkdir()
    url = "file://" + str(tmp_path / "a folder").replace(" ", "%20")
    assert Settings.from_env({"AIS_TARGET_URL": url}).target == url
    assert urlsplit(Settings.from_env({"AIS_TARGET_URL": "file:///"}).target).path == "/"


def test_the_roots_of_readable_files_are_resolved(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert Settings.from_env({"ETL_FQN_ROOTS": str(tmp_path / "link")}).fqn_roots == (str((tmp_path / "real").resolve()),)


def test_a_bad_value_is_told_with_its_variable_and_what_is_allowed() -> None:
    for name, text, allowed in BAD:
        assert complaint({name: text}) == "%s=%r must be %s" % (name, text, allowed)


def test_a_bad_target_url_is_told_without_its_value_which_may_be_secret() -> None:
    for url in BAD_URLS:
        told = complaint({"AIS_TARGET_URL": url})
        assert told.startswith("AIS_TARGET_URL must be http://host[:port]/path"), url
        assert url not in told
    for url in ("http://host:51081/%s x", "10.0.0.5/%s", "http:///%s", "http://h/a?%s"):
        assert "s3cr3t-Xy9" not in complaint({"AIS_TARGET_URL": url % "s3cr3t-Xy9"})


def test_words_for_true_are_true_and_any_other_is_false() -> None:
    true = ("true", "TRUE", "1", "yes", "Y", "on", "t", " true ")
    for name, field in [("direct_put", "direct_put"), ("DIRECT_PUT", "direct_put"),
                        ("ETL_DIRECT_FQN", "direct_fqn"),
                        ("AIS_SKIP_VERIFY_CRT", "skip_verify"), ("AIS_SKIP_VERIFY", "skip_verify")]:
        for word in (*true, "false", "0", "no", "off", "f", "n", "2", "maybe", "truee", " "):
            settings = Settings.from_env({name: word})._asdict()
            assert settings == {**DEFAULTS, field: word in true}, (name, word)
    assert parse_bool(None) is parse_bool("") is False


@pytest.mark.parametrize("new, old, field", [
    ("DIRECT_PUT", "direct_put", "direct_put"), ("AIS_SKIP_VERIFY_CRT", "AIS_SKIP_VERIFY", "skip_verify"),
])
def test_of_two_names_the_new_one_wins_unless_it_is_empty(new: str, old: str, field: str) -> None:
    for new_word, old_word, value in [
            ("true", "false", True), ("false", "true", False), ("", "true", True), ("true", "", True)]:
        for environ in ({new: new_word, old: old_word}, {old: old_word, new: new_word}):
            assert Settings.from_env(environ)._asdict()[field] is value, environ


# == The payload ==


def test_pieces_of_the_payload_are_joined_by_number_and_not_by_name() -> None:
    environ = {"ETL_CLASS_PAYLOAD_%d" % number: "<%d>" % number for number in (11, 3, 2, 10, 9, 8, 7, 6, 5, 4)}
    joined = Settings.from_env({**environ, "ETL_CLASS_PAYLOAD": "<1>"}).payload
    assert joined == "".join("<%d>" % number for number in range(1, 12))


@pytest.mark.parametrize("present, missing", [
    ((1, 3), ["_2"]), ((1, 2, 5, 6), ["_3", "_4"]), ((2,), [""])])
def test_a_gap_between_pieces_is_refused(present: Tuple[int, ...], missing: List[str]) -> None:
    told = complaint({"ETL_CLASS_PAYLOAD" + ("_%d" % number if number > 1 else ""): "text"
                      for number in present})
    names = ", ".join("ETL_CLASS_PAYLOAD%s" % number for number in missing)
    assert "%s is not set, but ETL_CLASS_PAYLOAD_%d is" % (names, present[-1]) in told


def test_a_piece_whose_number_is_none_of_a_further_piece_is_refused() -> None:
    for name in ("ETL_CLASS_PAYLOAD_0", "ETL_CLASS_PAYLOAD_1", "ETL_CLASS_PAYLOAD_02"):
        assert name in complaint({"ETL_CLASS_PAYLOAD": "text", name: "more"})


def test_a_variable_that_only_looks_like_a_piece_is_left_to_the_users_class() -> None:
    names = ("ETL_CLASS_PAYLOAD_X", "ETL_CLASS_PAYLOADS", "ETL_CLASS_PAYLOAD_2_OLD")
    environ = {"ETL_CLASS_PAYLOAD": "a", "ETL_CLASS_PAYLOAD_2": "", **dict.fromkeys(names, "b")}
    assert Settings.from_env(environ).payload == "a"


def test_a_payload_told_twice_is_refused() -> None:
    told = complaint({"ETL_CLASS_PAYLOAD": "gAWV", "ETL_CLASS_PAYLOAD_FILE": __file__})
    assert told == "ETL_CLASS_PAYLOAD and ETL_CLASS_PAYLOAD_FILE are both set"
    both = {"ETL_CLASS_PAYLOAD_2": "gAWV", "ETL_CLASS_PAYLOAD_FILE": __file__}
    assert "ETL_CLASS_PAYLOAD" in complaint(both)


# == All together ==


def test_all_complaints_are_told_at_once() -> None:
    told = complaint({"NUM_WORKERS": "x", "PORT": "y", "AIS_TARGET_URL": "z", "AIS_CRT": "/no/cert"}, "ETL_CLASS_PAYLOAD")
    for name in ("NUM_WORKERS='x'", "PORT='y'", "AIS_TARGET_URL must be", "AIS_CRT='/no/cert'", "ETL_CLASS_PAYLOAD is not set"):
        assert told.count(name) == 1
    assert told.count("; ") == 4
    told = complaint({"AIS_TARGET_URL": ""}, "ETL_CLASS_PAYLOAD", "AIS_TARGET_URL")
    assert told == "ETL_CLASS_PAYLOAD is not set; AIS_TARGET_URL is not set"


def test_a_key_without_its_certificate_is_refused() -> None:
    told = complaint({"AIS_CRT_KEY": __file__})
    assert "AIS_CRT_KEY" in told and "AIS_CRT " in told + " "


def test_variables_of_others_are_let_be_and_settings_cannot_be_changed() -> None:
    assert Settings.from_env({"HOST": "::", "NUM_WORKERS_X": "x", "MODEL": "y", "port": "z"}) == Settings()
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
    settings = Settings(target="http://10.0.0.5/v1/etl/_object/my-etl/s%2Bcr3t")
    assert "cr3t" not in settings.redact("s%2Bcr3t, s+cr3t and /v1/etl/_object/my-etl/s+cr3t")


def test_without_secrets_nothing_is_hidden() -> None:
    text = "/a/b/c of http://10.0.0.5/a and /srv/objects/a"
    for target in ("", "http://10.0.0.5:51081", "http://10.0.0.5/", "file:///srv/objects"):
        assert Settings(target=target).redact(text) == text


def test_a_log_line_tells_what_was_raised_where_its_traceback_cannot_be_formatted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging, "traceback", None)  # as where no file can be opened to load what it needs
    try:
        raise ValueError("out of files with s3cr3t")
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, "", 0, "object %s", ("o",), sys.exc_info())
    line = RedactingFormatter(Settings(token="s3cr3t")).format(record)
    assert "object o\nValueError: out of files with" in line and "s3cr3t" not in line
