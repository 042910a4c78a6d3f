# SPDX-License-Identifier: Apache-2.0
"""Texts that a tokenizer may get wrong: many scripts, white space of all kinds, numbers, emoji, marks, code, special tokens."""
import random

WORDS = """the quick brown fox can't won't I'LL they've Hello WORLD iPhone camelCaseName snake_case_name HTTP2 x86_64 naïve café Straße ÅNGSTRÖM
Größe cœur mañana İstanbul ısı Ελλάδα λόγος Привет мир Україна שלום עולם مرحبا بالعالم نص سلام दुनिया नमस्ते বাংলা தமிழ் ไทยไม่มีช่องว่าง 你好世界 汉字漢字
日本語テキスト カタカナ ひらがな 한국어 조선말 ქართული հայերեն አማርኛ ភាសា မြန်မာ བོད་ཡིག ᠮᠣᠩᠭᠣᠯ Yorùbá Ọ̀rọ̀ Tiếng Việt ʻOkina Kiswahili isiZulu ߒߞߏ 𞤀𞤣𞤤𞤢𞤥 𐌲𐌿𐍄
fi ﬁ Ⅷ ½ ² ㎏ ｆｕｌｌ ﾊﾝｶｸ ℵ ∑ ∞ √2 e\u0301 o\u0308 a\u0323\u0302 n\u0303 Z\u0351\u036b""".split()
PIECES = ["0", "7", "42", "123", "1234567", "3.14159", "1,000,000", "1e-10", "0x1F", "٣٤٥", "१२३", "2026-01-31", "12:30", "v1.2.3", "100%", "$5.00", "№5",
          ".", ",", "...", "!!!", "?!", "--", "---", "'", "\"", "''", "``", "(", ")", "[[", "]]", "{", "};", "->", "=>", "!=", "<=", "&&", "||", "//", "/*", "*/",
          "#", "##", "@user", "https://example.org/a?b=c&d=%20e#f", "a@b.co", "<b>", "</b>", "\\n", "\\", "~", "^", "_", "__init__", "“", "”", "«", "»", "—", "…", "、", "。", "！", "؟", "।",
          "\U0001F600", "\U0001F468\u200D\U0001F469\u200D\U0001F467", "\U0001F1E9\U0001F1EA", "\U0001F44D\U0001F3FD", "\u2764\uFE0F", "\u200d", "\u200b", "\ufeff", "\u00ad",
          "'s", "'S", "'re", "'VE", "'m", "'ll", "'d", "'t", "'x", "’s", "def f(x):", "    return x", "\tif (a) {", "}", "\x00", "\x07", "\x1b[0m", "\x7f", "\x85", "\ufffd", "\ue000", "\U000f0000"]
SPACES = [" ", " ", " ", " ", "  ", "   ", "     ", "\n", "\n\n", "\n\n\n", "\r\n", "\r\n\r\n", "\t", "\t\t", " \n", "\n ", " \t ", "\u00a0", "\u3000", "\u2003", "\u2028", "\u2029", "\x0b", "\x0c", ""]


def varied_texts(count, seed, special=()):
    """`count` texts, the same for the same seed. special: tokens to strew in."""
    rng = random.Random(seed)
    fixed = ["", " ", "  ", "\n", "\t", "a", " a", "a ", " a ", "\u2581", "\u2581a", "a\u2581b", "Hello, world!", "\u0120a", "ĠĠ", "<0x0A>", "x" * 300, " " * 40 + "x", "ab" * 150, "1" * 50,
             "\n" * 30, "à" * 60, "😀" * 20, "".join(map(chr, range(1, 128))), "".join(map(chr, range(0xA0, 0x180)))]
    texts = fixed + list(special) + [f" {token} x{token}{token}  y" for token in special]
    while len(texts) < count:
        text = ""
        for _ in range(rng.choice([1, 2, 3, 5, 8, 13])):
            kind = rng.random()
            if special and kind < 0.06:
                text += rng.choice(special)
            elif kind < 0.55:
                text += rng.choice(WORDS)
            elif kind < 0.85:
                text += rng.choice(PIECES)
            elif kind < 0.93:
                text += "".join(chr(rng.randrange(32, 0x2FF)) for _ in range(rng.randrange(1, 9)))
            else:
                code = rng.choice([rng.randrange(0x300, 0xD800), rng.randrange(0xE000, 0x10000), rng.randrange(0x10000, 0x20000)])
                text += chr(code)
            text += rng.choice(SPACES)
        texts.append(text)
    return texts[:count]
