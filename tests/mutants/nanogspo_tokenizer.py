"""Wrong edits of nanogspo/tokenizer.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "nanogspo/tokenizer.py"
MUTANTS = {
    "tests/test_planner.py": [
        ("ByteLevel(add_prefix_space=False, use_regex=False)", "ByteLevel()", "a space more than the prompt has"),
        ('["<|im_start|>", "<|im_end|>"])', "[])", "a mark of ChatML counts as twelve tokens"),
    ],
    "tests/test_tokenizer.py": [
        ('if lost and config.get("tokenizer_class") is None:', "if False:", "a template's bos_token is nothing"),
        (
            'if lost and config.get("tokenizer_class") is None:',
            "if lost:",
            "a token that no file names is an error",
        ),
        ("            os.dup2(null.fileno(), 2)\n", "            pass\n", "a panic prints its own lines"),
        ("        os.dup2(kept, 2)\n", "", "stderr is gone for good"),
        (
            "loss_mask += [True] * produced + [False] * (len(answer) - produced)",
            "loss_mask += [True] * (produced - 1) + [False] * (len(answer) - produced + 1)",
            "the turn end is not learnt",
        ),
        (
            "if not self._prefixed or not text:",
            "if True:",
            "answers learn to begin with a space that no text has there",
        ),
        (
            "if encoding.ids[:start] == given and all(end <= 1 for _, end in encoding.offsets[:start]):",
            "if True:",
            "half of a token that joins an answer to its anchor is lost",
        ),
        (
            "tokenizer.encode_continuation(after",
            "tokenizer.encode_plain(after",
            "an answer is encoded as a text's beginning",
        ),
        (
            "if self.rows and ids and max(ids) >= self.rows:",
            "if False:",
            "a token without a row of the embedding is a traceback",
        ),
        ("if ids.get(token) != number]", "if False]", "a vocab.json with other ids is ignored in silence"),
        (
            "if lost or (rows > 1000 and size < 0.9 * rows):",
            "if lost:",
            "another model's tokenizer is taken in silence",
        ),
        (
            'self._backend.encode_special_tokens = config.get("split_special_tokens") is True',
            "self._backend.encode_special_tokens = False",
            "split_special_tokens is ignored",
        ),
        (
            "        except BaseException as error:",
            "        except Exception as error:",
            "a panic in Rust is a traceback",
        ),
        ("        if type(i) is not int or i >= 2**31:", "        if False:", "ids of another type are a traceback"),
        ("functools.partial(need, kind=dict,", "functools.partial(need, kind=list,", "text_config is not read"),
    ],
    "tests/test_forms.py": [
        ("self._reads_parts and (len", "(len", "Python's own spelling of a list for a prompt"),
        ("and not any(f", "and any(f", "parts joined where the template prints each trimmed"),
        ('or message.get("role") != "system"', "or True", "all but the first part of a system turn lost"),
    ],
}
