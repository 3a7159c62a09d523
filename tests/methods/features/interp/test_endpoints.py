import json
import math
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch

from gossamer.core import GossamerError
from gossamer.methods.features.interp.endpoints import (
    KEY,
    EndpointJudge,
    LocalEmbedder,
    LocalJudge,
)
from gossamer.methods.features.interp.judges import WordJudge
from gossamer.methods.features.interp.scores import detection
from gossamer.models import load_model
from tests.methods.features.interp.planted import sample


class Server(HTTPServer):
    """Answers as the OpenAI protocol does, by the rule of words; the first ``busy`` times 503."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen, self.busy, self.reply = [], 0, None


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, dict(self.headers), body))
        if self.server.busy:
            self.server.busy -= 1
            self.send_error(503)
            return
        if body["model"] != "judge":
            self.send_error(404)
            return
        if self.server.reply is not None:
            made = self.server.reply
        elif self.path.endswith("/chat/completions"):
            (text,) = WordJudge().complete([body["messages"][0]["content"]], max_tokens=9)
            made = {"choices": [{"message": {"content": text}}]}
        else:
            letters = len(body["prompt"])
            logs = [None, *(-0.5 for _ in range(letters - 1)), -9.0]
            made = {
                "choices": [
                    {"logprobs": {"token_logprobs": logs, "text_offset": [*range(letters + 1)]}}
                ]
            }
        sent = json.dumps(made).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(sent)))
        self.end_headers()
        self.wfile.write(sent)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    made = Server()
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


def judge(server, model="judge", **options):
    address = f"http://127.0.0.1:{server.server_port}/v1/"
    return EndpointJudge(address, model, wait=0.01, **options)


def test_an_endpoint_judges_as_the_rule_behind_it(server):
    assert detection(judge(server), "w50, w51", sample()).value == 1
    path, _, body = server.seen[0]
    assert path == "/v1/chat/completions"
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("judge", 0, 64)


def test_the_loss_is_that_of_the_text_alone(server):
    assert judge(server).loss(["before "], ["text"]) == [0.5]
    path, _, body = server.seen[0]
    assert path == "/v1/completions"
    assert body["echo"]
    assert body["prompt"] == "before text"


def test_the_key_comes_from_the_environment_and_is_not_kept(server, monkeypatch):
    monkeypatch.delenv(KEY, raising=False)
    one = judge(server)
    one.complete(["Task: detect\n"], max_tokens=1)
    monkeypatch.setenv(KEY, "abc")
    one.complete(["Task: detect\n"], max_tokens=1)
    assert "Authorization" not in server.seen[0][1]
    assert server.seen[1][1]["Authorization"] == "Bearer abc"
    assert "abc" not in str(vars(one))


def test_a_busy_server_is_asked_again_and_a_stubborn_one_is_not_for_ever(server):
    server.busy = 2
    assert judge(server).complete(["Task: detect\n"], max_tokens=1) == ["[]"]
    server.busy = 9
    with pytest.raises(GossamerError, match="status 503"):
        judge(server, tries=2).complete(["x"], max_tokens=1)
    assert len(server.seen) == 5


def test_refusals_and_nonsense_are_one_line(server):
    with pytest.raises(GossamerError, match="status 404.*'other'"):
        judge(server, "other").complete(["x"], max_tokens=1)
    server.reply = {"choices": []}
    with pytest.raises(GossamerError, match="no message"):
        judge(server).complete(["x"], max_tokens=1)
    with pytest.raises(GossamerError, match="no log-probabilities"):
        judge(server).loss(["x"], ["y"])
    with pytest.raises(GossamerError, match="http"):
        EndpointJudge("file:///etc", "judge")
    with pytest.raises(GossamerError, match="judge_model"):
        EndpointJudge("http://127.0.0.1:1/v1", "")
    with pytest.raises(GossamerError, match="cannot use the judge"):
        EndpointJudge("http://127.0.0.1:1/v1", "judge").complete(["x"], max_tokens=1)


def test_a_local_model_judges():
    local = LocalJudge("nano")
    (answer,) = local.complete(["Once upon a time"], max_tokens=4)
    assert isinstance(answer, str)
    model, tokenizer = load_model("nano")
    given, text = "Once upon a time", " there was a little girl"
    found, other = local.loss([given, given], [text, " xq zv kk"])
    ids = torch.tensor([tokenizer(given + text)["input_ids"]])
    start = len(tokenizer(given)["input_ids"])
    with torch.no_grad():
        logs = model(input_ids=ids).logits[0].log_softmax(-1)
    own = [-float(logs[i - 1, ids[0, i]]) for i in range(start, ids.shape[1])]
    assert found == pytest.approx(sum(own) / len(own), abs=1e-4)
    assert math.isfinite(other)
    assert other > found


def test_a_local_encoder_embeds():
    rows = LocalEmbedder("nano").embed(["a dog ran", "a dog ran", "the sun"])
    assert rows.dim() == 2
    assert torch.equal(rows[0], rows[1])
    assert not torch.allclose(rows[0], rows[2])
