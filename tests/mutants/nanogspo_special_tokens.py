"""Wrong edits of nanogspo/special_tokens.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "nanogspo/special_tokens.py"
MUTANTS = {
    "tests/test_tokenizer.py": [
        ("lost = added_tokens.keys() - owners.values() | {", "lost = {", "two added tokens with one id get two"),
        (
            "if n in present and t not in known}",
            "if False}",
            "an added token with the id of tokenizer.json's gets another",
        ),
        (
            "config if decoder is not None else config | special_tokens_map",
            "config | special_tokens_map",
            "special_tokens_map.json counts in new repos",
        ),
        (
            "for _, token in sorted(listed.items()) if repr",
            "for token in listed.values() if repr",
            "added tokens get each other's ids",
        ),
        ("if repr(token) not in same]", "if token.content not in known]", "other flags of a known token do not count"),
        (
            "_added(text, special=text in special, normalized=text not in special)",
            "_added(text)",
            "special tokens of an old repo are decoded",
        ),
        (
            "backend.add_tokens(new + [token for token in [*named.values(), *extra] if token.content not in known])",
            "backend.add_tokens(new)",
            "a named token that tokenizer.json lacks is cut into letters",
        ),
        (
            "        named, extra = named | extra, []\n",
            "        extra = []\n",
            "tokens that only multimodal models name are cut into letters",
        ),
        (
            "    except UnicodeEncodeError as error:",
            "    except KeyError as error:",
            "half a character in a token is Rust's own error",
        ),
        ("need(spec, flag, bool, where=name)", "spec[flag]", "a flag that is no boolean is a traceback"),
        ("if backend.token_to_id(token.content) != number:", "if False:", "files of two models are taken for one"),
    ],
}
