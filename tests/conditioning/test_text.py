"""Prompts: how each checkpoint cleans them, and what is said of those that it can't read."""

import logging
import random

import pytest
import torch
from diffusers import IFPipeline
from tiny import build_text_encoder, build_transformer, build_vq_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from llamagen_hf import AutoregressiveImagePipeline, LlamaGenConfig
from llamagen_hf.conditioning.text import clean_prompt, find_loss


CHINESE = "一个红色的苹果"
# Words, marks and markup that the rules of the released cleaning match, and others that they just miss.
FRAGMENTS = """
    a the Apple RED İstanbul straße наука х × x café Ã©clair naïve 🍎 👩\u200d🏫 <person> <b>bold</b> <a href="x">link
    </a> <br/> < > &lt;b&gt; &amp; &amp;amp;lt; &quot;quoted&quot; &quot &#65;bc &nbsp; &eacute; <!--c--> <script>s
    </script> http://a.example/b?c=d HTTPS:x https:///y www:abc www.example.com example.co.uk/path mail@example.com
    site.ru/ foo.organic a.com.b x.net/y-z @nick @ @a_b- 红 ㇀ ㊀ ㎏ ䷀ の カ \u3000 - -- – — ― ・ 〜 a-b-c-d-e
    a_b_c_d_e _x_ -x x- +x x+ :x x: : , ,x x, ; ' '' ''' " "" '"x"' 'x' "x" “x” ‘x’ `x´ «x» ¨ 10.0.0.1 1234.5.6.7
    4:30 4:300 \\n \\\\n #1 #123 #1234 #12345 #123abc 123456 12345 x123456 a.png photo.JPG .mp4 x.pdfs ..jpg . .. ...
    .x .hidden x.y 1.5 1,5 1/2 a/b a/ ® © ™ & º ½ ~ ( ) [x] {y} | \\ \\\\ / * *** §1 ¿que? ¡hola! jc6640 jc6640vc
    6640vc231 j2d1a2a3 a1 abcd123 abc1234567890123456 shipping free worldwide download downloads freedownload click
    for on here clicks png pngs jpeg image images page 12 pages 3x4 3.5x4 10×20 5х6 3x %20 %41 %zz + a+b+c %F0%9F%8D%8E
    \u200b \u00a0 \u2028 \x00 ﬁ Ａ Ⅷ ² ٣٤٥٦٧٨ ᾼ ＃ ＠ \u212a
""".split(" ")


def build_pipeline(cleaning: str, tokenizer=None) -> AutoregressiveImagePipeline:
    transformer = build_transformer(conditioning="text", condition_length=40, prompt_cleaning=cleaning)
    pipe = AutoregressiveImagePipeline(
        build_vq_model(), transformer, build_text_encoder(), tokenizer or ByT5Tokenizer()
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def warnings(caplog, monkeypatch):
    """The package's warnings, each said once in a test as it is said once in a process."""
    logging.Logger.warning_once.cache_clear()
    monkeypatch.setattr(logging.getLogger("llamagen_hf.llamagen.encoding"), "propagate", True)
    return lambda: [record.getMessage() for record in caplog.records if record.name == "llamagen_hf.llamagen.encoding"]


@pytest.mark.parametrize(
    "prompt",
    [CHINESE, "赤いりんご", "빨간 사과", "красное яблоко", "تفاحة حمراء", "می\u200cخواهم", "एक सेब", "🍎", "👩\u200d🏫",
     "❤️", "🏴\U000e0067\U000e0062\U000e007f", "A Red Apple!", "x_y-z", "click for more", "<b>"],
)  # fmt: skip
def test_unicode_cleaning_keeps_every_word(prompt):
    assert clean_prompt(prompt, "unicode") == prompt


@pytest.mark.parametrize(
    "prompt, cleaned",
    [
        ("  a \n red\t\u3000apple\u00a0", "a red apple"),
        ("cafe\u0301", "café"),
        ("Ａ　ｄｏｇ", "A dog"),
        ("“q” l’eau", '"q" l\'eau'),
        ("Ã©clair", "éclair"),
        ("a\x00b\u200bc\u202ed\ufeff", "abcd"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("\ud800", "\ufffd"),  # half a character, which no tokenizer takes
        ("\u200b\u200d\ufe0f", ""),
    ],
)
def test_unicode_cleaning_writes_each_text_in_one_way(prompt, cleaned):
    assert clean_prompt(prompt, "unicode") == cleaned


def test_released_cleaning_is_that_of_the_released_captions():
    assert clean_prompt("A RED  apple\nhttps://example.com/apple", "released") == "a red apple"
    assert clean_prompt(CHINESE, "released") == ""


@pytest.mark.filterwarnings("ignore::bs4.MarkupResemblesLocatorWarning")
def test_released_cleaning_equals_that_of_diffusers():
    rng, captions = random.Random(0), [*FRAGMENTS, "".join(FRAGMENTS), " ".join(FRAGMENTS)]
    for separators in ([" "], ["", " "], ["", " ", "-", "_", ". ", ": ", "\n", "\t ", "/", "&", "'"]):
        for _ in range(300):
            parts = rng.choices(FRAGMENTS, k=rng.randint(2, 12))
            captions.append("".join(part + rng.choice(separators) for part in parts))
    cleaned = set()
    for caption in captions:
        expected = IFPipeline._clean_caption(IFPipeline, IFPipeline._clean_caption(IFPipeline, caption))
        assert clean_prompt(caption, "released") == expected, repr(caption)
        cleaned.add(expected)
    assert len(cleaned) > 600


def test_cleaning_is_saved_with_the_checkpoint(tmp_path):
    for cleaning in ("unicode", "released"):
        build_pipeline(cleaning).save_pretrained(tmp_path / cleaning)
        pipe = AutoregressiveImagePipeline.from_pretrained(tmp_path / cleaning)
        assert pipe.transformer.config.prompt_cleaning == cleaning
        pipe.transformer.save_pretrained(tmp_path / "again")
        assert LlamaGenConfig.from_pretrained(tmp_path / "again").prompt_cleaning == cleaning


def test_checkpoints_from_before_the_choice_clean_by_the_released_rules():
    assert LlamaGenConfig(conditioning="text").prompt_cleaning == "unicode"
    saved = LlamaGenConfig(conditioning="text").to_dict()
    del saved["prompt_cleaning"]
    assert LlamaGenConfig.from_dict(saved).prompt_cleaning == "released"
    with pytest.raises(ValueError, match="`prompt_cleaning` is 'all'; expected 'unicode' or 'released'."):
        clean_prompt("a", "all")
    with pytest.raises(Exception, match="`prompt_cleaning` is 'all'"):
        LlamaGenConfig(prompt_cleaning="all")


def test_the_pipeline_cleans_as_its_checkpoint_says(warnings):
    states, masks = {}, {}
    for cleaning in ("unicode", "released"):
        pipe = build_pipeline(cleaning)
        states[cleaning], masks[cleaning] = pipe.encode_prompt([CHINESE, ""])
    assert masks["unicode"].sum(1).tolist() == [3 * len(CHINESE) + 1, 1]
    assert torch.equal(states["released"][0], states["released"][1])
    (message,) = warnings()  # of the one that is lost; the empty prompt is meant so
    assert message.startswith("This checkpoint can read nothing of the prompt") and CHINESE in message


def test_each_prompt_is_warned_of_once(warnings):
    pipe = build_pipeline("unicode")
    pipe([" \u200b", "a red apple"])
    pipe(" \u200b")
    assert len(warnings()) == 1


def test_a_prompt_that_is_cut_is_warned_of(warnings):
    build_pipeline("unicode").encode_prompt("x" * 39)  # and the end mark
    assert not warnings()
    build_pipeline("unicode").encode_prompt("x" * 35 + " apple")
    assert "leaves out its end: 'le'" in warnings()[0]


def test_a_prompt_of_unknown_words_is_warned_of(warnings):
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<pad>": 1, "apple": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<pad>")
    pipe = build_pipeline("unicode", tokenizer)
    pipe.encode_prompt(["红色 apple", "apple"])
    assert not warnings()
    pipe.encode_prompt(CHINESE)
    assert "can read nothing" in warnings()[0]


def test_the_shipped_checkpoint_says_that_it_can_not_read_chinese(warnings):
    pipe = AutoregressiveImagePipeline.from_pretrained()
    pipe.encode_prompt(["a red apple", "a dog, noto style", CHINESE])
    (message,) = warnings()
    assert CHINESE in message
    loss = find_loss(pipe.tokenizer, CHINESE, 20, pipe.transformer.config.prompt_cleaning)
    assert loss.is_total
