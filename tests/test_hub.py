"""nanogspo/run/hub.py: a merged export is compared, and what is pushed arrives at a stand-in of the hub's HTTP API.

Run: python -m pytest tests/test_hub.py
"""

import base64
import contextlib
import http.server
import json
import threading

import pytest
import torch
import yaml

from nanogspo import checkpoint, tiny
from nanogspo.config import TrainConfig
from nanogspo.lora import add_lora, lora_layers
from nanogspo.run.hub import check_login, check_merged, model_card, push
from tests.test_log import GSPO


class Hub(http.server.BaseHTTPRequestHandler):
    """The calls that create_repo and create_commit make, for files that are no LFS: each request is kept."""

    requests, status = [], 200

    def do_GET(self):
        self.answer({"name": "me", "type": "user", "orgs": [], "auth": {"type": "access_token"}})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        lines = [json.loads(line) for line in body.splitlines()]
        self.requests.append((self.path, self.headers["Authorization"], lines))
        if "/preupload/" in self.path:
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in lines[0]["files"]]
            return self.answer({"files": files})
        url = f"http://{self.headers['Host']}/me/model"
        self.answer({"url": url, "commitUrl": f"{url}/commit/1", "commitOid": "1", "success": True})

    def answer(self, content):
        data = json.dumps(content).encode()
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch):
    handler = type("Fresh", (Hub,), {"requests": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    yield handler
    server.shutdown()
    server.server_close()


def a_run(folder, part):
    (folder / part).mkdir(parents=True)
    (folder / part / f"{part}_config.json").write_text("{}")
    (folder / part / f"{part}.safetensors").write_bytes(b"weights")
    (folder / "curves.png").write_bytes(b"picture")
    (folder / "config.yaml").write_text("algo: gspo\n")
    evals = {"step": 0, "phase": "start", "eval_exact": 0.1, "eval_low": 0.05, "eval_high": 0.2, "eval_count": 100}
    rows = [evals, {**GSPO, "step": 1}, evals | {"step": 4, "phase": "gspo", "eval_exact": 0.5}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("part, flags", [("adapter", {}), ("model", {"save_merged": True}), ("model", {"lora_r": 0})])
def test_what_a_run_made_arrives_in_one_commit(tmp_path, capsys, hub, part, flags):
    a_run(tmp_path, part)
    check_login("me/model")
    push(TrainConfig(model="Qwen/Qwen3-0.6B", push_to_hub="me/model", **flags), tmp_path)
    (create, _, [made]), *_, (commit, token, lines) = hub.requests
    assert create == "/api/repos/create" and (made["name"], made.get("private", True)) == ("model", True)
    assert commit.startswith("/api/models/me/model/commit/main") and token == "Bearer hf_secret"
    files = {
        line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"
    }
    want = {f"{part}_config.json", f"{part}.safetensors", "curves.png", "training.yaml", "README.md"}
    assert (
        set(files) == want and files[f"{part}.safetensors"] == b"weights" and files["training.yaml"] == b"algo: gspo\n"
    )
    assert capsys.readouterr().out.startswith(f"pushed {tmp_path / part} to http://127.0.0.1:")


def test_a_failed_upload_says_how_to_do_it_later(tmp_path, capsys, hub):
    a_run(tmp_path, "adapter")
    hub.status = 403
    push(TrainConfig(push_to_hub="me/model"), tmp_path)
    out = capsys.readouterr().out
    assert out.startswith("not pushed to me/model: ") and f"hf upload me/model {tmp_path / 'adapter'}\n" in out
    hub.status = 401
    with pytest.raises(ValueError, match="(?s)got --push-to-hub me/model, but the hub says: .*want `hf auth login`"):
        check_login("me/model")
    with pytest.raises(ValueError, match="got --push-to-hub model, want OWNER/NAME"):
        check_login("model")
    assert check_login("") is push(TrainConfig(), tmp_path) is None


def test_the_card_says_what_was_done(tmp_path):
    a_run(tmp_path, "adapter")
    config = TrainConfig(model="Qwen/Qwen3-0.6B", data="rows.jsonl", reward=("exact",), lr=1e-5, steps=4)
    card = model_card(config, tmp_path, "adapter")
    head = yaml.safe_load(card.split("---")[1])
    assert head["base_model"] == "Qwen/Qwen3-0.6B" and head["library_name"] == "peft" and "gspo" in head["tags"]
    assert "| 0 | start | 10.0% exact (5.0% to 20.0%) | 100 |\n| 4 | gspo | 50.0% exact" in card
    recipe = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert recipe["lr"] == 1e-5 and recipe["reward"] == ["exact"] and "group_size" not in recipe
    assert "Task: rows.jsonl" in card and "![curves](curves.png)" in card and f"torch {torch.__version__}" in card
    assert "base_model" not in model_card(TrainConfig(), tmp_path, "model")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_export_is_compared_before_it_is_announced(tmp_path, dtype):
    """Right: within rounding. Wrong: an adapter merged with the wrong sign, and one not merged at all."""
    tokenizer, model = tiny.build("0123456789+=", seed=0)
    model.to(dtype)
    add_lora(model, r=4, alpha=8, dropout=0.5)  # as it trains
    for layer in lora_layers(model).values():
        layer.lora_B.weight.data.normal_(0, 0.05, generator=torch.Generator().manual_seed(0))
    checkpoint.save(model, tmp_path / "model", tokenizer=tokenizer)
    checkpoint.save(model, tmp_path / "base", tokenizer=tokenizer, merge_lora=False)
    assert "merged; its logits are within" in check_merged(model, tmp_path / "model", [2, 3, 4, 5]) and model.training
    with pytest.raises(ValueError, match="got merged weights whose logits are .* off, want at most"):
        check_merged(model, tmp_path / "base", [2, 3, 4, 5])
    for layer in lora_layers(model).values():
        layer.lora_B.weight.data.neg_()
    with pytest.raises(ValueError, match="got merged weights"):
        check_merged(model, tmp_path / "model", [2, 3, 4, 5])


def test_without_memory_nothing_is_compared(tmp_path, monkeypatch):
    tokenizer, model = tiny.build("0123456789+=", seed=0)
    checkpoint.save(model, tmp_path / "model", tokenizer=tokenizer)
    size = sum(file.stat().st_size for file in (tmp_path / "model").glob("*.safetensors"))
    for free, words in ((2 * size - 2, "not compared"), (2 * size, "within 0.0e+00")):
        monkeypatch.setattr("nanogspo.run.hub.available_memory", lambda device, free=free: free)
        with contextlib.nullcontext():
            assert words in check_merged(model, tmp_path / "model", [2, 3])
