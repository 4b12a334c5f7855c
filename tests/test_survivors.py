"""The kept tokens as text: whole units, in order, marked gaps, within the target."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from text_tokenizers import TOKENIZERS, byte_level
from transformers import PreTrainedTokenizerBase

import homer_triton as ht
from homer_triton.demo import CHECKPOINT
from homer_triton.text.pieces import locate
from homer_triton.text.survivors import surviving_text

BYTES = byte_level()
BROKEN = "\N{REPLACEMENT CHARACTER}"
ENOUGH = 10_000
SENTENCES = (
    'It began well. "Who goes there?" asked the king. About 3.5 miles, approx. nine km!\n'
    "It went on\nfor years.\n\nCHAPTER II\n\n終わり。次の文。"
)

# Texts of what may go wrong: words, blanks, line breaks, marks, unspaced scripts, many bytes.
texts = st.lists(
    st.sampled_from(
        [
            *(
                "the ",
                "king",
                "castle ",
                "unspeakable ",
                "Told ",
                "né ",
                "🙂",
                "👩\u200d👧 ",
                "ไทย",
            ),
            *("🙂", "漢字", "の城。", "か\u3099", "e\u0301 ", "— ", "\u00a0", "\ufffd"),
            *(" ", "\n", "\n\n", "\r\n", ". ", "! "),
        ]
    ),
    min_size=1,
    max_size=40,
).map("".join)


@st.composite
def cases(draw: st.DrawFn) -> tuple[PreTrainedTokenizerBase, str, list[int], list[bool]]:
    """A tokenizer, a text, its tokens, and which of them are kept."""
    tokenizer = TOKENIZERS[draw(st.sampled_from(list(TOKENIZERS)))]
    text = draw(texts)
    ids = ids_of(tokenizer, text)
    kept = draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
    return tokenizer, text, ids, kept


def ids_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def keeping(text: str, parts: Sequence[str], target_len: int = ENOUGH, **options: Any) -> str:
    """What survives of a text of whose tokens those are kept that end these parts of it."""
    tokenizer = options.pop("tokenizer", BYTES)
    ids = ids_of(tokenizer, text)
    _, spans = locate(tokenizer, ids)
    kept = [False] * len(ids)
    place = 0
    for part in parts:
        place = text.index(part, place) + len(part)
        kept[next(i for i, (start, stop) in enumerate(spans) if start < place <= stop)] = True
    return surviving_text(tokenizer, ids, kept, target_len, **options)


def test_words_are_whole_and_gaps_are_marked() -> None:
    text = "An unspeakable, well-known castle (1871) stood there, it's told."
    assert keeping(text, ["unspe", "kno", "1871", "it"]) == (
        "unspeakable, well-known … (1871) … it's"
    )


def test_neighbours_have_no_gap_though_the_tokens_between_are_gone() -> None:
    assert keeping("unspeakable   castles\n\n\there", ["un", "cas", "her"]) == (
        "unspeakable   castles\n\n\there"
    )


def test_sentences_are_whole() -> None:
    for whole in (
        "It began well.",
        '"Who goes there?" asked the king.',
        "About 3.5 miles, approx. nine km!",
        "It went on\nfor years.",
        "CHAPTER II",
        "終わり。",
        "次の文。",
    ):
        last = re.findall(r"\w+", whole)[-1]
        assert keeping(SENTENCES, [last], unit="sentence") == whole


def test_tokens_are_as_they_are_to_whole_characters() -> None:
    ids = ids_of(BYTES, "ab 🙂 cd")
    assert len(ids) == 10
    kept = [index in (1, 5, 9) for index in range(10)]
    assert surviving_text(BYTES, ids, kept, ENOUGH, "token") == "b … 🙂 … d"
    assert surviving_text(BYTES, ids, kept, ENOUGH, "token", "") == "b 🙂 d"
    assert surviving_text(BYTES, ids, kept, ENOUGH, "word") == "ab 🙂 cd"


def test_text_without_spaces_is_cut_at_tokens_and_whole_characters() -> None:
    text = "見よ、古い城の門を。"
    ids = ids_of(BYTES, text)
    _, spans = locate(BYTES, ids)
    for index, (start, stop) in enumerate(spans):
        kept = [i == index for i in range(len(ids))]
        left = surviving_text(BYTES, ids, kept, ENOUGH)
        assert text[start:stop] in left
        assert left in text
        assert len(left) <= 3
    assert keeping(text, ["見", "城", "門"], gap="") == "見城門"
    assert keeping("Llama模型 runs", ["ama", "run"]) == "Llama … runs"
    assert keeping("か\u3099城", ["か"]) == "か\u3099"


@pytest.mark.parametrize(
    ("between", "gap", "mark"),
    [
        (" old ", " … ", " … "),
        ("\nold ", " … ", " …\n"),
        (" old\n", " [...] ", " [...]\n"),
        (" old\nand\nnew ", " … ", " …\n"),
        (" old\n \t\nnew ", " … ", " …\n\n"),
        (" old\r\n\r\nnew ", " … ", " …\n\n"),
        (" old\nnew ", " …\n\n", " …\n\n"),
        (" old ", "", " "),
        (" old\nnew ", "", "\n"),
        (" old\n\nnew ", "\n", "\n\n"),
        (" old ", "[...]", "[...]"),
    ],
)
@pytest.mark.parametrize("unit", ["token", "word"])
def test_a_line_break_in_a_gap_stays(between: str, gap: str, mark: str, unit: Any) -> None:
    ids = ids_of(BYTES, f"a{between}b")
    kept = [True, *[False] * (len(ids) - 2), True]
    if BYTES.convert_ids_to_tokens(ids)[-1] != "b" and unit == "token":
        mark = mark.rstrip(" ") + " "
    assert surviving_text(BYTES, ids, kept, ENOUGH, unit, gap) == f"a{mark}b"


@given(case=cases(), unit=st.sampled_from(["token", "word", "sentence"]))
def test_all_kept_is_the_text_itself(case: Any, unit: Any) -> None:
    tokenizer, text, ids, _ = case
    whole = text if text.strip() or unit == "token" else ""
    assert surviving_text(tokenizer, ids, [True] * len(ids), len(ids), unit) == whole


@given(case=cases(), unit=st.sampled_from(["token", "word", "sentence"]), data=st.data())
def test_what_survives_is_whole_in_order_and_fits(
    case: Any, unit: Any, data: st.DataObject
) -> None:
    tokenizer, text, ids, kept = case
    target = data.draw(st.integers(1, 2 * len(ids)))
    try:
        left = surviving_text(tokenizer, ids, kept, target, unit, "|")
    except ValueError:
        full = surviving_text(tokenizer, ids, kept, ENOUGH, unit, "|")
        assert len(ids_of(tokenizer, full)) > target
        return
    assert len(ids_of(tokenizer, left)) <= target
    assert BROKEN not in left or BROKEN in text
    pieces = re.split(r"\|\s*", left)
    assert all(piece.strip() for piece in pieces) or len(pieces) == 1
    place = 0
    for order, piece in enumerate(pieces):
        # In their order, and at a mark at least one character further on.
        found = text.find(piece, place + (order > 0))
        assert found >= 0
        place = found + len(piece)
    if unit == "word":
        spaced = [piece for piece in pieces if piece.isascii() and piece]
        words = re.split(r"\s+", text)
        assert all(any(part in word for word in words) for p in spaced for part in p.split())


@given(case=cases())
def test_every_kept_token_survives_where_there_is_room(case: Any) -> None:
    tokenizer, text, ids, kept = case
    _, spans = locate(tokenizer, ids)
    for unit in ("token", "word", "sentence"):
        left = surviving_text(tokenizer, ids, kept, ENOUGH, unit, "")
        letters = re.sub(r"\s", "", left)
        for (start, stop), stays in zip(spans, kept, strict=True):
            if stays:
                assert re.sub(r"\s", "", text[start:stop]) in letters
        if not any(kept):
            assert left == ""


def test_the_smallest_share_is_left_out_first() -> None:
    text = "a unspeakable b castellated c"
    ids = ids_of(BYTES, text)
    _, spans = locate(BYTES, ids)
    for weak in ("unspeakable", "castellated"):
        place = text.index(weak) + len(weak)
        kept = [stop != place for _, stop in spans]
        assert surviving_text(BYTES, ids, kept, ENOUGH) == text
        left = surviving_text(BYTES, ids, kept, len(ids) - 1)
        assert left == text.replace(f" {weak} ", " … ")


def test_of_equal_shares_the_piece_with_fewest_kept_tokens_goes_first() -> None:
    words = ["a", "b", "c", "d", "e", "f", "g", "h"]
    text = " ".join(words)
    one_less = len(ids_of(BYTES, "a b … e … g h")) - 1
    assert keeping(text, ["a", "b", "e", "g", "h"]) == "a b … e … g h"
    assert keeping(text, ["a", "b", "e", "g", "h"], one_less) == "a b … g h"


def test_equal_pieces_go_by_turns_from_all_over_the_text() -> None:
    text = " ".join("abcdefghijklmnopqrstuvwx")
    letters = "acegikmoqsuw"
    full = keeping(text, letters)
    assert full == " … ".join(letters)
    left = keeping(text, letters, len(ids_of(BYTES, full)) // 2)
    assert left == keeping(text, letters, len(ids_of(BYTES, full)) // 2)
    places = [letters.index(letter) for letter in left.split(" … ")]
    assert {place // 4 for place in places} == {0, 1, 2}
    assert len(places) >= 5


def test_a_piece_goes_from_its_end() -> None:
    text = " ".join("abcdefgh")
    ids = ids_of(BYTES, text)
    assert surviving_text(BYTES, ids, [True] * len(ids), len(ids) - 4) == "a b c d e f"


def test_a_smaller_unit_takes_the_room_that_a_larger_one_leaves() -> None:
    large, small = "Unspeakable castellated kings told there.", "So then."
    ids = ids_of(BYTES, f"{large} {small}")
    kept = [True] * len(ids)
    kept[-1] = False
    room = len(ids_of(BYTES, large)) - 1
    assert surviving_text(BYTES, ids, kept, room, "sentence") == small
    assert surviving_text(BYTES, ids, kept, room + 1, "sentence") == large


def test_all_of_it_is_tried_before_less_with_a_long_mark() -> None:
    text = "a unspeakable b"
    ids = ids_of(BYTES, text)
    kept = [index != 3 for index in range(len(ids))]
    assert surviving_text(BYTES, ids, kept, len(ids), gap=" [left out for want of room] ") == text


def test_a_target_below_a_single_unit_is_refused() -> None:
    for unit in ("word", "sentence"):
        with pytest.raises(ValueError, match=f"target_len=1 has no room for a single {unit}"):
            keeping("unspeakable castellated", ["cas"], 1, unit=unit)


def test_settings_out_of_range_are_refused() -> None:
    refused: list[tuple[Callable[[], str], str]] = [
        (lambda: keeping("a b", ["a"], unit="line"), "unit='line' is not known"),
        (lambda: keeping("a b", ["a"], 0), "target_len=0 must be at least 1"),
        (lambda: surviving_text(BYTES, [1, 2], [True], 5), "1 fates do not fit 2 tokens"),
    ]
    for call, message in refused:
        with pytest.raises(ValueError, match=message):
            call()


STORY = "The grass is green.\nThe sky is blue. " * 40
QUESTION = "What is the pass key? The pass key is"


@pytest.fixture(scope="module")
def model() -> ht.Llama:
    return ht.load(CHECKPOINT, "cpu", "float32")


def test_an_encodings_context_as_text(model: ht.Llama) -> None:
    story = STORY + "The pass key is 71432. Remember it. 71432 is the pass key. " + STORY
    config = ht.HomerConfig(128, 64, 1)
    encoded = ht.encode(model, story, suffix=QUESTION, config=config)
    left = encoded.text(model.tokenizer, source=story)
    assert "71432" in left
    assert "What" not in left
    assert len(ids_of(model.tokenizer, left)) <= 64
    assert "71432" in encoded.text(model.tokenizer, 20)
    assert encoded.text(model.tokenizer, source=story, unit="token", gap="") != left
    sentences = encoded.text(model.tokenizer, unit="sentence")
    assert all(piece.endswith(".") for piece in re.split(r" …\s*", sentences))


def test_a_text_encoded_without_a_question_ends_in_its_own_suffix(model: ht.Llama) -> None:
    config = ht.HomerConfig(128, 64, 1)
    encoded = ht.encode(model, STORY, config=config)
    whole = encoded.text(model.tokenizer, ENOUGH, with_suffix=True, source=STORY)
    alone = encoded.text(model.tokenizer, ENOUGH, source=STORY)
    assert whole.startswith(alone.rstrip())
    assert whole.endswith("The grass is green.\nThe sky is blue. ")
    assert len(whole) > len(alone)
    bare = encoded.text(model.tokenizer, ENOUGH, with_suffix=True)
    assert bare.split() == whole.split()


def test_a_short_text_comes_back_as_it_was(model: ht.Llama) -> None:
    encoded = ht.encode(model, STORY[:150], suffix=QUESTION)
    assert encoded.text(model.tokenizer, source=STORY[:150]) == STORY[:150]
    with pytest.raises(ValueError, match="source is not the text"):
        encoded.text(model.tokenizer, source=STORY)
