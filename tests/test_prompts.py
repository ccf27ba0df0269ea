import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_models import tiny_tokenizer
from tokenizers.processors import TemplateProcessing

from l2d_ray.config import PromptConfig
from l2d_ray.prompts import PromptEncoder, TokenArray, template_digest

TOKENIZER = tiny_tokenizer()
TEMPLATE = PromptConfig(suffix="Next:")


def encode(encoder: PromptEncoder, items: list[int]) -> TokenArray:
    """Return the prompt of a whole history."""
    (prompt,) = encoder.encode(np.array(items, np.int32), np.array([0]), np.array([len(items)]))
    return prompt


def phrase(titles: list[str], template: PromptConfig = TEMPLATE) -> str:
    """Return the prompt of a history of these titles, decoded."""
    encoder = PromptEncoder(template, TOKENIZER, titles)
    return str(TOKENIZER.decode(encode(encoder, list(range(len(titles))))))


def test_a_prompt_is_the_template_filled_in() -> None:
    expected = "The user watched or bought, in this order:\nAlien (1979)\nHeat\nNext:"
    assert phrase(["Alien (1979)", "Heat"]) == expected


@pytest.mark.parametrize("title", ["Next:\nNext:", "{title}", "a\n\nb\t", "", "映画 😀 é", "\x00 \u200b\ufeff"])
def test_a_title_may_contain_any_text(title: str) -> None:
    assert phrase([title, "b"]) == f"{TEMPLATE.prefix}{title}\nb\n{TEMPLATE.suffix}"


@settings(max_examples=40)
@given(st.lists(st.text(max_size=12), min_size=2, max_size=6), st.data())
def test_a_longer_history_extends_a_shorter_one_token_for_token(titles: list[str], data: st.DataObject) -> None:
    encoder = PromptEncoder(TEMPLATE, TOKENIZER, titles)
    items = data.draw(st.lists(st.integers(0, len(titles) - 1), min_size=2, max_size=10))
    suffix = len(TOKENIZER(TEMPLATE.suffix).input_ids)
    shorter, longer = encode(encoder, items[:-1]), encode(encoder, items)
    trunk = len(shorter) - suffix
    assert (longer[:trunk] == shorter[:trunk]).all()
    assert len(longer) > len(shorter)


def test_the_vocabulary_is_every_token_that_a_title_adds() -> None:
    encoder = PromptEncoder(TEMPLATE, TOKENIZER, ["Heat", "Alien (1979)", "Heat 2"])
    assert encoder.vocabulary().tolist() == sorted({int(token) for n in range(3) for token in encoder.item_tokens(n)})


def test_windows_are_slices_of_the_history() -> None:
    encoder = PromptEncoder(TEMPLATE, TOKENIZER, ["a", "b", "c"])
    items = np.array([2, 0, 1, 0], np.int32)
    windows = encoder.encode(items, np.array([0, 1, 4]), np.array([2, 4, 4]))
    for window, part in zip(windows, ([2, 0], [0, 1, 0], []), strict=True):
        assert (window == encode(encoder, part)).all()


@pytest.mark.parametrize("item", ["{title}\n", "The user took the thing that is called {title}, too.\n"])
def test_a_long_title_is_cut_but_its_form_is_not(item: str) -> None:
    template = PromptConfig(item=item, max_item_tokens=5, prefix="", suffix="")
    tokens = encode(PromptEncoder(template, TOKENIZER, ["x" * 10_000]), [0])
    before, after = item.split("{title}")
    assert TOKENIZER.decode(tokens) == f"{before}{'x' * 5}{after}"


def test_the_start_token_of_a_tokenizer_is_added_once() -> None:
    plain, starting = tiny_tokenizer(), tiny_tokenizer(adds_bos=True)
    prompts = [encode(PromptEncoder(TEMPLATE, tokenizer, ["a", "b"]), [0, 1]) for tokenizer in (plain, starting)]
    assert prompts[1].tolist() == [0, *prompts[0].tolist()]


def test_the_end_token_of_a_tokenizer_is_left_out() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokens = encode(PromptEncoder(TEMPLATE, tokenizer, ["a"]), [0])
    assert tokens.tolist() == [0, *encode(PromptEncoder(TEMPLATE, TOKENIZER, ["a"]), [0])]


def test_every_part_of_the_template_may_be_empty() -> None:
    template = PromptConfig(prefix="", item="{title}", suffix="")
    assert phrase(["ab", "c"], template) == "abc"
    assert encode(PromptEncoder(template, TOKENIZER, [""]), [0]).size == 0


def test_the_digest_covers_every_field_of_the_template() -> None:
    changes = [{"prefix": "p"}, {"item": "{title}"}, {"suffix": "s"}, {"max_item_tokens": 31}]
    digests = {template_digest(PromptConfig.model_validate(change)) for change in [{}, *changes]}
    assert len(digests) == 5
    assert template_digest(PromptConfig(prefix=TEMPLATE.prefix)) == template_digest(PromptConfig())


def test_special_tokens_in_a_title_are_plain_text() -> None:
    tokenizer = tiny_tokenizer()
    encoder = PromptEncoder(PromptConfig(prefix="<s>", suffix="</s>"), tokenizer, ["</s><s> Title"])
    prompt = encoder.encode(np.array([0], np.int32), np.array([0]), np.array([1]))[0].tolist()
    assert (prompt[0], prompt[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert not {tokenizer.bos_token_id, tokenizer.eos_token_id} & set(prompt[1:-1])
    assert tokenizer.decode(prompt[1:-1]) == "</s><s> Title\n"
