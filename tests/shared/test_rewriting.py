"""What of a model's answer is the rewrite, and what makes one useless. Answers are in the forms that models of many sizes give."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.rewriting import FAULTS, INSTRUCTION, clean, fault, kept, messages, repeats, takes_system

DOG = "A brown dog running on a wet beach at dusk, shot on film."


@pytest.mark.parametrize(
    ("answer", "removed"),
    [
        (DOG, ()),
        (f'  "{DOG}"\n', ("quotes",)),
        (f"\u201c{DOG}\u201d", ("quotes",)),
        (f"Sure! Here is the rewritten prompt:\n\n{DOG}", ("opening",)),
        (f"Sure, here's a more detailed version of your prompt: {DOG}", ("opening",)),
        (f"**Rewritten Prompt:** {DOG}", ("opening",)),
        (f"Prompt: **{DOG}**", ("opening", "markup")),
        (f"<think>\nThe user wants a dog.\n\n</think>\n\n{DOG}", ("thinking",)),
        (f"1. {DOG}\n2. A cat on a mat.\n3. A bird.", ("list",)),
        (f"Here are three prompts:\n\n- {DOG}\n- A cat.", ("opening", "list")),
        (f"```text\n{DOG}\n```", ("fence",)),
        (f"{DOG}\n\nNote: I added the dusk.", ("notes",)),
        (f"{DOG}\nI hope this helps!", ("notes",)),
        (f"{DOG}\n\nA second paragraph about something else.", ("paragraphs",)),
        (f"{DOG}<|im_end|>", ("marks",)),
        ("A brown dog running\non a wet beach at dusk,\n shot on film.", ()),
    ],
)
def test_the_rewrite_is_found_in_what_models_say(answer: str, removed: tuple[str, ...]) -> None:
    cleaned = clean(answer)
    assert cleaned.text == DOG and cleaned.removed == removed


@pytest.mark.parametrize("answer", ["", " \n", "...", "Sure!", "Prompt:", "<think>and so on, for ever", "```\n```", "<|im_end|>"])
def test_nothing_is_left_of_an_answer_that_says_nothing(answer: str) -> None:
    assert clean(answer).text == "" and fault("a dog", clean(answer).text) == "empty"


@pytest.mark.parametrize(
    "prompt",
    [
        "Great white shark, swimming",
        "This is a dog on a beach: the sun is low",
        '"SALE" and "OPEN" on two signs',
        "I added a dog to the beach",
        "\u6d77\u8fba\u306e\u72ac\u3001\u5915\u65b9",
        "\u0441\u043e\u0431\u0430\u043a\u0430 \u043d\u0430 \u043f\u043b\u044f\u0436\u0435",
        "\u0915\u0941\u0924\u094d\u0924\u093e \u0938\u092e\u0941\u0926\u094d\u0930 \u0924\u091f \u092a\u0930",
        "5 dogs, 3 cats",
    ],
)
def test_a_plain_rewrite_stays_as_it_is(prompt: str) -> None:
    assert clean(prompt).text == prompt and clean(prompt).removed == ()


def test_what_would_turn_a_terminal_is_removed() -> None:
    assert clean("a \x1b[31mred\u202e dog\x00").text == "a [31mred dog"


@pytest.mark.parametrize(
    ("prompt", "rewrite", "expected"),
    [
        ("a dog on a beach", DOG, None),
        ("a dog on a beach", "A photo of a red car.", "subject"),
        ("a dog on a beach", "Dogs, many of them.", None),
        ("slacks", "a photo of trousers", None),  # one word: a synonym cannot be told from another thing
        ("a dog on a beach", "A dog on a BEACH!", "same"),
        ("a dog", "", "empty"),
        ("a dog", "I'm sorry, I can't help with that.", "refusal"),
        ("a dog", "a dog dog dog dog", "repeats"),
        ("a dog", "a dog on a beach, " * 6, "repeats"),
        ("a dog", INSTRUCTION[20:120], "instruction"),
        ("a dog", "dog " + "wet sand and low light over the long shore " * 300, "too-long"),
        ("\u6d77\u8fba\u306e\u72ac", "\u5c71\u306e\u4e0a\u306e\u5bb6", "subject"),
        ("\u6d77\u8fba\u306e\u72ac", "a dog on a beach", None),  # a translation: words cannot tell
        ("\u6d77\u8fba\u306e\u72ac", "\u5915\u65b9\u306e\u6d77\u3068\u72ac", None),
        (
            "\u0441\u043e\u0431\u0430\u043a\u0430 \u043d\u0430 \u043f\u043b\u044f\u0436\u0435",
            "\u043a\u0440\u0430\u0441\u043d\u0430\u044f \u043c\u0430\u0448\u0438\u043d\u0430",
            "subject",
        ),
    ],
)
def test_faults(prompt: str, rewrite: str, expected: str | None) -> None:
    found = fault(prompt, rewrite, INSTRUCTION)
    assert found == expected and (found is None or found in FAULTS)


def test_kept_is_a_share_of_content_words() -> None:
    assert kept("a dog on a beach", DOG) == 1.0
    assert kept("two dogs, a cat and the cities", "the cat in a city") == pytest.approx(2 / 3)
    assert kept("a photo of the", DOG) is None and kept("\u6d77\u8fba", DOG) is None


def test_good_rewrites_do_not_count_as_repeating() -> None:
    assert not repeats(DOG) and not repeats("a red bag, a red coat, a red dress and a red boot on dark ground")
    assert not repeats(
        "\u5915\u65b9\u306e\u6d77\u8fba\u3092\u8d70\u308b\u8336\u8272\u3044\u72ac\u3001\u30d5\u30a3\u30eb\u30e0\u5199\u771f"
    )


def test_the_instruction_stands_where_the_template_takes_it() -> None:
    assert [m["role"] for m in messages("do", "a dog")] == ["system", "user"]
    assert messages("do", "a dog", system=False) == [{"role": "user", "content": "do\n\na dog"}]
    assert messages(" ", "a dog") == [{"role": "user", "content": "a dog"}]

    def refuses(chat: object) -> str:
        raise RuntimeError("System role not supported")

    assert takes_system(lambda chat: str(list(chat)))
    assert not takes_system(lambda chat: chat[-1]["content"]) and not takes_system(refuses)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=400))
def test_any_text_becomes_one_clean_line_and_stays_one(text: str) -> None:
    once = clean(text).text
    assert "\n" not in once and once == once.strip() and "\x1b" not in once
    fault("a dog", once, INSTRUCTION)


@pytest.mark.parametrize(
    "text",
    [
        "<think>" * 5000,
        "**a" * 10_000,
        '"' * 30_000,
        "Sure! " * 5000,
        "- \n" * 9000,
        "a" * 32_000,
        "here is " * 4000,
        "\u6d77" * 9000,
    ],
)
def test_hostile_answers_take_no_time(text: str) -> None:
    start = time.process_time()
    fault("a dog on a beach", clean(text).text, INSTRUCTION)
    assert time.process_time() - start < 1.0
