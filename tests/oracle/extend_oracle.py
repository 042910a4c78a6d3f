# SPDX-License-Identifier: Apache-2.0
"""Folders with new tokens, loaded by transformers: ids and decoding as its own add_tokens gives them, old rows unchanged, new rows
the means of their pieces, the same logits on old text. Live only: SmolLM2-135M from GGUF, and a tiny untied llama in bf16.
"""
import pathlib
import tempfile
import warnings

import oracle


warnings.simplefilter("ignore")
SEED = 31
TOKENS = ["Київ", "перекладання", "\u0141ódź-ish", "<note>", "New York", " leading edge", "emoji🙂🙃", "𝔘𝔫𝔦"]
SPECIAL = ["<|tool_result|>", "<|Київ|>"]
OLD_TEXTS = ["The quick brown fox, 12 x 34 = 408.", "def f(x):\n    return x ** 2  # naïve", "Привіт, світе", "<|im_start|>user\nhello<|im_end|>", "new york Leading note"]
NEW_TEXTS = ["Київ і перекладання у New York", "a<note>b <|tool_result|> leading edge, emoji🙂🙃!", "КИЇВ київ Київ\nКиїв", "𝔘𝔫𝔦 \u0141ódź-ish <|Київ|>"]


def check(alambic, scratch, name, base, special, tokens, pad):
    import torch
    import transformers
    extended, file = scratch / f"{name}.extended", scratch / f"{name}.txt"
    file.write_text("\n".join(tokens) + "\n", encoding="utf-8")
    report = oracle.run_json(alambic, "extend", base, extended, "--tokens", file, "--pad-to-multiple", pad, *(["--special"] if special else []))
    before, after = transformers.AutoTokenizer.from_pretrained(base), transformers.AutoTokenizer.from_pretrained(extended)
    theirs = transformers.AutoTokenizer.from_pretrained(base)
    added = theirs.add_tokens([transformers.AddedToken(token, special=special, normalized=not special) for token in tokens])
    assert added == len(tokens)
    for token, told in zip(tokens, report["tokens"]):
        assert theirs.convert_tokens_to_ids(token) == told["id"] == after.convert_tokens_to_ids(token), token
        assert before.encode(token, add_special_tokens=False) == told["pieces"], token
    assert len(after) == len(theirs)
    used = 0
    for text in OLD_TEXTS + NEW_TEXTS:
        ids = theirs.encode(text)
        assert after.encode(text) == ids, text
        used += sum(i >= len(before) for i in ids)
        for skip in (False, True):
            assert after.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip), text
    assert used > 3, "the texts hold no new token"
    for text in OLD_TEXTS:
        assert after.encode(text) == before.encode(text), text

    load = lambda folder: transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)  # noqa: E731
    (old, _), (new, told) = load(base), load(extended)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not told.get(kind), f"{kind}: {told[kind]}"
    assert new.config.vocab_size == report["rows"] and report["rows"] % pad == 0
    assert new.config.tie_word_embeddings == report["head_tied"]
    for theirs_of in (lambda m: m.get_input_embeddings().weight, lambda m: m.get_output_embeddings().weight):
        table, grown = theirs_of(old).detach(), theirs_of(new).detach()
        assert table.dtype == grown.dtype and len(grown) == report["rows"]
        assert grown[:len(before)].equal(table[:len(before)]), "old rows changed"
        for token in report["tokens"]:
            mean = table[token["pieces"]].float().mean(0)
            oracle.assert_close(grown[token["id"]].float(), mean.to(table.dtype).float(), 0, 1e-6, token["text"])
    old_state, new_state = old.state_dict(), new.state_dict()
    for key, value in old_state.items():
        if key not in ("model.embed_tokens.weight", "lm_head.weight"):
            assert value.equal(new_state[key]), key
    for text in OLD_TEXTS:
        ids = torch.tensor([before.encode(text)])
        with torch.no_grad():
            expected, got = old.float()(input_ids=ids).logits[0], new.float()(input_ids=ids).logits[0]
        oracle.assert_close(got[:, :len(before)], expected[:, :len(before)], 0, 2e-6 * float(expected.abs().max()), f"logits of {text!r}")
    text = NEW_TEXTS[0]
    ids = after.encode(text)
    with torch.no_grad():
        logits = new.float()(input_ids=torch.tensor([ids])).logits[0]
    expected = torch.log_softmax(logits[:-1].double(), -1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
    told = oracle.run_json(alambic, "score", "--model", extended, "--text", text, "--compute", "f32")
    assert told["ids"] == ids
    oracle.assert_close(told["logprobs"], expected, 1e-4, 1e-4, f"alambic score on {name}")
    print(f"{name}: {len(tokens)} tokens, rows {report['rows_before']} -> {report['rows']}, as transformers has them")


def live(alambic):
    import torch
    import transformers
    with tempfile.TemporaryDirectory() as folder:
        scratch = pathlib.Path(folder)
        smollm2, tiny = scratch / "smollm2", scratch / "tiny"
        oracle.run(alambic, "import", oracle.smollm2(), smollm2)
        check(alambic, scratch, "smollm2", smollm2, False, TOKENS, 64)
        torch.manual_seed(SEED)
        transformers.LlamaForCausalLM(transformers.LlamaConfig(
            vocab_size=49200, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=64, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False)).to(torch.bfloat16).save_pretrained(tiny)
        transformers.AutoTokenizer.from_pretrained(smollm2).save_pretrained(tiny)
        check(alambic, scratch, "tiny", tiny, True, SPECIAL + TOKENS[:6], 1)


if __name__ == "__main__":
    oracle.main(live=live)
