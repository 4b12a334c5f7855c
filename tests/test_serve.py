"""`homer serve` through OpenAI's client: answers, streams, usage, and the documents' life."""

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
import torch
from command_line import checkpoint
from serving import (
    CONFIG,
    QUESTION,
    Library,
    asking,
    client,
    load_demo,
    make_service,
    served,
    story,
    wait_for,
)

import homer_triton as ht
from homer_triton.serving.jobs import Job
from homer_triton.serving.room import with_room


@pytest.fixture(scope="module")
def library() -> Library:
    return Library(load_demo())


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, library: Library) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("documents")
    with served(make_service(folder, library.model)) as address:
        yield address


@pytest.fixture(scope="module")
def api(url: str) -> openai.OpenAI:
    return client(url)


def put(url: str, text: str, **told: str) -> dict:
    answer = httpx.post(f"{url}/v1/documents", json={"text": text, **told}, timeout=120)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_models_and_health(url: str, api: openai.OpenAI) -> None:
    (model,) = api.models.list()
    assert model.id == "demo"
    assert api.models.retrieve("demo").id == "demo"
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}
    with pytest.raises(openai.NotFoundError, match="The model 'gpt-9' is not here"):
        api.models.retrieve("gpt-9")


def test_a_prompt_that_fits_goes_on_as_with_the_plain_model(
    api: openai.OpenAI, library: Library
) -> None:
    prompt = "The grass is green. The sky is"
    expected = library.plain(prompt, 8)
    chat = api.chat.completions.create(model="demo", messages=asking(prompt), max_tokens=8)
    assert chat.choices[0].message.content == expected
    assert chat.choices[0].message.role == "assistant"
    assert chat.choices[0].finish_reason == "length"
    plain = api.completions.create(model="demo", prompt=prompt, max_tokens=8)
    assert plain.choices[0].text == expected
    for usage in (chat.usage, plain.usage):
        assert usage is not None
        # With the beginning-of-sequence token.
        assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (9, 8, 17)


def test_a_stream_is_the_answer_in_pieces(api: openai.OpenAI, library: Library) -> None:
    prompt = "The grass is green. The sky is"
    chunks = list(
        api.chat.completions.create(
            model="demo",
            messages=asking(prompt),
            max_completion_tokens=8,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks[:-1]]
    assert "".join(pieces) == library.plain(prompt, 8)
    assert sum(map(bool, pieces)) >= 6
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == (
        [None] * (len(chunks) - 2) + ["length"]
    )
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 17
    assert len({chunk.id for chunk in chunks}) == 1
    plain = api.completions.create(model="demo", prompt=prompt, max_tokens=8, stream=True)
    assert "".join(chunk.choices[0].text for chunk in plain) == library.plain(prompt, 8)


@pytest.mark.slow
def test_a_message_beyond_the_limit_is_merged(api: openai.OpenAI, library: Library) -> None:
    for key in (71432, 40165):
        messages = [
            {"role": "system", "content": "The sun is yellow."},
            *asking(story(key)),
            {"role": "assistant", "content": "There and back again."},
            *asking(QUESTION),
        ]
        answer = api.chat.completions.create(model="demo", messages=messages, max_tokens=7)
        assert str(key) in str(answer.choices[0].message.content)
        assert answer.usage is not None
        assert answer.usage.prompt_tokens > 3 * library.model.config.context_limit
    # All in one message, whose end is the question; and without any roles.
    whole = f"{story(71432)}\n{QUESTION}"
    answer = api.chat.completions.create(model="demo", messages=asking(whole), max_tokens=7)
    assert "71432" in str(answer.choices[0].message.content)
    plain = api.completions.create(model="demo", prompt=whole, max_tokens=7)
    assert "71432" in plain.choices[0].text


def test_a_stop_is_no_part_of_the_answer(api: openai.OpenAI, library: Library) -> None:
    prompt = "The grass is green. The sky is"
    whole = library.plain(prompt, 12)
    stop = whole[4:7]
    expected = whole[: whole.index(stop)]
    settings = {"model": "demo", "messages": asking(prompt), "max_tokens": 12}
    answer = api.chat.completions.create(**settings, stop=[stop, "never said"])
    assert answer.choices[0].message.content == expected
    assert answer.choices[0].finish_reason == "stop"
    chunks = list(api.chat.completions.create(**settings, stop=stop, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected


@pytest.mark.slow
def test_samples_and_many_prompts(api: openai.OpenAI, library: Library) -> None:
    prompts = ["The grass is green. The", "The sky is blue. The"]
    settings = {"temperature": 1.5, "top_p": 0.9}
    answers = api.completions.create(
        model="demo", prompt=prompts, n=3, seed=5, max_tokens=9, **settings
    )
    assert [choice.index for choice in answers.choices] == list(range(6))
    expected = [
        library.plain(prompt, 9, seed=5 + index, **settings)
        for prompt in prompts
        for index in range(3)
    ]
    assert [choice.text for choice in answers.choices] == expected
    assert len(set(expected)) > 2
    chunks = api.completions.create(
        model="demo", prompt=prompts, n=3, seed=5, max_tokens=9, stream=True, **settings
    )
    heard = [""] * 6
    for chunk in chunks:
        heard[chunk.choices[0].index] += chunk.choices[0].text
    assert heard == expected
    ids = library.model.tokenizer(prompts, add_special_tokens=False)["input_ids"]
    ids = [[1, *own] for own in ids]
    by_ids = api.completions.create(model="demo", prompt=ids, max_tokens=9)
    by_text = api.completions.create(model="demo", prompt=prompts, max_tokens=9)
    assert [x.text for x in by_ids.choices] == [x.text for x in by_text.choices]


def test_logprobs_are_the_librarys(api: openai.OpenAI, library: Library) -> None:
    prompt = "The grass is green. The sky is"
    answer = api.chat.completions.create(
        model="demo", messages=asking(prompt), max_tokens=5, logprobs=True
    )
    told = answer.choices[0].logprobs
    assert told is not None
    assert told.content is not None
    ids = library.model.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    encoded = ht.encode(library.model, ids[:-1], None, ids[-1:], CONFIG)
    own = ht.generate(library.model, encoded, None, 5, logprobs=True)
    assert [one.logprob for one in told.content] == pytest.approx(own.logprobs, abs=1e-4)
    assert "".join(one.token for one in told.content) == own.text


@pytest.mark.slow
def test_a_document_is_asked_as_chat_does(url: str, api: openai.OpenAI, library: Library) -> None:
    text = story(52871)
    document = put(url, text, title="A story")
    assert document["tokens"] > 700
    assert document["kept_tokens"] <= 128
    asked = {"model": "demo", "max_tokens": 7, "extra_body": {"document": document["id"]}}
    answer = api.chat.completions.create(messages=asking(QUESTION), **asked)
    said = answer.choices[0].message.content
    assert "52871" in str(said)
    assert said == library.about(text, QUESTION, 7)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    # Once more, and as a conversation that goes on: what was read is there.
    again = api.chat.completions.create(messages=asking(QUESTION), **asked)
    assert again.choices[0].message.content == said
    assert again.usage is not None
    assert again.usage.prompt_tokens_details is not None
    assert again.usage.prompt_tokens_details.cached_tokens == again.usage.prompt_tokens
    turns = [*asking(QUESTION), {"role": "assistant", "content": said}, *asking("The sky is")]
    answer = api.chat.completions.create(messages=turns, **asked)
    later = library.about(text, QUESTION, 7, str(said), "\nThe sky is\n")
    assert answer.choices[0].message.content == later
    plain = api.completions.create(prompt=QUESTION, **asked)
    assert plain.choices[0].text == said
    told = httpx.get(f"{url}/v1/documents/{document['id']}").json()
    wait_for(lambda: len(_document(url, document["id"])["encodings"]) == 2)
    assert told["title"] == "A story"
    assert '"reuse": true' in told["note"]


@pytest.mark.slow
def test_reuse_asks_what_was_kept_when_the_text_came(
    url: str, api: openai.OpenAI, library: Library
) -> None:
    text = story(63027)
    document = put(url, text, suffix=QUESTION)
    encoded = ht.encode(library.model, text, suffix=f"\n{QUESTION}", config=CONFIG)
    for question in (QUESTION, "The grass is"):
        answer = api.chat.completions.create(
            model="demo",
            messages=asking(question),
            max_tokens=9,
            extra_body={"document": document["id"], "reuse": True},
        )
        own = ht.generate(library.model, encoded, f"\n{question}", 9)
        assert answer.choices[0].message.content == own.text
    assert len(_document(url, document["id"])["encodings"]) == 1


@torch.no_grad()
def test_a_conversation_that_outgrows_the_limit_is_compacted(library: Library) -> None:
    model = library.model
    encoded = ht.encode(model, story(90217), suffix=f"\n{QUESTION}", config=CONFIG)
    limit = model.config.context_limit
    for count, is_merged in ((limit - len(encoded) - 30, False), (limit, True)):
        prompt = torch.arange(count) % 90 + 3
        job = Job(encoded, prompt, (ht.Decoding(30),), print)
        question = with_room(model, job, encoded, CONFIG)
        assert question.context.next_position + len(question.prompt) + 30 <= limit
        assert (question.context is not encoded) == is_merged
        if is_merged:
            ids = question.context.token_ids[question.context.source_indices]
            assert ids[-32:].tolist() == prompt[-32:].tolist()
            assert ids[0] == 1
            assert len(question.context) <= 128


def _document(url: str, id_: str) -> dict:
    return httpx.get(f"{url}/v1/documents/{id_}").json()


def test_a_documents_life(url: str, api: openai.OpenAI) -> None:
    text = story(11223)
    answer = httpx.post(
        f"{url}/v1/documents?title=plain",
        content=b"\xef\xbb\xbf" + text.encode(),
        headers={"Content-Type": "text/plain; charset=utf-8"},
    )
    document = answer.json()
    assert document["characters"] == len(text)
    assert put(url, text)["id"] == document["id"]
    assert put(url, text, suffix=QUESTION)["id"] != document["id"]
    listed = httpx.get(f"{url}/v1/documents").json()["data"]
    assert [one for one in listed if one["id"] == document["id"]] == [document]
    key = document["encodings"][0]
    page = httpx.get(f"{url}/v1/documents/{document['id']}/kept/{key}")
    assert page.status_code == 200
    assert "What was kept" in page.text
    gone = httpx.delete(f"{url}/v1/documents/{document['id']}")
    assert gone.json() == {"id": document["id"], "object": "document", "deleted": True}
    for answer in (
        httpx.get(f"{url}/v1/documents/{document['id']}"),
        httpx.delete(f"{url}/v1/documents/{document['id']}"),
        httpx.get(f"{url}/v1/documents/{document['id']}/kept/{key}"),
    ):
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "document_not_found"
    with pytest.raises(openai.NotFoundError, match="There is no document"):
        api.chat.completions.create(
            model="demo", messages=asking("x"), extra_body={"document": document["id"]}
        )


def test_progress_while_a_text_is_read(url: str) -> None:
    with httpx.stream(
        "POST", f"{url}/v1/documents?stream=true", json={"text": story(33445)}, timeout=120
    ) as answer:
        events = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert events[-1] == "[DONE]"
    *nodes, document = map(json.loads, events[:-1])
    assert document["object"] == "document"
    levels = nodes[0]["levels"]
    assert len(levels) > 2
    assert levels[-1] == 1
    walked = [(node["height"], node["index"]) for node in nodes]
    assert sorted(walked) == [(h, i) for h, count in enumerate(levels) for i in range(count)]


def test_a_chat_template_is_followed(tmp_path: Path) -> None:
    model = ht.load(checkpoint(tmp_path / "model", eos_token_id=None), "cpu", ops="torch")
    assert model.tokenizer is not None
    model.tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}w10 {{ m.content }} w11 {% endfor %}"
        "{% if add_generation_prompt %}w12{% endif %}"
    )
    text = " ".join(f"w{3 + index * 7 % 80}" for index in range(90))
    with served(make_service(tmp_path / "documents", model, config=ht.HomerConfig(32))) as url:
        api = client(url)
        document = put(url, text)
        prefix, suffix = ht.chat_affixes(model.tokenizer, "w5 w6")
        encoded = ht.encode(model, text, prefix, suffix, ht.HomerConfig(32))
        first = ht.generate(model, encoded, None, 5)
        asked = {"model": "demo", "max_tokens": 5, "extra_body": {"document": document["id"]}}
        answer = api.chat.completions.create(messages=asking("w5 w6"), **asked)
        assert answer.choices[0].message.content == first.text
        turns = [*asking("w5 w6"), {"role": "assistant", "content": first.text}, *asking("w7")]
        answer = api.chat.completions.create(messages=turns, **asked)
        later = f"{first.text} w11 w10 w7 w11 w12"
        assert answer.choices[0].message.content == ht.generate(model, encoded, later, 5).text
        # Without a document: as the template has it, whole.
        answer = api.chat.completions.create(messages=turns, max_tokens=5, model="demo")
        whole = f"<s> w10 w5 w6 w11 w10 {first.text} w11 w10 w7 w11 w12"
        ids = model.tokenizer(whole, add_special_tokens=False)["input_ids"]
        plain = ht.HomerConfig(len(ids), len(ids))
        encoded = ht.encode(model, ids[:-1], [], ids[-1:], plain)
        assert answer.choices[0].message.content == ht.generate(model, encoded, None, 5).text
