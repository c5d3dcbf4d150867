#!/usr/bin/env python3
"""Writes tests/golden/tokenizer_cases.jsonl: small tokenizers with every part this project implements, texts that tell their
readings apart, and the ids Hugging Face tokenizers gives (made with tokenizers 0.23.3). Line 1 holds the models, each other line one
tokenizer. Run: python3 scripts/make_tokenizer_cases.py > tests/golden/tokenizer_cases.jsonl"""
import json

from tokenizers import Tokenizer


def byte_characters():
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = [b for b in range(256) if b not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(moved)}


BYTES = byte_characters()
BYTE_MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "o r", "Ġw or", "Ġwor l", "Ġworl d", "a a", "aa aa", "1 2", "12 3", "Ġ Ġ", "ä ½",
               "ä½ ł", "' s", "t h", "th e", "Ġ the", "Ċ Ċ"]
TEXT_MERGES = ["▁ h", "e l", "l o", "▁h el", "▁hel lo", "▁ ▁", "a a", "▁ w", "1 2", "t h", "th e"]


def model(tokens, merges, **options):
    merges = [m.split(" ") for m in merges]
    vocab = {t: i for i, t in enumerate(dict.fromkeys([*tokens, *("".join(m) for m in merges)]))}
    return {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False,
            "byte_fallback": False, "ignore_merges": False, "vocab": vocab, "merges": merges} | options


byte_tokens = [BYTES[b] for b in range(256)]
text_tokens = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), *"▁ehlowrdath12.,'é!AB"]
MODELS = {
    "bytes": model(byte_tokens, BYTE_MERGES),
    "bytes, ignore_merges": model([*byte_tokens, "hellothe", "aaa"], BYTE_MERGES, ignore_merges=True),
    "bytes, legacy merges": model(byte_tokens, BYTE_MERGES) | {"merges": ["#version: 0.2", *BYTE_MERGES]},
    "a few bytes": model([BYTES[b] for b in b"helo wrd"], ["h e", "l l"]),
    "a few bytes, unk": model(["?!", *(BYTES[b] for b in b"helo wrd")], ["h e", "l l"], unk_token="?!"),
    "text": model(text_tokens, TEXT_MERGES, unk_token="<unk>", fuse_unk=True, byte_fallback=True),
    "text, unk": model(text_tokens, TEXT_MERGES, unk_token="<unk>"),
    "text, fused unk": model(text_tokens, TEXT_MERGES, unk_token="<unk>", fuse_unk=True),
    "text, some bytes": model([t for t in text_tokens if t != "<0xE4>"], TEXT_MERGES, unk_token="<unk>", byte_fallback=True),
    "text, no unk": model(text_tokens, TEXT_MERGES),
}

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + REST
CASED = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"


def split(pattern, behavior="Isolated", invert=False, kind="Regex"):
    return {"type": "Split", "pattern": {kind: pattern}, "behavior": behavior, "invert": invert}


def byte_level(prefix=False, regex=False):
    return {"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": True, "use_regex": regex}


def pre(*steps):
    return {"type": "Sequence", "pretokenizers": [*steps]}


def norm(*steps):
    return {"type": "Sequence", "normalizers": [*steps]}


def metaspace(scheme, **more):
    return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": True} | more


def added(content, *flags):
    return {"content": content} | {f: f in flags for f in ("special", "normalized", "lstrip", "rstrip", "single_word")}


QWEN = pre(split(QWEN2), byte_level())
LLAMA = norm({"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"})
NFD, NFC = {"type": "NFD"}, {"type": "NFC"}
DIGITS = {"type": "Digits", "individual_digits": True}
RUNS = {"type": "Digits", "individual_digits": False}
CASES = [
    ("bytes", None, QWEN, [added("<|end|>", "special"), added("<|e|>", "special"), added("<|")],
     ["hello world", "hello  world\r\n\n", "hello<|end|>world<|e<|<|en", "it'S 'ſ 'K '\u212a", "123", "a\u180eb \u180e \u200b", "\x00 \x7f", "",
      " ", "\r", "\t\r\n x", "你好 \U0001f469\u200d\U0001f467", "hello\n\n\n  \n"]),
    ("bytes", NFC, QWEN, [], ["e\u0301 a\u0323\u0307 a\u0307\u0323", "\u1112\u1161\u11ab \uac00\u11a8 \u212b \ufb1d", "\U00011935\U00011930 \u1df6\u0323 x\u0301\u0323",
                              "\U00010d50\U0001e4d0 \U00031350 \u0897", "\u09c7\u09be \u0f71\u0f72\u0f74 \u0344", "<e\u0301>"]),
    ("bytes", {"type": "NFKC"}, QWEN, [], ["ﬁ ① \u32ff ｶﾞ", "\u00bd\u2003x \ufdfa"]),
    ("bytes", NFD, QWEN, [], ["é한 \U00011938 \u1e69"]),
    ("bytes", {"type": "NFKD"}, QWEN, [], ["ﬁé\u1e9b\u0323 \uff21"]),
    ("bytes", {"type": "Lowercase"}, QWEN, [added("Hello", "normalized"), added("</s>", "special", "normalized")], ["HELLO İ \u1c89 hello</S> ẞ", "hellohello"]),
    ("bytes", norm(NFD, {"type": "StripAccents"}), QWEN, [], ["éà \u1cf2\u1cf7 \u20dd \u0903"]),
    ("bytes", {"type": "Strip", "strip_left": True, "strip_right": True}, QWEN, [], ["\u3000 hello \n", "   ", " a\u200b "]),
    ("bytes", {"type": "Strip", "strip_left": False, "strip_right": True}, QWEN, [], [" hello \x85"]),
    ("bytes", {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "}, QWEN, [], ["a \n\t b", "\n"]),
    ("bytes", {"type": "Replace", "pattern": {"String": "l"}, "content": ""}, QWEN, [], ["hello", "lll"]),
    ("bytes", {"type": "ByteLevel"}, None, [], ["hello é"]),
    ("bytes", None, QWEN, [added("<m>", "lstrip"), added("<r>", "rstrip"), added("hello", "single_word")],
     ["a  <m>  b <r>  c", "hello othello hello_ (hello) hello\u0301 hello", "x \n<m><m>", "<r> <m>", "<r>  "]),
    ("bytes", None, QWEN, [added(" " * k, "normalized") for k in (2, 3, 4)], ["a  b", "a     b", "a         "]),
    ("bytes", None, byte_level(True, True), [], ["hello", "  hello", " the the", "\n"]),
    ("bytes", None, byte_level(False, True), [added("<s>", "special")], ["hello world's 12 123\n\n x", "<s>hello <s>"]),
    ("bytes", None, pre(DIGITS, byte_level(False, True)), [], ["12 123 ½² ٣ \U00011de0"]),
    ("bytes", None, pre(RUNS, byte_level(False, True)), [], ["12 123a ½²x"]),
    ("bytes", None, pre({"type": "Punctuation", "behavior": "Contiguous"}, byte_level(False, True), RUNS, split("[0-9][0-9][0-9]")), [],
     ["12345 ...a$+ é² 123", "\u2e52\u061d!a"]),
    ("bytes", None, pre(split(CASED + r"|" + CASED.replace("]*[\\p{Ll}", "]+[\\p{Ll}").replace("]+", "]*", 1) + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"),
                        byte_level()), [], ["HelloWorld aA \u01c5x/\n"]),
    ("bytes", None, pre(split(r"\p{N}{1,3}"), split("[一-龥\u3040-ゟ゠-ヿ]+"), split(r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"
                        r" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"), byte_level()), [], ["12312 你好hello。aa", ".hello  $x", "カタ2漢字"]),
    ("bytes", None, pre(split("[\r\n]"), split(r"\s?\p{L}+"), split(r"\s?\p{P}+"), split("[一-龥ࠀ-一가-퟿]+"), DIGITS, byte_level()), [], ["hello, 12\r\n 世界"]),
    *[("bytes", None, pre(split(r"1|\s", b, i), byte_level()), [], ["1 aa 12  aaa1", "11", "aaaa"])
      for b in ("Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous") for i in (False, True)],
    ("bytes", None, pre(split("a*", "MergedWithNext"), byte_level()), [], ["xaaay", "aaaa", "xy"]),
    ("bytes", None, pre(split("l", kind="String"), byte_level()), [], ["hello"]),
    ("bytes", None, pre(split("[a-z&&[^l]]+"), byte_level()), [], ["hello aaaa"]),
    ("bytes", None, pre(split(r"\p{N}{1,3}+|a{,2}|\h"), byte_level()), [], ["1212 123 aaaaa"]),
    ("bytes", None, pre(split(r"(?<=l)o|\b|$", "MergedWithPrevious"), byte_level()), [], ["hello the\nhello", "aa\u0301aa²aa"]),
    ("bytes", None, pre({"type": "Whitespace"}, byte_level()), [], ["hello, world! x_1 \u200c a\u200caa"]),
    ("bytes", None, pre({"type": "WhitespaceSplit"}, byte_level()), [], ["hello \u3000world"]),
    ("bytes", None, pre({"type": "CharDelimiterSplit", "delimiter": "l"}, byte_level()), [], ["hello world"]),
    ("bytes, ignore_merges", None, QWEN, [], ["aaa hello", "hell", "hellothe", "hellothex"]),
    ("bytes, legacy merges", None, QWEN, [], ["hello world 你"]),
    ("a few bytes", None, QWEN, [], ["hello, world", "hXell xl"]),
    ("a few bytes, unk", None, QWEN, [], ["hello, world", "hXYell"]),
    ("text", LLAMA, None, [added("<s>", "special")], ["hello hello  world", "<s>hello<s> a", "hello\né世A ▁ ▁", "a" * 61 + " hello", "▁▁▁ " * 9]),
    ("text", LLAMA, None, [added("<s>", "special", "normalized")], ["<s>hello", "x<s>", "x <s>"]),
    ("text, unk", LLAMA, None, [], ["世界 x hello qq"]),
    ("text, fused unk", None, metaspace("always"), [], ["世 x hello qq"]),
    ("text, some bytes", None, None, [], ["x世y丏 䀀é"]),
    ("text, no unk", None, None, [], ["x世hqq hel zz"]),
    ("text, no unk", LLAMA, None, [], ["a世 b 世界 h"]),
    ("text", None, metaspace("always"), [added("<s>", "special")], ["hello hello<s>hello <s> a"]),
    ("text", None, metaspace("first"), [added("<s>", "special")], ["hello hello<s>hello <s> a", "<s>hello", " hello"]),
    ("text", None, metaspace("never"), [], ["hello hello"]),
    ("text", None, metaspace("first", split=False), [], ["hello hello"]),
    ("text", {"type": "Strip", "strip_left": True, "strip_right": False}, metaspace("first"), [], ["hello", "  hello"]),
    ("text", {"type": "NFKC"}, pre({"type": "Punctuation"}, metaspace("first")), [], ["½a", "!a!", "…a"]),
    ("text", {"type": "Prepend", "prepend": "e!"}, pre({"type": "Punctuation"}, metaspace("first")), [], ["!a", "a!"]),
]

print(json.dumps({"models": MODELS}, ensure_ascii=False, separators=(",", ":")))
for name, normalizer, pre_tokenizer, tokens, texts in CASES:
    vocab = MODELS[name]["vocab"]
    new = [t["content"] for t in tokens if t["content"] not in vocab]
    for t in tokens:
        t["id"] = vocab[t["content"]] if t["content"] in vocab else len(vocab) + new.index(t["content"])
    case = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": tokens, "normalizer": normalizer, "pre_tokenizer": pre_tokenizer,
            "post_processor": None, "decoder": None}
    hf = Tokenizer.from_str(json.dumps(case | {"model": MODELS[name]}))
    ids = [hf.encode(t, add_special_tokens=False).ids for t in texts]
    print(json.dumps({"model": name, "tokenizer": case, "texts": texts, "ids": ids}, ensure_ascii=False, separators=(",", ":")))
