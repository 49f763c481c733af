"""The tokenizer that is trained on a synthetic world."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxconv.data import tokenizer as own

WORDS = ["I want 3 books and you get 2 hats.", "No, I want 4 books.", "Deal."] * 5


@pytest.fixture(scope="module")
def tokenizer():
    return own.train_tokenizer(WORDS, 300)


def test_the_markup_comes_first_and_the_bytes_after(tokenizer):
    ids = tokenizer.convert_tokens_to_ids([own.PAD, own.END, own.SYSTEM, own.USER, own.ASSISTANT])
    assert ids == [0, 1, 2, 3, 4]
    assert tokenizer.pad_token_id == 0 and tokenizer.eos_token_id == 1
    assert tokenizer.encode(own.END) == [1]


@pytest.mark.parametrize(("wanted", "got"), [(261, 261), (275, 275), (10**6, 290)])
def test_the_vocabulary_is_no_larger_than_wanted_or_needed(wanted, got):
    assert len(own.train_tokenizer(WORDS, wanted)) == got


def test_common_words_are_few_tokens(tokenizer):
    assert len(tokenizer.encode(WORDS[0])) < len(WORDS[0]) / 2


@given(st.text())
def test_any_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text


def test_training_is_deterministic():
    first, second = (own.train_tokenizer(WORDS, 300).get_vocab() for _ in range(2))
    assert first == second


def test_it_is_saved_with_its_template(tokenizer, tmp_path):
    import transformers

    tokenizer.save_pretrained(tmp_path)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.chat_template == own.CHAT_TEMPLATE
    assert loaded.encode(WORDS[1]) == tokenizer.encode(WORDS[1])
    assert loaded.eos_token_id == 1
