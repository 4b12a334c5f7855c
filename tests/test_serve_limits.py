"""What a server refuses and lets go: bad input, full queues, clients that leave, keys, room."""

import asyncio
import gzip
import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from serving import (
    CONFIG,
    QUESTION,
    MiB,
    asking,
    client,
    load_demo,
    make_service,
    served,
    story,
    wait_for,
)

import homer_triton as ht
from homer_triton.serving.engine import Engine
from homer_triton.serving.errors import ApiError
from homer_triton.serving.groups import Group
from homer_triton.serving.guard import Guard
from homer_triton.serving.memory import Memory, size_of
from homer_triton.serving.records import NoDocumentError, TooLargeError, id_of
from homer_triton.serving.stops import Stops
from homer_triton.serving.store import Store


@pytest.fixture(scope="module")
def model() -> ht.Llama:
    return load_demo()


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, model: ht.Llama) -> Iterator[str]:
    with served(make_service(tmp_path_factory.mktemp("documents"), model)) as address:
        yield address


def chat(**changes: Any) -> dict[str, Any]:
    return {"model": "demo", "messages": asking("The sky is"), "max_tokens": 4, **changes}


CHAT = [
    (chat(model="gpt-9"), 404, "The model 'gpt-9' is not here; this server has 'demo'."),
    (chat(model=7), 400, "model: input should be a valid string."),
    (chat(document="doc-no"), 404, "There is no document 'doc-no'; it may have gone to make room."),
    (chat(document="../../etc/passwd"), 404, "There is no document '../../etc/passwd'"),
    (chat(reuse=True), 400, "reuse needs a document."),
    (chat(messages=[]), 400, "messages: list should have at least 1 item"),
    (chat(messages="hello"), 400, "messages: input should be a valid list."),
    (chat(messages=asking("")), 400, "messages.0: the message is empty."),
    (chat(messages=asking(" \n")), 400, "messages.0: the message is empty."),
    (chat(messages=[{"role": "king", "content": "x"}]), 400, "messages.0.role: input should be"),
    (chat(messages=[{"role": "user"}]), 400, "messages.0.content: field required."),
    (
        chat(messages=[*asking("x"), {"role": "assistant", "content": "y"}]),
        400,
        "The last message must be the user's.",
    ),
    (
        chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]),
        400,
        "messages.0.content",
    ),
    (chat(messages=asking("\ud800 and more")), 400, "A message is not Unicode text"),
    (chat(max_tokens=0), 400, "max_tokens=0 must be at least 1."),
    (chat(max_tokens=-2), 400, "max_tokens: input should be greater than or equal to -1."),
    (chat(top_p=-0.1), 400, "top_p: input should be greater than or equal to 0."),
    (chat(max_tokens=2.5), 400, "max_tokens: input should be a valid integer"),
    (chat(temperature=-1), 400, "temperature: input should be greater than or equal to 0."),
    (chat(temperature=2.1), 400, "temperature: input should be less than or equal to 2."),
    (chat(temperature=1e-9), 400, "temperature=1e-09 must be at least 1e-06"),
    (chat(temperature="hot"), 400, "temperature: input should be a valid number."),
    (chat(top_k=-2), 400, "top_k: input should be greater than or equal to -1."),
    (chat(min_p=1.5), 400, "min_p: input should be less than or equal to 1."),
    (chat(n=0), 400, "n: input should be greater than or equal to 1."),
    (chat(n=17), 400, "n=17 must be at most 16."),
    (chat(seed=2**64), 400, "seed: input should be less than or equal to"),
    (chat(stop=["a"] * 17), 400, "stop must be at most 16 texts"),
    (chat(presence_penalty=0.5), 400, "presence_penalty is not supported by this server"),
    (chat(tools=[{"type": "function"}]), 400, "tools is not supported by this server"),
    (chat(tools=[{}], tool_choice="auto"), 400, 'or set tool_choice to "none".'),
    (chat(response_format={"type": "json_object"}), 400, "response_format is not supported"),
    (chat(logprobs=True, top_logprobs=3), 400, "top_logprobs is not supported by this server"),
    (chat(logprobs=1), 400, "logprobs: input should be a valid boolean."),
    (chat(stream_options={"include_usage": 7}), 400, "stream_options.include_usage"),
    ([], 400, "The body must be a JSON object."),
    (7, 400, "The body must be a JSON object."),
]


@pytest.mark.parametrize(("body", "status", "sentence"), CHAT, ids=lambda x: str(x)[:40])
def test_bad_conversations_are_one_sentence(
    url: str, body: object, status: int, sentence: str
) -> None:
    for stream in (False, True):
        sent = {**body, "stream": stream} if isinstance(body, dict) else body
        answer = httpx.post(
            f"{url}/v1/chat/completions",
            content=json.dumps(sent),
            headers={"Content-Type": "application/json"},
        )
        assert answer.status_code == status, answer.text
        (error,) = answer.json().values()
        assert error.keys() == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"
        assert sentence in error["message"]
        assert error["message"].endswith(".")
        assert "\n" not in error["message"]


CALL = {"id": "1", "type": "function", "function": {"name": "look", "arguments": "{}"}}


@pytest.mark.parametrize("content", ["", None, []])
@pytest.mark.parametrize("calls", [{}, {"tool_calls": None}, {"tool_calls": [CALL]}])
def test_histories_that_clients_send(url: str, content: object, calls: dict[str, Any]) -> None:
    reply = {"role": "assistant", "content": content, "refusal": None, **calls}
    found = [{"role": "tool", "tool_call_id": "1", "content": "blue"}] if calls else []
    said = [*asking("The sky is"), reply, *found, *asking("The grass is")]
    answer = httpx.post(f"{url}/v1/chat/completions", json=chat(messages=said))
    assert answer.status_code == 200, answer.text


def test_the_servers_own_empty_answer_may_come_back(url: str) -> None:
    body = chat(stop=[" "], max_tokens=2)
    (choice,) = httpx.post(f"{url}/v1/chat/completions", json=body).json()["choices"]
    said = [*body["messages"], choice["message"], *asking("And the grass?")]
    answer = httpx.post(f"{url}/v1/chat/completions", json=chat(messages=said))
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    "settings",
    [
        {"tools": [{"type": "function"}], "tool_choice": "none"},
        {"tools": []},
        {"chat_template_kwargs": {"enable_thinking": True}},
        {"chat_template_kwargs": {"documents": []}},
        {"top_p": 0, "temperature": 1.5},
        {"stop": ""},
        {"stop": ["", "never said"]},
        {"stop": None},
    ],
    ids=str,
)
def test_what_asks_for_nothing_special_changes_nothing(url: str, settings: dict[str, Any]) -> None:
    plain, told = (
        httpx.post(f"{url}/v1/chat/completions", json=body)
        for body in (chat(temperature=0), {**chat(temperature=0), **settings})
    )
    assert told.status_code == 200, told.text
    assert told.json()["choices"] == plain.json()["choices"]


@pytest.mark.parametrize("most", [-1, 129, 10**9])
@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_an_answer_ends_where_the_room_does(url: str, most: int, name: str) -> None:
    body = {**chat(max_tokens=None, temperature=0), name: most}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
    (choice,) = answer["choices"]
    new = answer["usage"]["completion_tokens"]
    assert (choice["finish_reason"], new) in (("length", 128), ("stop", min(new, 128)))


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({}, "prompt: field required."),
        ({"prompt": ""}, "prompt must be one text or up to 64, none of them empty."),
        ({"prompt": []}, "prompt must be one text"),
        ({"prompt": ["x"] * 65}, "prompt must be one text"),
        ({"prompt": {"a": 1}}, "prompt: input should be a valid string."),
        ({"prompt": [5, 10**9]}, "prompt holds token id 1000000000, outside the vocabulary"),
        ({"prompt": [5]}, "The prompt is a single token at most; say more."),
        ({"prompt": "a b", "echo": True}, "echo is not supported by this server"),
        ({"prompt": "a b", "best_of": 3}, "best_of is not supported by this server"),
        ({"prompt": "a b", "logprobs": 5}, "logprobs: input should be less than or equal to 0."),
        ({"prompt": "a b", "suffix": "x"}, "suffix is not supported by this server"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_bad_prompts_are_one_sentence(url: str, body: dict, sentence: str) -> None:
    answer = httpx.post(f"{url}/v1/completions", json=body)
    assert answer.status_code == 400, answer.text
    assert sentence in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("content", "kind", "status", "sentence"),
    [
        (b"{", "application/json", 400, "The body is not JSON."),
        (b"[" * 100_000, "application/json", 400, "The body is not JSON."),
        (b"[]", "application/json", 400, "the body: input should be a valid dictionary"),
        (b"{}", "application/json", 400, "text: field required."),
        (b'{"text": 7}', "application/json", 400, "text: input should be a valid string."),
        (b'{"text": " "}', "application/json", 400, "The text is empty."),
        (b'{"text": "a\\u0000b"}', "application/json", 400, "The text holds zero bytes"),
        (b'{"text": "a\\ud800b"}', "application/json", 400, "text is not Unicode text"),
        (b'{"text": "a b", "suffix": ""}', "application/json", 400, "suffix: string should have"),
        (b'{"text": "a"}', "application/json", 400, "The context is one token long"),
        (b"", "text/plain", 400, "The text is empty."),
        (b"\x89PNG\r\n\x1a\n\0\0", "text/plain", 400, "The text is not UTF-8 (byte 0)"),
        (b"a b", "multipart/form-data; boundary=x", 415, "Send JSON (application/json) or"),
        (b"a b", "", 415, "Send JSON (application/json) or"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_uploads_that_are_no_text(
    url: str, content: bytes, kind: str, status: int, sentence: str
) -> None:
    answer = httpx.post(
        f"{url}/v1/documents", content=content, headers={"Content-Type": kind} if kind else {}
    )
    assert answer.status_code == status, answer.text
    assert sentence in answer.json()["error"]["message"]


def test_nothing_tells_of_the_servers_inside(url: str) -> None:
    for method, path, status in (
        ("GET", "/nowhere", 404),
        ("GET", "/v1/chat/completions", 405),
        ("PUT", "/v1/documents/doc-1", 405),
        ("GET", "/v1/documents/..%2f..%2fetc", 404),
        ("GET", "/docs", 404),
        ("GET", "/openapi.json", 404),
        ("POST", "/v1/chat/completions", 400),
    ):
        answer = httpx.request(method, f"{url}{path}")
        assert answer.status_code == status
        assert answer.json()["error"]["message"].endswith(".")
        assert "uvicorn" not in str(answer.headers)


def test_a_bug_is_told_without_its_words(
    url: str, model: ht.Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = make_service(tmp_path, model)

    def fail(*_: object) -> None:
        raise KeyError("/secret/path")

    monkeypatch.setattr(service.sources, "chat", fail)
    with served(service) as address:
        answer = httpx.post(f"{address}/v1/chat/completions", json=chat())
        assert answer.status_code == 500
        assert answer.json()["error"] == {
            "message": "The server failed; its log says more.",
            "type": "server_error",
            "param": None,
            "code": "internal_error",
        }
        monkeypatch.undo()

        # In the engine's thread, and there in the middle of a stream.
        def fail_later(*_: object) -> None:
            raise RuntimeError("/secret/path")

        monkeypatch.setattr("homer_triton.serving.groups.Group.step", fail_later)
        answer = httpx.post(f"{address}/v1/chat/completions", json=chat())
        assert answer.status_code == 500
        assert "secret" not in answer.text
        answer = httpx.post(f"{address}/v1/chat/completions", json=chat(stream=True))
        assert "The server failed; its log says more." in answer.text
        assert "secret" not in answer.text
        monkeypatch.undo()
        assert httpx.post(f"{address}/v1/chat/completions", json=chat()).status_code == 200


@pytest.mark.slow
def test_the_key_and_where_requests_come_from(model: ht.Llama, tmp_path: Path) -> None:
    with served(make_service(tmp_path, model), key="sesame") as url:
        assert client(url, "sesame").models.list().data[0].id == "demo"
        with pytest.raises(openai.AuthenticationError, match="The API key is missing or wrong"):
            client(url, "simsim").models.list()
        for path in ("/v1/models", "/metrics", "/v1/documents"):
            assert httpx.get(f"{url}{path}").status_code == 401
        assert httpx.get(f"{url}/health").status_code == 200
        known = {"Authorization": "Bearer sesame"}
        for header, code in (
            ({"Host": "evil.example"}, "wrong_host"),
            ({"Origin": "http://evil.example"}, "wrong_origin"),
            ({"Origin": "null"}, "wrong_origin"),
        ):
            answer = httpx.get(f"{url}/v1/models", headers={**known, **header})
            assert answer.status_code == 403
            assert answer.json()["error"]["code"] == code
        own = {**known, "Origin": url}
        assert httpx.get(f"{url}/v1/models", headers=own).status_code == 200


def test_keys_and_ids_as_clients_send_them(model: ht.Llama, tmp_path: Path) -> None:
    with served(make_service(tmp_path, model), key="sesame") as url:
        for given in ("Bearer sesame", "bearer sesame", "BEARER  sesame"):
            headers = {"Authorization": given, "X-Request-Id": "mine-1"}
            answer = httpx.get(f"{url}/v1/models", headers=headers)
            assert answer.status_code == 200
            assert answer.headers["X-Request-Id"] == "mine-1"
        for given in ("", "sesame", "Basic sesame", "Bearer sesam", "Bearer"):
            answer = httpx.get(f"{url}/v1/models", headers={"Authorization": given})
            assert answer.status_code == 401
            assert answer.headers["WWW-Authenticate"] == "Bearer"
        ids = {httpx.get(f"{url}/health").headers["X-Request-Id"] for _ in range(3)}
        assert len(ids) == 3
        strange = httpx.get(f"{url}/health", headers={"X-Request-Id": "a b<script>"})
        assert strange.headers["X-Request-Id"] not in ids | {"a b<script>"}


def test_pages_elsewhere_that_may_ask(model: ht.Llama, tmp_path: Path) -> None:
    """A preflight is answered before the key is asked for."""
    page = "https://chat.example"
    service = make_service(tmp_path, model)
    with served(service, key="sesame", origins=(page,)) as url:
        ask = {"Access-Control-Request-Method": "POST"}
        ask["Access-Control-Request-Headers"] = "authorization,content-type"
        for origin, status in ((page, 200), ("https://evil.example", 400)):
            answer = httpx.options(f"{url}/v1/chat/completions", headers={"Origin": origin, **ask})
            assert answer.status_code == status
        known = {"Authorization": "Bearer sesame"}
        answer = httpx.get(f"{url}/v1/models", headers={**known, "Origin": page})
        assert answer.status_code == 200
        assert answer.headers["Access-Control-Allow-Origin"] == page
        # A proxy that passes on the name that its users see.
        proxied = {**known, "Origin": page, "Host": "chat.example"}
        assert httpx.get(f"{url}/v1/models", headers=proxied).status_code == 200
        evil = {**known, "Origin": "https://evil.example"}
        assert httpx.get(f"{url}/v1/models", headers=evil).status_code == 403


def test_what_http_clients_try(url: str) -> None:
    for path in ("/", "/health", "/v1/models", "/v1/models/"):
        assert httpx.head(f"{url}{path}").status_code == 200
    assert httpx.get(f"{url}/v1/models/").json() == httpx.get(f"{url}/v1/models").json()
    wrong = httpx.get(f"{url}/v1/chat/completions")
    assert (wrong.status_code, wrong.headers["Allow"]) == (405, "POST")
    for path, kind in (("chat/completions", "application/json"), ("documents", "text/plain")):
        headers = {"Content-Type": kind, "Content-Encoding": "gzip"}
        packed = httpx.post(f"{url}/v1/{path}", content=gzip.compress(b"{}"), headers=headers)
        assert packed.status_code == 415
        assert "without Content-Encoding" in packed.json()["error"]["message"]
    headers = {"Content-Type": "text/markdown; charset=utf-8"}
    content = b"# Sky\n\nThe sky is blue. The grass is green."
    assert httpx.post(f"{url}/v1/documents", content=content, headers=headers).status_code == 200


def test_a_client_that_leaves_in_its_body_is_no_error(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    host, port = url.removeprefix("http://").split(":")
    for path in ("chat/completions", "documents"):
        with socket.create_connection((host, int(port))) as opened:
            opened.sendall(
                f"POST /v1/{path} HTTP/1.1\r\nHost: {host}:{port}\r\n"
                "Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n{".encode()
            )
            time.sleep(0.2)
    time.sleep(0.3)
    assert httpx.get(f"{url}/health").status_code == 200
    assert not [x for x in caplog.records if x.exc_info], caplog.text


def test_large_bodies_are_refused_before_they_are_read(model: ht.Llama, tmp_path: Path) -> None:
    with served(make_service(tmp_path, model), most_bytes=10_000) as url:
        text = {"Content-Type": "text/plain"}
        answer = httpx.post(f"{url}/v1/documents", content=b"a " * 6000, headers=text)
        assert answer.status_code == 413
        assert answer.json()["error"]["message"] == "The body is larger than 10,000 bytes."

        def parts() -> Iterator[bytes]:  # without a length
            for _ in range(6):
                yield b"word " * 400

        answer = httpx.post(f"{url}/v1/documents", content=parts(), headers=text)
        assert answer.status_code == 413
        answer = httpx.post(f"{url}/v1/documents", content=b"word " * 1900, headers=text)
        assert answer.status_code == 200


def test_a_body_in_many_messages_is_counted_as_a_whole() -> None:
    async def read(scope: Any, receive: Any, send: Any) -> None:
        while (await receive())["more_body"]:
            pass

    messages = [{"type": "http.request", "body": b"x" * 400, "more_body": n < 2} for n in range(3)]

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        raise AssertionError(message)

    scope = {"type": "http", "path": "/", "headers": [(b"host", b"localhost")]}
    guard = Guard(read, None, 1000, is_local=True)
    with pytest.raises(ApiError, match="larger than 1,000 bytes"):
        asyncio.run(guard(scope, receive, send))
    assert messages == []


def send(url: str, body: dict) -> socket.socket:
    """A question whose answer nobody reads, and which is taken back by closing it."""
    host, port = url.removeprefix("http://").split(":")
    content = json.dumps(body)
    opened = socket.create_connection((host, int(port)))
    opened.sendall(
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}:{port}\r\n"
        f"Content-Length: {len(content)}\r\n\r\n{content}".encode()
    )
    return opened


@pytest.mark.slow
def test_a_full_queue_and_clients_that_leave(
    model: ht.Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The queue is bounded, and whoever leaves frees a place in it or among the running."""
    step = Group.step

    def slowly(group: Group) -> None:
        step(group)
        time.sleep(0.3)

    # No answer comes to its end while the test looks.
    monkeypatch.setattr(Group, "step", slowly)
    service = make_service(tmp_path, model, running=1, waiting=2)
    long = chat(max_tokens=128, stop="never", messages=asking("The sky is blue. The sun is"))
    with served(service) as url:
        engine = service.engine
        leaving = []
        for number in range(3):
            leaving.append(send(url, {**long, "stream": number == 0}))
            wait_for(lambda n=number: engine.running == 1 and engine.waiting == n)
        refused = httpx.post(f"{url}/v1/chat/completions", json=chat())
        assert refused.status_code == 429
        assert refused.headers["Retry-After"] == "1"
        assert refused.json()["error"]["type"] == "rate_limit_error"
        with pytest.raises(openai.RateLimitError, match="Too many requests are waiting"):
            client(url).chat.completions.create(**chat())
        started = time.monotonic()
        leaving[2].close()
        wait_for(lambda: engine.waiting == 1)
        leaving[0].close()
        wait_for(lambda: engine.waiting == 0 and engine.running == 1)
        leaving[1].close()
        wait_for(lambda: engine.running == 0)
        assert time.monotonic() - started < 20
        assert httpx.post(f"{url}/v1/chat/completions", json=chat()).status_code == 200


@pytest.mark.slow
def test_who_leaves_while_a_text_is_read_leaves_nothing(model: ht.Llama, tmp_path: Path) -> None:
    service = make_service(tmp_path, model)
    with served(service) as url:
        with httpx.stream(
            "POST", f"{url}/v1/documents?stream=true", json={"text": story(1) * 20}, timeout=60
        ) as answer:
            assert "document.progress" in next(answer.iter_lines())
            # Others are answered between its chunks.
            started = time.monotonic()
            assert httpx.post(f"{url}/v1/chat/completions", json=chat()).status_code == 200
            assert service.store.documents() == []
        wait_for(lambda: engine_is_idle(service.engine))
        assert time.monotonic() - started < 30
        assert httpx.get(f"{url}/v1/documents").json()["data"] == []


@pytest.mark.slow
def test_one_reading_serves_all_who_ask_the_same(model: ht.Llama, tmp_path: Path) -> None:
    """Answers to many questions at once: of a text that is read for them once, and of one that
    was read already, which they share.
    """
    service = make_service(tmp_path, model)
    groups: list[int] = []
    joined: list[int] = []
    form, join = Group.__init__, Group.add

    def noted(group: Group, model: ht.Llama, members: list) -> None:
        groups.append(len(members))
        form(group, model, members)

    def noted_too(group: Group, members: list) -> None:
        joined.append(len(members))
        join(group, members)

    with served(service) as url, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Group, "__init__", noted)
        patch.setattr(Group, "add", noted_too)
        document = httpx.post(f"{url}/v1/documents", json={"text": story(60606)}, timeout=60).json()
        body = chat(document=document["id"], messages=asking(QUESTION), max_tokens=7)
        with ThreadPoolExecutor(8) as pool:
            ask = partial(httpx.post, f"{url}/v1/chat/completions", timeout=60)
            said = list(pool.map(lambda _: ask(json=body).json(), range(8)))
            assert {x["choices"][0]["message"]["content"] for x in said} == {" 60606."}
            figures = httpx.get(f"{url}/metrics").text
            # The document's own, and the question's.
            assert 'homer_readings_total{reused="false"} 2.0' in figures
            assert 'homer_readings_total{reused="true"} 7.0' in figures
            groups.clear()
            joined.clear()
            body |= {"reuse": True}
            said = list(pool.map(lambda _: ask(json=body).json(), range(8)))
        assert len({x["choices"][0]["message"]["content"] for x in said}) == 1
        assert sum(groups + joined) == 8
        assert len(groups) < 8


def test_health_tells_of_an_engine_that_has_ended(model: ht.Llama, tmp_path: Path) -> None:
    service = make_service(tmp_path, model)
    with served(service) as url:
        assert httpx.get(f"{url}/health").status_code == 200
        service.engine.close()
        assert httpx.get(f"{url}/health").status_code == 503
        assert httpx.post(f"{url}/v1/chat/completions", json=chat()).status_code == 503


def engine_is_idle(engine: Engine) -> bool:
    return not engine.running and not engine.waiting and not engine.is_reading


@pytest.mark.slow
def test_what_was_used_longest_ago_goes(model: ht.Llama, tmp_path: Path) -> None:
    texts = [story(20000 + i) for i in range(4)]
    encoded = [ht.encode(model, text, config=CONFIG) for text in texts]
    one = encoded[0]
    store = Store(tmp_path, model.fingerprint, 10**9)
    kept = [
        store.add(text, "", None, f"own{i}", own)
        for i, (text, own) in enumerate(zip(texts[:2], encoded, strict=False))
    ]
    size = kept[0].bytes
    store.keep(kept[0].id, "asked", one)
    assert store.bytes == pytest.approx(3 * size, rel=0.1)
    store.close()
    # A restart has all of it, and lets go what no longer fits.
    store = Store(tmp_path, model.fingerprint, int(3.3 * size))
    assert {x.id: set(x.encodings) for x in store.documents()} == {
        kept[0].id: {"own0", "asked"},
        kept[1].id: {"own1"},
    }
    assert store.text(kept[0].id) == texts[0]
    assert store.load(kept[0].id, "own0") is not None
    third = store.add(texts[2], "", None, "own2", encoded[2])
    # own1 was used longest ago, and its document had no other.
    assert {x.id: set(x.encodings) for x in store.documents()} == {
        kept[0].id: {"own0", "asked"},
        third.id: {"own2"},
    }
    with pytest.raises(NoDocumentError):
        store.text(kept[1].id)
    store.touch(kept[0].id, "own0")
    fourth = store.add(texts[3], "", None, "own3", encoded[3])
    assert {x.id: set(x.encodings) for x in store.documents()} == {
        kept[0].id: {"own0"},
        third.id: {"own2"},
        fourth.id: {"own3"},
    }
    assert store.bytes <= 3.3 * size
    names = {path.name for path in (tmp_path / model.fingerprint).iterdir()}
    assert len(names) == 7  # with the lock
    store.close()
    with pytest.raises(TooLargeError):
        Store(tmp_path / "small", model.fingerprint, size // 2).add(texts[0], "", None, "a", one)
    assert [x.name for x in (tmp_path / "small" / model.fingerprint).iterdir()] == ["lock"]


def test_damaged_and_foreign_files_are_not_used(model: ht.Llama, tmp_path: Path) -> None:
    text = story(30303)
    encoded = ht.encode(model, text, config=CONFIG)
    store = Store(tmp_path, model.fingerprint, 10**9)
    document = store.add(text, "", None, "own", encoded)
    store.keep(document.id, "other", encoded)
    folder = tmp_path / model.fingerprint
    own, other = (folder / f"{document.id}-{key}.safetensors" for key in ("own", "other"))
    damaged = bytearray(own.read_bytes())
    damaged[-9] ^= 1
    own.write_bytes(damaged)
    ht.EncodedContext.load(other)
    replace(encoded, model="0" * 16).save(other)
    for key, file in (("own", own), ("other", other)):
        assert store.load(document.id, key) is None
        assert not file.exists()
    # The text is there, so that it can be read again.
    assert store.text(document.id) == text
    store.close()
    # Another model's documents are in another folder; they stay.
    Store(tmp_path, "f" * 16, 10**9).close()
    file = folder / f"{document.id}.json"
    assert file.exists()
    told = json.loads(file.read_text())
    file.write_text(json.dumps({**told, "text": "another"}))
    assert Store(tmp_path, model.fingerprint, 10**9).documents() == []
    assert document.id == id_of(text, None)


@pytest.mark.slow
def test_a_restart_answers_from_disk(model: ht.Llama, tmp_path: Path) -> None:
    asked = {"model": "demo", "messages": asking(QUESTION), "max_tokens": 7}
    said = []
    for _ in range(2):
        with served(make_service(tmp_path, model)) as url:
            sent = httpx.post(f"{url}/v1/documents", json={"text": story(45454)}, timeout=60)
            answer = client(url).chat.completions.create(
                **asked, extra_body={"document": sent.json()["id"]}
            )
            said.append(answer.choices[0].message.content)
            assert answer.usage is not None
            details = answer.usage.prompt_tokens_details
            assert details is not None
            assert bool(details.cached_tokens) == (len(said) == 2)
    assert "45454" in str(said[0])
    assert said[0] == said[1]


@pytest.mark.slow
def test_memory_holds_what_was_used_last(model: ht.Llama) -> None:
    encoded = [ht.encode(model, story(i), config=CONFIG) for i in range(3)]
    memory = Memory(2 * size_of(encoded[0]))
    memory.put("a", encoded[0])
    memory.put("b", encoded[1])
    assert memory.get("a") is encoded[0]
    memory.put("c", encoded[2])
    assert [memory.get(key) is not None for key in "abc"] == [True, False, True]
    memory.forget(["a", "x"])
    assert memory.get("a") is None
    assert memory.get(None) is None
    small = Memory(size_of(encoded[0]) - 1)
    small.put("a", encoded[0])
    assert small.get("a") is None
    assert size_of(encoded[0]) > MiB


@pytest.mark.parametrize(
    ("pieces", "stops", "told"),
    [
        (["ab", "cd"], [], ["ab", "cd", ""]),
        (["ab", "cd"], ["bc"], ["a", "", ""]),
        (["ab", "bd"], ["bc"], ["a", "bbd", ""]),
        (["a", "a", "a", "b"], ["aab"], ["", "", "a", "", ""]),
        (["xy"], ["yz", "z"], ["x", "y"]),
        (["x END y", "z"], ["y", "END"], ["x ", "", ""]),
    ],
)
def test_what_may_begin_a_stop_is_held_back(
    pieces: list[str], stops: list[str], told: list[str]
) -> None:
    passing = Stops(stops)
    assert [*map(passing.pass_on, pieces), passing.rest()] == told
