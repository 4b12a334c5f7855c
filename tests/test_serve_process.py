"""`homer serve` as a process: many at once, kills, interrupts, and memory over many requests."""

import asyncio
import os
import signal
import time
from pathlib import Path
from threading import Thread

import httpx
import openai
import pytest
from command_line import run
from serving import QUESTION, Library, MiB, Process, asking, client, load_demo, story, wait_for

import homer_triton as ht


def prompts_of(count: int) -> list[str]:
    """Prompts that differ, and so do their answers."""
    keys = [10007 + 331 * i for i in range(count)]
    return [f"The pass key is {key}. {key} is the pass key. {QUESTION}" for key in keys]


@pytest.mark.process
def test_two_hundred_at_once_then_memory_is_what_it_was(tmp_path: Path) -> None:
    """None lost and none mixed up, beside a document's; later ones take no more memory."""
    library = Library(load_demo())
    count, new = 200, 5
    prompts = prompts_of(count)
    with Process(tmp_path) as server:
        url = server.url
        text = story(71432)
        document = httpx.post(f"{url}/v1/documents", json={"text": text}, timeout=120).json()

        async def ask_all(count: int, new: int) -> list[str]:
            # OpenAI's own client opens as many connections as it is asked to.
            api = openai.AsyncOpenAI(
                base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300
            )

            async def ask(index: int) -> str:
                about = {"document": document["id"]} if index % 5 == 0 else {}
                question = QUESTION if about else prompts[index]
                settings = {"model": "demo", "messages": asking(question), "max_tokens": new}
                if index % 2:
                    answer = await api.chat.completions.create(**settings, extra_body=about)
                    return str(answer.choices[0].message.content)
                stream = await api.chat.completions.create(
                    **settings, extra_body=about, stream=True
                )
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            async with api:
                return await asyncio.gather(*(ask(index) for index in range(count)))

        said = asyncio.run(ask_all(count, new))
        about = library.about(text, QUESTION, new)
        expected = library.many(prompts, new)
        expected[::5] = [about] * len(expected[::5])
        assert len(set(expected)) > 100
        assert said == expected
        before = server.resident
        for _ in range(3):
            asyncio.run(ask_all(40, 1))
        assert server.resident - before < 12 * MiB
        figures = httpx.get(f"{url}/metrics").text
    assert 'homer_requests_total{route="/v1/chat/completions",status="200"} 320.0' in figures
    assert "homer_waiting 0.0" in figures
    assert "homer_running 0.0" in figures


def interrupt(server: Process) -> None:
    """Ctrl-C lets the answer end that is coming, and refuses those that wait."""
    api = client(server.url)
    stream = api.chat.completions.create(
        model="demo",
        messages=asking("The grass is green. The sky is"),
        max_tokens=128,
        stream=True,
        stop=["never said"],
    )
    pieces = [next(stream).choices[0]]
    waiting: list[Exception] = []

    def ask() -> None:
        try:
            api.chat.completions.create(model="demo", messages=asking("The sun is"))
        except openai.APIStatusError as error:
            waiting.append(error)

    thread = Thread(target=ask)
    thread.start()
    wait_for(lambda: "homer_waiting 1.0" in httpx.get(f"{server.url}/metrics").text)
    os.kill(server.process.pid, signal.SIGINT)
    pieces += [chunk.choices[0] for chunk in stream]
    assert pieces[-1].finish_reason in ("length", "stop")
    thread.join()
    assert [error.status_code for error in waiting] == [503]
    assert server.process.wait(60) == 130
    _, told = server.process.communicate()
    assert told.endswith("homer: interrupted.\n")
    assert "Traceback" not in told


@pytest.mark.process
def test_a_kill_leaves_documents_whole_or_absent_and_ctrl_c_lets_answers_end(
    tmp_path: Path,
) -> None:
    """kill -9 while documents come, go and are asked; the next server has what was answered."""
    texts = [story(20011 + 17 * i) for i in range(60)]
    kept: dict[str, str] = {}
    removed: set[str] = set()
    gone: set[str] = set()
    server = Process(tmp_path)

    def put(part: list[str]) -> None:
        for number, text in enumerate(part):
            try:
                sent = httpx.post(f"{server.url}/v1/documents", json={"text": text}, timeout=60)
                kept[sent.json()["id"]] = text
                if number % 3 == 2:
                    removed.add(sent.json()["id"])
                    httpx.delete(f"{server.url}/v1/documents/{sent.json()['id']}")
                    gone.add(sent.json()["id"])
                else:
                    body = {"document": sent.json()["id"], "messages": asking(QUESTION)}
                    httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
            except httpx.HTTPError:
                return

    with server:
        threads = [Thread(target=put, args=(texts[i::4],)) for i in range(4)]
        for thread in threads:
            thread.start()
        wait_for(lambda: len(kept) >= 10 and gone)
        os.kill(server.process.pid, signal.SIGKILL)
        for thread in threads:
            thread.join()
    # What a kill in mid-write leaves, and what nobody can read.
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    (folder / f".{'0' * 32}.tmp").write_bytes(b"half")
    (folder / "doc-0-1.safetensors").write_bytes(b"of nothing")
    (folder / "doc-1.json").write_text('{"id": "doc-1"')
    with Process(tmp_path, "--running", 1) as server:
        listed = httpx.get(f"{server.url}/v1/documents").json()["data"]
        here = {one["id"] for one in listed}
        assert kept.keys() - removed <= here
        assert gone
        assert not gone & here
        for one in listed:
            answer = client(server.url).chat.completions.create(
                model="demo",
                messages=asking(QUESTION),
                max_tokens=7,
                extra_body={"document": one["id"]},
            )
            key = kept.get(one["id"], "The pass key is ").split("The pass key is ")[1][:5]
            assert key in str(answer.choices[0].message.content)
        names = {path.name for path in folder.iterdir()}
        assert {name.rpartition("-")[0] for name in names if name.endswith(".safetensors")} <= here
        assert {name[:-5] for name in names if name.endswith(".json")} == here
        assert not [name for name in names if name.endswith(".tmp")]
        # Two servers would remove each other's documents.
        words = ("serve", "--model", ht.demo.CHECKPOINT, "--documents", tmp_path, "--port", 0)
        result = run(*words, "--device", "cpu")
        assert result.exit_code == 2
        assert "Another server keeps this model's documents" in result.stderr
        interrupt(server)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--port", "70000"), "--port"),
        (("--host", "no.such.name.invalid"), "Cannot listen at no.such.name.invalid, port"),
        (("--documents-size", "much"), "much"),
        (("--top-k", "5"), "set temperature above 0 too"),
        (("--api-key", "schlüssel"), "--api-key must be of ASCII characters"),
        (("--thinking",), "need a chat template; leave them out"),
    ],
)
def test_bad_options_are_one_sentence(
    tmp_path: Path, options: tuple[str, ...], sentence: str
) -> None:
    words = ("serve", "--model", ht.demo.CHECKPOINT, "--device", "cpu", "--documents", tmp_path)
    started = time.monotonic()
    result = run(*words, *(() if "--port" in options else ("--port", 0)), *options)
    assert result.exit_code == 2
    assert sentence in result.stderr
    assert time.monotonic() - started < 60


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    from homer_triton.serving.server import bind

    taken = bind("127.0.0.1", 0)
    port = taken.getsockname()[1]
    words = ("serve", "--model", ht.demo.CHECKPOINT, "--documents", tmp_path, "--port", port)
    result = run(*words)
    assert result.exit_code == 2
    assert f"Cannot listen at 127.0.0.1, port {port}" in result.stderr


def test_without_the_extra_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "uvicorn", None)
    result = run("serve", "--model", ht.demo.CHECKPOINT, "--documents", tmp_path)
    assert result.exit_code == 2
    assert "`homer serve` needs uvicorn: pip install 'homer_triton[serve]'." in result.stderr
