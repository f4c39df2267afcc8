"""Tokens that a checkpoint defines beside tokenizer.json, added in the order and under the conditions of transformers.

    tokenizer_config.json      added_tokens_decoder: id -> token; and names: bos_token, eos_token, image_token, …
    special_tokens_map.json    more names   } read in old repos only, those whose tokenizer_config.json
    added_tokens.json          text -> id   } has no added_tokens_decoder

A token is its text, or an object with its text under "content" and flags. Source: transformers 5
`PreTrainedTokenizerBase._from_pretrained` and `TokenizersBackend.__init__`.      Tests: tests/test_tokenizer.py
"""

from tokenizers import AddedToken, Tokenizer

from nanogspo.inputs import kind, need

NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def add_tokens(backend: Tokenizer, config: dict, special_tokens_map: dict, added_tokens: dict) -> dict[str, str]:
    """Adds what tokenizer.json lacks to the backend. The dicts are the three files; returns name -> text.

    Raises ValueError for a value that is no token, for an id in added_tokens_decoder that the backend does not give,
    and for an id that two tokens claim.
    """
    decoder = need(config, "added_tokens_decoder", dict, where="tokenizer_config.json", default=None)
    named, extra = named_tokens(config if decoder is not None else config | special_tokens_map)
    present = backend.get_added_tokens_decoder()
    known = {token.content for token in present.values()}
    if decoder is not None:
        listed = {_number(key): _token(value, f"id {key}", special=False) for key, value in decoder.items()}
        same = {repr(token) for token in present.values()}  # a known token with other flags is set anew
        new = [token for _, token in sorted(listed.items()) if repr(token) not in same]
    else:
        special = {token.content for token in [*named.values(), *extra]}
        owners = {_number(number): text for text, number in added_tokens.items()}
        lost = added_tokens.keys() - owners.values() | {t for n, t in owners.items() if n in present and t not in known}
        if lost:  # the other one would win in transformers
            raise ValueError(f"got another token's id for {min(lost)!r:.40} in added_tokens.json, want its own")
        listed = {}  # their ids are those that come next, whatever the file says
        texts = [text for _, text in sorted(owners.items()) if text not in known]
        new = [_added(text, special=text in special, normalized=text not in special) for text in texts]
    known |= {token.content for token in new}
    backend.add_tokens(new + [token for token in [*named.values(), *extra] if token.content not in known])
    for number, token in sorted(listed.items()):
        if backend.token_to_id(token.content) != number:
            given = backend.token_to_id(token.content)
            line = f"got id {number} for {token.content!r} in tokenizer_config.json, which tokenizer.json makes {given}"
            raise ValueError(f"{line}, want files of one model")
    return {name: token.content for name, token in named.items()}


def named_tokens(config: dict) -> tuple[dict[str, AddedToken], list[AddedToken]]:
    """(name -> token, tokens without a name) of a tokenizer_config.json or a special_tokens_map.json."""
    named = {name: config[name] for name in NAMES if config.get(name) is not None}
    # multimodal tokenizers name more, such as image_token; add_bos_token is true or false
    named |= {name: v for name, v in config.items() if name.endswith("_token") and isinstance(v, (str, dict))}
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    if isinstance(extra, dict):
        named, extra = named | extra, []
    if not isinstance(extra, list):
        raise ValueError(f"got {kind(extra)} for extra_special_tokens, want a list of tokens")
    named = {name: _token(value, name) for name, value in named.items()}
    return named, [_token(value, "extra_special_tokens") for value in extra]


def _token(value: object, name: str, special: bool = True) -> AddedToken:
    spec = {"content": value} if isinstance(value, str) else value
    if not isinstance(spec, dict) or not isinstance(spec.get("content"), str):
        raise ValueError(f'got {kind(value)} for {name}, want a token: "</s>" or {{"content": "</s>", …}}')
    flags = {flag: need(spec, flag, bool, where=name) for flag in FLAGS if flag in spec}
    flags.setdefault("special", special)
    return _added(spec["content"], **flags)


def _added(text: str, **flags: bool) -> AddedToken:
    try:
        return AddedToken(text, **flags)
    except UnicodeEncodeError as error:
        raise ValueError(f"got token {text!r:.80} with half a character, want whole ones") from error


def _number(value: object) -> int:
    if type(value) is int or isinstance(value, str) and value.isascii() and value.isdecimal():
        return int(value)
    raise ValueError(f"got {value!r:.40} for the id of an added token, want a number")
