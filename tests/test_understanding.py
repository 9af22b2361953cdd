"""Stage 1, understanding: a method and a raw request target become the request that AIStore means."""
import re
from typing import Dict, Tuple
from urllib.parse import unquote

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from ais_runtime_min import BadRequest, ETLRequest, RequestError

UNAME = "/ais%2F@%23%2Fbck%2Fdir%2Fobj"


def wire(text: str) -> str:
    """Return a target as the HTTP layer hands it over: one character a byte."""
    return text.encode("utf-8").decode("latin-1")


def go_escape(text: str, kept: str) -> str:
    """Escape as package net/url of Go does: unreserved characters are kept, and those of `kept`."""
    return "".join(
        char if re.fullmatch("[A-Za-z0-9_.~-]", char) or char in kept else "".join("%%%02X" % byte for byte in char.encode())
        for char in text
    )


def path_escape(text: str) -> str:
    """Escape as url.PathEscape of Go."""
    return go_escape(text, "$&+=:@")


def encode_values(values: Dict[str, str]) -> str:
    """Encode as url.Values.Encode of Go, which sorts by key."""
    return "&".join(
        "%s=%s" % (key, go_escape(value, " ").replace(" ", "+")) for key, value in sorted(values.items()))


def understood(method: str, target: str) -> Tuple[str, str, str, str]:
    """Return a request's raw path, the query that goes along, its file's path, its arguments."""
    request = ETLRequest.parse(method, target)
    return request.raw_path, request.query, request.fqn, request.etl_args


def refusal(method: str, target: str) -> Tuple[int, Dict[str, str]]:
    """Return status and headers of the error that a request is."""
    with pytest.raises(RequestError) as caught:
        ETLRequest.parse(method, target)
    return caught.value.status, dict(caught.value.headers)


# == Targets ==

SPLIT = {  # targets whose parts are the same for PUT and for GET
    "/bck/obj": ("/bck/obj", "", "", ""),
    "/bck/obj?": ("/bck/obj", "", "", ""),
    "/bck/obj;v=1;w?a=1;b": ("/bck/obj;v=1;w", "a=1;b", "", ""),
    "/bck/q?x=1?y=2": ("/bck/q", "x=1?y=2", "", ""),
    "/bck/q?etl_fqnx=1?y": ("/bck/q", "etl_fqnx=1?y", "", ""),
    "/bck//obj/../x": ("/bck//obj/../x", "", "", ""),
    "/bck/http://h/x": ("/bck/http://h/x", "", "", ""),
    "HTTP://h:8000/bck/obj?a=1": ("/bck/obj", "a=1", "", ""),
    "https://[::1]:8000/bck/obj": ("/bck/obj", "", "", ""),
    "//bck/obj": ("//bck/obj", "", "", ""),
    "/bck/%3Fobj%2f%00?a=%3F": ("/bck/%3Fobj%2f%00", "a=%3F", "", ""),
    # our parameters are taken out and decoded, the others go along as they came
    "/o?b=2&etl_args=x&a=1&etl_fqn=f&c=3": ("/o", "b=2&a=1&c=3", "f", "x"),
    "/o?etl_args=x&etl_args=y&a=1&a=2": ("/o", "a=1&a=2", "", "x"),
    "/o?a==1&a=%c3%bc+%2B%20&b&b=%FF&c=%zz&d=%": ("/o", "a==1&a=%c3%bc+%2B%20&b&b=%FF&c=%zz&d=%", "", ""),
    wire("/o?a=ü&etl_fqn=ü"): ("/o", wire("a=ü"), "ü", ""),
    "/o?etl_fqn=%c3%bc%2F%C3%BC": ("/o", "", "ü/ü", ""),
    "/o?object_to=other&original_url=http://h/x": ("/o", "object_to=other&original_url=http://h/x", "", ""),
}
SPLIT_BY_METHOD = {  # only the path of a PUT may have a question mark
    "/bck/q?x=1?etl_fqn=f": (("/bck/q?x=1", "", "f", ""), ("/bck/q", "x=1?etl_fqn=f", "", "")),
    "/bck/q?x?etl_args=a": (("/bck/q?x", "", "", "a"), ("/bck/q", "x?etl_args=a", "", "")),
    "/bck/q??latest-ver=true":
        (("/bck/q?", "latest-ver=true", "", ""), ("/bck/q", "?latest-ver=true", "", "")),
}


def test_path_and_query_are_told_apart_and_kept_raw_but_for_our_parameters() -> None:
    for method in ("PUT", "GET"):
        assert {target: understood(method, target) for target in SPLIT} == SPLIT, method
    for target, by_method in SPLIT_BY_METHOD.items():
        assert (understood("PUT", target), understood("GET", target)) == by_method


DECODED = {  # raw paths, and what they are decoded
    UNAME: "ais/@#/bck/dir/obj", "/bck/a+b%20c%2Bd": "bck/a+b c+d", "/bck/a%2520b": "bck/a%20b",
    "/bck/%E2%82%AC": "bck/€", wire("/bck/€"): "bck/€", "/bck/%FF": "bck/\ufffd",
    "/bck/\xff": "bck/\ufffd", "/bck/100%": "bck/100%", "/bck/../obj": "bck/../obj",
    "/bck/%2E%2E/obj": "bck/../obj", "//bck": "/bck", "/bck/%00": "bck/\0",
}


def test_the_path_is_kept_raw_and_decoded_once() -> None:
    for method in ("PUT", "GET"):
        requests = {raw: ETLRequest.parse(method, raw) for raw in DECODED}
        assert {raw: request.decoded_path() for raw, request in requests.items()} == DECODED
        assert {(request.method, request.raw_path == "/download") for request in requests.values()} == {(method, False)}


def test_a_target_that_names_no_object_is_404() -> None:
    targets = ["", "//", "/?a=1", "*", "obj", "http://host", "http://host/", "http://host?a=1",
               "ftp://host/bck/obj", "?etl_fqn=x"]
    for method in ("GET", "PUT"):
        refusals = {target: refusal(method, target) for target in targets}
        assert refusals == dict.fromkeys(targets, (404, {}))


NOT_ALLOWED = {  # what is refused, and what is allowed instead
    ("POST", "/bck/obj"): "GET, PUT", ("HEAD", "/bck/obj"): "GET, PUT", ("get", UNAME): "GET, PUT",
    ("POST", "/downloads"): "GET, PUT", ("POST", "/download/obj"): "GET, PUT", ("PUT", "/ws"): "GET",
    ("POST", "/health?a=1"): "GET", ("PUT", "/download"): "POST",
    ("GET", "/download?original_url=a&object_to=b"): "POST",
}


def test_a_method_that_is_not_for_a_path_is_405_and_told_which_are() -> None:
    got = {asked: refusal(*asked) for asked in NOT_ALLOWED}
    assert got == {asked: (405, {"Allow": allowed}) for asked, allowed in NOT_ALLOWED.items()}


# == Parameters ==

ARGUMENTS = {  # as they come, and as the class gets them
    "": "", "+x+": "x", "%20%09x%0A": "x", "a+b": "a b", "a%2Bb": "a+b", "a%2520b": "a%20b",
    "%7B%22a%22%3A1%7D": '{"a":1}', "a%26b%3Dc": "a&b=c", "a=b=c": "a=b=c", "%C3%BC": "ü", wire("ü"): "ü",
    "%FF": "\ufffd", "%zz": "%zz", "%": "%", "a;b": "a;b", "%3F%2F": "?/",
}


def test_etl_args_are_decoded_once_and_stripped() -> None:
    for method in ("PUT", "GET"):
        got = {text: understood(method, "/bck/obj?etl_args=" + text)[3] for text in ARGUMENTS}
        assert got == ARGUMENTS


LATEST = {
    "latest-ver=true": True, "latest-ver=1": True, "latest-ver=TRUE": True, "": False,
    "latest-ver=false": False, "latest-ver=": False, "latest-ver": False, "latest=true": False,
}


def test_the_latest_version_is_asked_for_by_a_parameter_that_goes_along() -> None:
    requests = {text: ETLRequest.parse("GET", UNAME + "?etl_fqn=%2Fmp&" + text) for text in LATEST}
    assert {text: request.latest for text, request in requests.items()} == LATEST
    assert {text: (request.query, request.fqn) for text, request in requests.items()} == {
        text: (text, "/mp") for text in LATEST}


def test_a_download_has_the_url_and_the_name_that_its_parameters_tell_or_is_400() -> None:
    url = "https://host/a b?x=1&y=%2F#part"
    query = encode_values({"original_url": url, "object_to": "bck/a+b c", "etl_args": " x "})
    request = ETLRequest.parse("POST", "/download?" + query)
    assert (request.original_url, request.object_to, request.etl_args) == (url, "bck/a+b c", "x")
    assert (request.raw_path == "/download", request.decoded_path()) == (True, "bck/a+b c")
    for query in ("", "?original_url=http://h/x", "?object_to=bck/obj",
                  "?original_url=&object_to=x", "?original_url=http://h/x&object_to="):
        assert refusal("POST", "/download" + query) == (400, {}), query


def test_the_pipeline_is_stripped_of_white_space() -> None:
    assert ETLRequest.parse("PUT", "/bck/obj", " http://a, http://b ").pipeline == "http://a, http://b"
    assert ETLRequest.parse("PUT", "/bck/obj").pipeline == ""


# == What Go escapes comes back ==

NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
ODD_NAMES = st.text(st.sampled_from("ab/ %+#;?&=@:$,~!'()*[]\\\"<>^`{|}\n\t\0ü€😀\xa0\x85\u2028"), min_size=1)


@given(NAMES | ODD_NAMES, NAMES | ODD_NAMES, st.booleans())
@example("?etl_fqn=x", "?etl_args=y", True)
@example("a+b", "%2B", False)
@example(" begins and ends ", "a%2Fb&c=100%", False)
def test_any_name_that_a_target_escapes_for_a_pull_comes_back(name: str, args: str, latest: bool) -> None:
    values = {"etl_fqn": path_escape("/mp/@ais/bck/%ob/" + name), "etl_args": args, "uuid": name}
    values.update({"latest-ver": "true"} if latest else {})
    raw = "/" + path_escape("ais/@#/bck/" + name)
    request = ETLRequest.parse("GET", raw + "?" + encode_values(values))
    assert (request.raw_path, request.decoded_path()) == (raw, "ais/@#/bck/" + name)
    assert (unquote(request.fqn), request.etl_args) == ("/mp/@ais/bck/%ob/" + name, args.strip())
    assert request.query == ("latest-ver=true&" if latest else "") + encode_values({"uuid": name})
    assert request.latest is latest


@given(NAMES | ODD_NAMES, NAMES | ODD_NAMES)
@example(" begins and ends ", "a%2Fb&c=100%")
def test_any_name_that_a_target_pushes_comes_back(name: str, args: str) -> None:
    raw = "/bck/" + go_escape(name, "$&+,/:;=@")
    target = raw + "?" + encode_values({"etl_fqn": path_escape("/mp/" + name), "etl_args": args})
    request = ETLRequest.parse("PUT", target)
    assert (request.raw_path, request.decoded_path()) == (raw, "bck/" + name)
    assert (unquote(request.fqn), request.etl_args, request.query) == ("/mp/" + name, args.strip(), "")


@given(st.text(st.sampled_from("abü?=&/etl_fqn+;@:"), min_size=1), st.sampled_from(["etl_fqn", "etl_args", "latest-ver"]))
@example("q?x=1", "etl_fqn")
@example("q?etl_fqn=y", "etl_fqn")
def test_any_question_mark_in_a_pushed_name_stays_in_it(name: str, parameter: str) -> None:
    assume(name.strip("/"))
    request = ETLRequest.parse("PUT", wire("/" + name) + "?" + encode_values({parameter: "true?x"}))
    assert request.decoded_path() == name


# == Control messages of WebSocket ==


def test_a_control_message_is_understood() -> None:
    message = {"path": "dir/a%20b", "fqn": "%2Fmp", "etl_args": " a=1 ", "pipeline": " http://t/x ", "x": 1}
    request = ETLRequest.from_message(message)
    assert (request.decoded_path(), request.name) == ("dir/a%20b", "dir/a%20b")
    assert (request.fqn, request.etl_args, request.pipeline, request.is_message) == ("%2Fmp", "a=1", "http://t/x", True)
    assert ETLRequest.from_message({}).decoded_path() == ""


def test_a_malformed_control_message_is_refused() -> None:
    for message in (None, [], "path", 1, {"path": 1}, {"fqn": None}, {"etl_args": {}}, {"pipeline": []}):
        with pytest.raises(BadRequest):
            ETLRequest.from_message(message)
