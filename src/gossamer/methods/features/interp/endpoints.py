"""Language models as judges: behind an OpenAI-compatible address, or loaded here.

No address and no key is built in. A key is read from the environment variable
``GOSSAMER_JUDGE_KEY`` when a request is made, sent to the given address alone, and kept nowhere.
"""

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core import GossamerError
from gossamer.models import load_model

__all__ = ["KEY", "EndpointJudge", "LocalEmbedder", "LocalJudge"]

KEY = "GOSSAMER_JUDGE_KEY"
_BUSY = (429, 500, 502, 503, 504)


class EndpointJudge:
    """A model served by the OpenAI protocol.

    Parameters
    ----------
    address : up to ``/v1``. model : the name it is served by.
    timeout : seconds for an answer. tries : requests for one answer while the server is busy.
    wait : seconds before the second try, doubled each time.

    Raises
    ------
    GossamerError
        For an address that is not http or https.
    """

    def __init__(
        self, address: str, model: str, *, timeout: float = 60, tries: int = 4, wait: float = 1
    ) -> None:
        if not address.startswith(("http://", "https://")):
            raise GossamerError(f"judge address {address!r} is no http address; give http(s)://")
        if not model:
            raise GossamerError(
                f"the judge at {address} needs the name of a model; give judge_model"
            )
        self.address, self.model = address.rstrip("/"), model
        self.timeout, self.tries, self.wait = timeout, tries, wait

    def complete(self, prompts: Sequence[str], *, max_tokens: int) -> list[str]:
        """Answers of the chat interface at temperature 0."""
        return [self._chat(prompt, max_tokens) for prompt in prompts]

    def _chat(self, prompt: str, max_tokens: int) -> str:
        messages = [{"role": "user", "content": prompt}]
        found = self._post("/chat/completions", messages=messages, max_tokens=max_tokens)
        try:
            return str(found["choices"][0]["message"]["content"] or "")
        except (KeyError, IndexError, TypeError):
            raise self._strange("no message") from None

    def loss(self, given: Sequence[str], texts: Sequence[str]) -> list[float]:
        """Mean nats per token by the plain interface, which must echo with log-probabilities."""
        return [self._echoed(g, t) for g, t in zip(given, texts, strict=True)]

    def _echoed(self, given: str, text: str) -> float:
        asked = {"prompt": given + text, "echo": True, "logprobs": 1, "max_tokens": 1}
        found = self._post("/completions", **asked)
        try:
            logs = found["choices"][0]["logprobs"]
            pairs = zip(logs["token_logprobs"], logs["text_offset"], strict=True)
            end = len(given) + len(text)
            own = [p for p, at in pairs if len(given) <= at < end and p is not None]
            return -sum(own) / len(own)
        except (KeyError, IndexError, TypeError, ValueError, ZeroDivisionError):
            raise self._strange("no log-probabilities of the prompt") from None

    def _strange(self, what: str) -> GossamerError:
        return GossamerError(
            f"{self.address} answered with {what}; use another server or leave that score out"
        )

    def _post(self, path: str, **body: Any) -> Any:
        sent = json.dumps({"model": self.model, "temperature": 0, **body}).encode()
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        for attempt in range(self.tries):
            request = urllib.request.Request(self.address + path, sent, headers)
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                    return json.load(reply)
            except urllib.error.HTTPError as error:
                error.close()
                if error.code not in _BUSY or attempt == self.tries - 1:
                    raise GossamerError(
                        f"{self.address} refused with status {error.code}; check the model's name "
                        f"{self.model!r} and the key in ${KEY}"
                    ) from None
            except (OSError, ValueError) as error:
                raise GossamerError(f"cannot use the judge at {self.address}: {error}") from None
            time.sleep(self.wait * 2**attempt)
        raise AssertionError


class LocalJudge:
    """A causal language model of transformers, by its folder or hub id."""

    def __init__(self, source: str, *, device: str = "cpu") -> None:
        self.model, self.tokenizer = load_model(source, device=device)

    def _ids(self, text: str) -> Tensor:
        return torch.tensor([self.tokenizer(text, verbose=False)["input_ids"]])

    @torch.no_grad()
    def complete(self, prompts: Sequence[str], *, max_tokens: int) -> list[str]:
        """Greedy answers, in the chat template where the tokenizer has one."""
        answers = []
        for prompt in prompts:
            text = prompt
            if getattr(self.tokenizer, "chat_template", None):
                messages = [{"role": "user", "content": prompt}]
                text = self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=True
                )
            ids = self._ids(text).to(next(self.model.parameters()).device)
            made = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_tokens,
                do_sample=False,
                pad_token_id=0,
            )
            new = made[0, ids.shape[1] :]
            answers.append(self.tokenizer.decode(new, skip_special_tokens=True))
        return answers

    @torch.no_grad()
    def loss(self, given: Sequence[str], texts: Sequence[str]) -> list[float]:
        found = []
        for before, text in zip(given, texts, strict=True):
            whole, start = self._ids(before + text), self._ids(before).shape[1]
            whole = whole.to(next(self.model.parameters()).device)
            logits = self.model(input_ids=whole).logits[0, :-1].float()
            losses = nn.functional.cross_entropy(logits, whole[0, 1:], reduction="none")
            found.append(float(losses[max(0, start - 1) :].mean()))
        return found


class LocalEmbedder:
    """An encoder of transformers: the mean of its last hidden states.

    Parameters
    ----------
    ask : put before a query, for encoders that were trained so.
    """

    def __init__(self, source: str, *, ask: str = "", device: str = "cpu") -> None:
        self.model, self.tokenizer = load_model(source, device=device, kind="any")
        self.ask = ask
        if self.tokenizer is None:
            raise GossamerError(f"{source} has no tokenizer; embed with a text encoder")

    @torch.no_grad()
    def embed(self, texts: Sequence[str], *, query: bool = False) -> Tensor:
        rows = []
        for text in texts:
            ids = self.tokenizer((self.ask if query else "") + text, verbose=False)["input_ids"]
            asked = torch.tensor([ids], device=next(self.model.parameters()).device)
            rows.append(self.model(input_ids=asked)[0][0].float().mean(0).cpu())
        return torch.stack(rows)
