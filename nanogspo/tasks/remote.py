"""Another model that is asked over the network: a judge of answers, or a customer to talk to.

Any address that speaks OpenAI's protocol will do (vLLM, llama.cpp, Ollama, a service). Model, address and key are
OPENAI_MODEL, OPENAI_BASE_URL and OPENAI_API_KEY unless given. A reply is asked for at temperature 0, kept on disk and
never asked for twice: a resumed run reads what the first one read.      Tests: tests/test_rewards.py
"""

import hashlib
import os
from pathlib import Path

from nanogspo.inputs import optional


class Remote:
    """remote(messages) -> text. options: model, url, cache; flag: who asks, for the error without the package openai.

    Raises ValueError for other options, and without a model. Calls raise what the package raises.
    """

    def __init__(self, options: dict[str, str], flag: str):
        self.model = options.get("model") or os.environ.get("OPENAI_MODEL")
        if not self.model or options.keys() - {"model", "url", "cache"}:
            raise ValueError(f"got {flag} with {options}, want model=NAME[,url=ADDRESS][,cache=FOLDER]")
        self.url = options.get("url") or os.environ.get("OPENAI_BASE_URL")
        key = os.environ.get("OPENAI_API_KEY", "none")  # a server of one's own asks for no key
        self.client = optional("openai", flag).OpenAI(base_url=self.url, api_key=key, max_retries=4)
        self.folder = Path(options.get("cache") or "~/.cache/nanogspo/replies").expanduser()

    def __call__(self, messages: list[dict]) -> str:
        kept = self.folder / hashlib.sha256(repr((self.url, self.model, messages)).encode()).hexdigest()
        if not kept.exists():
            reply = self.client.chat.completions.create(model=self.model, messages=messages, temperature=0)
            self.folder.mkdir(parents=True, exist_ok=True)
            part = self.folder / f"{kept.name}.{os.getpid()}"  # whole or not at all, whoever else writes it
            part.write_text(reply.choices[0].message.content or "", encoding="utf-8")
            part.replace(kept)
        return kept.read_text(encoding="utf-8")
