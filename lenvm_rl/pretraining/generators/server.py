"""Rollouts from an OpenAI-compatible server: vLLM, SGLang, llama.cpp, and others.

1. Prompts go out as token ids, and token ids come back where the server returns them (vLLM's ``return_token_ids``).
   Text is tokenised again otherwise, and counted: the ids may differ from those that were sampled.
2. A server that refuses a request with a 400 or 422 is asked again in plainer words, first without the fields that are
   not OpenAI's, then with the prompt as text. The first form that works is kept.
3. Time-outs, 429, 5xx and garbage are tried again with exponential backoff; then the completion is skipped and counted.
   When nothing comes back any more, the run stops with an error.
4. Left out: chat completions (the template is applied here, so that the prompt's ids are known), streaming, and a bound
   on the whole time of a response that trickles in (the time-out is that of a silent connection).
"""

import http.client
import json
import queue
import random
import threading
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from lenvm_rl.sampling import Completion, SamplingSettings

from .interface import Skipped, row_seed

LONGEST_WAIT_SECONDS = 60.0
_FORMS = ("token ids and all fields", "token ids and OpenAI's fields", "text")


class ServerGenerator:
    """Samples from ``<url>/v1/completions``.

    Args:
        url: of the server, with or without the ``/v1``.
        model: the name that the server knows the policy by.
        tokenizer: the policy's.
        concurrency: requests in flight.
        timeout_seconds: for a connection on which nothing arrives: the time of one completion.
        attempts: for each completion, the first one included.
        backoff_seconds: before the second attempt; doubles with each further one, up to a minute, half of it random.
        completions_per_shard: completions that are asked for, and stored, at once; by default sixteen times those in
            flight, so that few wait for the last one.
        name: how the policy is called; ``model`` by default.
        api_key: sent as a bearer token.

    Each completion has a seed of its own, so that a run that was killed goes on with the same draws where the server
    honours seeds.
    """

    backend = "server"

    def __init__(
        self,
        url: str,
        model: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        concurrency: int = 64,
        timeout_seconds: float = 1800.0,
        attempts: int = 5,
        backoff_seconds: float = 1.0,
        completions_per_shard: int | None = None,
        name: str | None = None,
        api_key: str | None = None,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"server_url must begin with http:// or https://, got {url!r}.")
        if concurrency < 1 or attempts < 1:
            raise ValueError(f"concurrency and attempts must be at least 1, got {concurrency} and {attempts}.")
        self.url = url.rstrip("/").removesuffix("/v1") + "/v1/completions"
        self.model, self.tokenizer, self.name = model, tokenizer, name or model
        self.concurrency, self.timeout_seconds = concurrency, timeout_seconds
        self.attempts, self.backoff_seconds = attempts, backoff_seconds
        self.completions_per_shard = completions_per_shard or 16 * concurrency
        self.vocab_size = max(tokenizer.get_vocab().values()) + 1
        self.events: Counter[str] = Counter()
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._form, self._form_is_known = 0, False
        self._lock = threading.Lock()

    def __call__(
        self,
        prompt_ids: Sequence[list[int]],
        settings: SamplingSettings,
        seed: int,
        on_batch: Callable[[int, int], None] = lambda completions, tokens: None,
    ) -> list[Completion | Skipped]:
        """See `Generator`.

        Raises:
            ConnectionError: nothing could be had any more; names the last cause.
            ValueError: the server refuses every such request: wrong address, model name or key.
        """
        results: list[Completion | Skipped] = [Skipped("not asked for")] * len(prompt_ids)
        answers: queue.Queue[tuple[int, Completion | Skipped | Exception]] = queue.Queue()
        rows, stop = iter(range(len(prompt_ids))), threading.Event()

        def work() -> None:
            while not stop.is_set():
                with self._lock:
                    row = next(rows, None)
                if row is None:
                    return
                try:
                    answers.put((row, self._complete(prompt_ids[row], settings, row_seed(seed, row), stop)))
                except Exception as error:
                    answers.put((row, error))

        # daemons: an interrupted run does not wait for the answers that are still to come
        for _ in range(min(self.concurrency, len(prompt_ids))):
            threading.Thread(target=work, daemon=True).start()
        failed: list[int] = []  # rows since the last completion
        try:
            for _ in range(len(prompt_ids)):
                row, answer = answers.get()
                if isinstance(answer, Exception):
                    raise answer
                results[row] = answer
                if isinstance(answer, Completion):
                    failed = []
                    on_batch(1, len(answer.ids))
                    continue
                failed.append(row)
                on_batch(1, 0)
                # one prompt that is always answered with garbage is that prompt's fault
                is_the_server = isinstance(answer, _Unanswered) or len({tuple(prompt_ids[r]) for r in failed}) > 1
                # all those in flight and as many again
                if is_the_server and len(failed) >= min(2 * self.concurrency, len(prompt_ids)):
                    raise ConnectionError(
                        f"The server at {self.url} gave nothing usable for {len(failed)} completions in a row, up to "
                        f"{self.attempts} attempts each; the last time: {answer.reason}. Look at the server's log, "
                        "restart it, and run the same command again: what was stored is kept."
                    )
        finally:
            stop.set()
        return results

    def notes(self) -> list[str]:
        sentences = {
            "tokenised again": "{} completions came back as text without token ids and were tokenised again; the ids "
            "may differ from those that were sampled.",
            "other length": "{} of these have another number of tokens than the server counted.",
            "other prompt": "{} completions follow a prompt that the server tokenised to another length than we did.",
            "end token added": "{} finished completions came back without their end token, which was added.",
            "retried": "{} requests had to be repeated.",
        }
        notes = [sentence.format(f"{self.events[key]:,}") for key, sentence in sentences.items() if self.events[key]]
        if self._form_is_known and self._form > 0:
            notes.append(
                "The server does not know the fields top_k, min_p and repetition_penalty: if it has defaults of its "
                "own for them, the completions are not drawn from the plain policy."
            )
        if self._form_is_known and self._form == 2:
            notes.append("The server takes no token ids: prompts were sent as text.")
        return notes

    def _complete(
        self, prompt: list[int], settings: SamplingSettings, seed: int, stop: threading.Event
    ) -> Completion | Skipped:
        failure = Skipped("no attempt")
        for attempt in range(self.attempts):
            if attempt:
                self._count("retried")
                wait = min(self.backoff_seconds * 2 ** (attempt - 1), LONGEST_WAIT_SECONDS)
                if stop.wait(wait * random.uniform(0.5, 1.0)):
                    break
            try:
                return self._ask(prompt, settings, seed)
            except _RefusedError as refused:
                return Skipped(f"refused: {refused}")
            except _UnansweredError as unanswered:
                failure = _Unanswered(str(unanswered))
            except _UnusableError as unusable:
                failure = Skipped(str(unusable))
        return failure

    def _ask(self, prompt: list[int], settings: SamplingSettings, seed: int) -> Completion:
        """One completion, asked for in the plainest form that is needed."""
        for form in range(self._form, len(_FORMS)):
            try:
                answer = self._post(self._request(form, prompt, settings, seed))
            except _RefusedError:
                if self._form_is_known or form == len(_FORMS) - 1:
                    raise
                continue
            completion = self._read(answer, prompt)
            self._form, self._form_is_known = form, True
            return completion
        raise AssertionError("unreachable")

    def _request(self, form: int, prompt: list[int], settings: SamplingSettings, seed: int) -> dict[str, Any]:
        request: dict[str, Any] = {
            "model": self.model,
            "prompt": prompt if form < 2 else self.tokenizer.decode(prompt),
            "max_tokens": settings.max_new_tokens,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "n": 1,
            "seed": seed,
            "stream": False,
        }
        if form == 0:
            # -1 takes all tokens in vLLM, SGLang and llama.cpp; llama.cpp's own default is 40
            request |= {"return_token_ids": True, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
            request |= {"skip_special_tokens": False, "spaces_between_special_tokens": False}
        return request

    def _post(self, request: dict[str, Any]) -> Any:
        call = urllib.request.Request(self.url, json.dumps(request).encode(), self._headers, method="POST")
        try:
            with urllib.request.urlopen(call, timeout=self.timeout_seconds) as response:
                return json.loads(response.read())
        except urllib.error.HTTPError as error:
            said = f"HTTP {error.code}: {_excerpt(error)}"
            if error.code in (401, 403, 404, 405):
                raise ValueError(
                    f"The server refused {self.url} for the model {self.model!r} ({said}). Check the address, the "
                    "model name that the server was started with, and the key."
                ) from error
            if error.code < 500 and error.code not in (408, 409, 425, 429):
                raise _RefusedError(said) from error
            raise _UnansweredError(f"HTTP {error.code}") from error
        except TimeoutError as error:
            raise _UnansweredError(f"no answer within {self.timeout_seconds:g} seconds") from error
        except urllib.error.URLError as error:
            cause = f"no answer within {self.timeout_seconds:g} seconds" if _timed_out(error) else f"{error.reason}"
            raise _UnansweredError(cause) from error
        except (OSError, http.client.HTTPException) as error:
            raise _UnansweredError(f"the connection broke ({type(error).__name__})") from error
        except ValueError as error:  # undecodable bytes, or no JSON
            raise _UnusableError("an answer that is no JSON") from error

    def _read(self, answer: Any, prompt: list[int]) -> Completion:
        choices = answer.get("choices") if isinstance(answer, dict) else None
        choice = choices[0] if isinstance(choices, list) and choices else None
        if not isinstance(choice, dict):
            raise _UnusableError("an answer without choices")
        reason, ids = choice.get("finish_reason"), choice.get("token_ids")
        if reason not in ("stop", "length"):
            raise _UnusableError(f"finish_reason {reason!r}")
        usage = answer.get("usage") if isinstance(answer.get("usage"), dict) else {}
        returned = ids is not None
        if ids is None:
            ids = self._tokenised(choice.get("text"), reason, usage.get("completion_tokens"))
        if not isinstance(ids, list) or not ids:
            raise _UnusableError("an empty completion")
        if not all(type(token) is int and 0 <= token < self.vocab_size for token in ids):
            raise _UnusableError(f"token ids outside the vocabulary of {self.vocab_size}")
        # vLLM names the token that ended the completion where it is not the tokenizer's
        end = choice["stop_reason"] if type(choice.get("stop_reason")) is int else self.tokenizer.eos_token_id
        if returned and reason == "stop" and end is not None and ids[-1] != end:
            self._count("end token added")
            ids = [*ids, end]
        if usage.get("prompt_tokens", len(prompt)) != len(prompt):
            self._count("other prompt")
        return Completion(ids, finished=reason == "stop")

    def _tokenised(self, text: Any, reason: str, counted: Any) -> list[int]:
        if not isinstance(text, str):
            raise _UnusableError("an answer without text")
        if not text and not counted:
            raise _UnusableError("an empty completion")
        end = self.tokenizer.eos_token_id
        ids = list(self.tokenizer(text, add_special_tokens=False).input_ids)
        if reason == "stop" and end is not None and ids[-1:] != [end]:
            ids.append(end)  # text does not show it
        self._count("tokenised again")
        if type(counted) is int and counted != len(ids):
            self._count("other length")
        return ids

    def _count(self, event: str) -> None:
        with self._lock:
            self.events[event] += 1


class _Unanswered(Skipped):
    """The server is at fault, whatever the prompt."""


class _UnusableError(Exception):
    """No completion this time; another attempt may bring one."""


class _UnansweredError(_UnusableError):
    """Not even an answer."""


class _RefusedError(Exception):
    """The server will not answer this request, however often it is sent."""


def _timed_out(error: urllib.error.URLError) -> bool:
    return isinstance(error.reason, TimeoutError)


def _excerpt(error: urllib.error.HTTPError) -> str:
    """What the server says about it, cut to a line."""
    try:
        said = " ".join(error.read(2000).decode(errors="replace").split())
    except (OSError, http.client.HTTPException):
        said = ""
    return said[:200] or str(error.reason)
