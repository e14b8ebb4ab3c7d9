import json
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from lenvm_rl.pretraining.generators import (
    ServerGenerator,
    Skipped,
    TransformersGenerator,
    VLLMGenerator,
    create_generator,
    row_seed,
)
from lenvm_rl.sampling import Completion, SamplingSettings, prompt_token_ids, sample_completions
from lenvm_rl.tasks.arithmetic import build_tokenizer

EOS = 1
SETTINGS = SamplingSettings(6, temperature=0.5, top_p=0.9)
PROMPTS = [[20], [21, 22], [23]]


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


# transformers


@pytest.fixture(scope="module")
def policy(policy_folder):
    return AutoModelForCausalLM.from_pretrained(policy_folder)


def test_transformers_draws_what_sample_completions_draws_from_the_seed(policy, tokenizer, problems):
    ids = prompt_token_ids(tokenizer, problems["prompt"])
    generator = TransformersGenerator(policy, tokenizer, batch_size=5)
    made = []
    completions = generator(ids, SETTINGS, 3, lambda count, tokens: made.append(count))
    torch.manual_seed(3)
    assert completions == sample_completions(policy, tokenizer, ids, SETTINGS, batch_size=5)
    assert generator(ids, SETTINGS, 4) != completions
    assert made == [5, 5, 5, 1] and generator.notes() == []
    assert generator.completions_per_shard == 5


def test_a_generator_is_called_what_its_model_is_called(policy, policy_folder, tokenizer):
    assert TransformersGenerator(policy, tokenizer).name == policy_folder
    assert TransformersGenerator(policy, tokenizer, name="mine").name == "mine"
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        TransformersGenerator(policy, tokenizer, batch_size=0)


def test_seeds_of_rows_fit_into_31_bits_and_differ():
    seeds = {row_seed(seed, row) for seed in (0, 1, -1) for row in range(1000)}
    assert len(seeds) == 3000 and min(seeds) >= 0 and max(seeds) < 2**31


def test_a_backend_is_made_by_its_name(policy_folder, tokenizer):
    made = create_generator("transformers", policy_folder, tokenizer, batch_size=7)
    assert isinstance(made, TransformersGenerator) and (made.name, made.batch_size) == (policy_folder, 7)
    made = create_generator("server", policy_folder, tokenizer, name="m", batch_size=7, server_url="http://host:1")
    assert isinstance(made, ServerGenerator) and (made.model, made.name, made.concurrency) == ("m", "m", 7)
    made = create_generator("vllm", policy_folder, tokenizer, name="m")
    assert isinstance(made, VLLMGenerator) and (made.model, made.name) == (policy_folder, "m")
    with pytest.raises(ValueError, match="no backend 'sglang': take 'transformers', 'vllm' or 'server'"):
        create_generator("sglang", policy_folder, tokenizer)
    with pytest.raises(ValueError, match="needs the server's address: --server_url"):
        create_generator("server", policy_folder, tokenizer)


# vLLM, replaced by a double


def test_without_vllm_the_error_names_the_other_backends(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    generator = VLLMGenerator("m")  # a folder that is complete needs no vLLM
    with pytest.raises(ImportError, match=r"pip install 'lenvm-rl\[vllm\]', or take --backend transformers"):
        generator(PROMPTS, SETTINGS, 0)


def test_vllm_gets_ids_and_the_plain_distribution_and_gives_ids(monkeypatch):
    engines, calls, answers = [], [], [([7, EOS], "stop"), ([7, 8], "length"), ([7], "abort"), ([], "stop")]

    class LLM:
        def __init__(self, **options):
            engines.append(options)

        def generate(self, prompts, sampling_params, use_tqdm):
            calls.append((prompts, sampling_params, use_tqdm))
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=t, finish_reason=r)]) for t, r in answers]

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=LLM, SamplingParams=lambda **options: options))
    generator, made = VLLMGenerator("m", tensor_parallel_size=2), []
    assert engines == []  # loaded when it is needed
    completions = generator([[20], [20], [21], [22]], SETTINGS, 5, lambda *counts: made.append(counts))
    assert completions == [
        Completion([7, EOS], finished=True),
        Completion([7, 8], finished=False),
        Skipped("finish_reason 'abort'"),
        Skipped("no tokens"),
    ]
    generator([[20]] * 4, SETTINGS, 5)
    assert engines == [{"model": "m", "tensor_parallel_size": 2}] and made == [(4, 4)]
    prompts, parameters, bar = calls[0]
    assert prompts == [{"prompt_token_ids": ids} for ids in ([20], [20], [21], [22])] and bar is False
    assert parameters[1] == {
        "n": 1,
        "max_tokens": 6,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "seed": row_seed(5, 1),
        "detokenize": False,
    }


# a server


def answer(ids=(7, EOS), reason="stop", **choice):
    return {"choices": [{"index": 0, "text": "", "finish_reason": reason, "token_ids": list(ids), **choice}]}


@contextmanager
def serving(respond):
    """A server on this machine. ``respond(request, number)`` returns JSON, bytes, or (status, either of them)."""
    seen, lock = [], threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                seen.append(SimpleNamespace(path=self.path, headers=self.headers, json=request))
                number = len(seen) - 1
            response = respond(request, number)
            status, body = response if isinstance(response, tuple) else (200, response)
            body = body if isinstance(body, bytes) else json.dumps(body).encode()
            try:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
            except OSError:
                pass  # the client has given up

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield SimpleNamespace(url=f"http://127.0.0.1:{server.server_port}", seen=seen)
    finally:
        server.shutdown()
        server.server_close()


def client(server, tokenizer, **options):
    options = {"concurrency": 2, "backoff_seconds": 0.001, "timeout_seconds": 5, **options}
    return ServerGenerator(server.url, "m", tokenizer, **options)


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_the_server_is_asked_for_ids_with_ids_and_for_the_plain_distribution(tokenizer, suffix):
    with serving(lambda request, number: answer()) as server:
        server.url += suffix
        generator, made = client(server, tokenizer, concurrency=1, api_key="secret"), []
        completions = generator(PROMPTS, SETTINGS, 5, lambda *counts: made.append(counts))
    assert completions == [Completion([7, EOS], finished=True)] * 3 and made == [(1, 2)] * 3
    assert [request.path for request in server.seen] == ["/v1/completions"] * 3
    assert server.seen[0].headers["Authorization"] == "Bearer secret"
    assert server.seen[1].json == {
        "model": "m",
        "prompt": [21, 22],
        "max_tokens": 6,
        "temperature": 0.5,
        "top_p": 0.9,
        "n": 1,
        "seed": row_seed(5, 1),
        "stream": False,
        "return_token_ids": True,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
    }
    assert generator.notes() == []


def test_completions_come_in_the_order_of_the_prompts_whatever_the_order_of_the_answers(tokenizer):
    def respond(request, number):
        time.sleep(0.02 * (request["prompt"][0] % 3))
        return answer([request["prompt"][0], EOS])

    prompts = [[20 + row] for row in range(20)]
    with serving(respond) as server:
        completions = client(server, tokenizer, concurrency=8)(prompts, SETTINGS, 0)
    assert [completion.ids[0] for completion in completions] == list(range(20, 40))


def test_requests_are_in_flight_together(tokenizer):
    together = threading.Barrier(4, timeout=5)  # breaks unless four requests wait at once

    def respond(request, number):
        together.wait()
        return answer()

    with serving(respond) as server:
        assert len(client(server, tokenizer, concurrency=4)([[20]] * 8, SETTINGS, 0)) == 8


def test_the_finish_reason_decides_and_a_missing_end_token_is_added(tokenizer):
    answers = [
        answer([7, 8], "length"),
        answer([7, 8], "stop"),
        answer([7, 9], "stop", stop_reason=9),  # another end token of the model
        answer([7, 8], "stop", stop_reason=9),
    ]
    with serving(lambda request, number: answers[request["prompt"][0] - 20]) as server:
        generator = client(server, tokenizer)
        completions = generator([[20], [21], [22], [23]], SETTINGS, 0)
    assert completions == [
        Completion([7, 8], finished=False),
        Completion([7, 8, EOS], finished=True),
        Completion([7, 9], finished=True),
        Completion([7, 8, 9], finished=True),
    ]
    assert generator.notes() == ["2 finished completions came back without their end token, which was added."]


def test_text_is_tokenised_again_and_counted(tokenizer):
    texts = {20: ("3 + 4", "stop", 4), 21: ("3 + 4", "length", 2), 22: ("", "stop", 1)}

    def respond(request, number):
        text, reason, count = texts[request["prompt"][0]]
        return {
            "choices": [{"text": text, "finish_reason": reason}],
            "usage": {"completion_tokens": count, "prompt_tokens": 1},
        }

    with serving(respond) as server:
        generator = client(server, tokenizer)
        completions = generator([[20], [21], [22]], SETTINGS, 0)
    ids = tokenizer("3 + 4").input_ids
    assert completions == [Completion([*ids, EOS], True), Completion(ids, False), Completion([EOS], True)]
    again, other = generator.notes()
    assert again.startswith("3 completions came back as text without token ids and were tokenised again")
    assert other == "1 of these have another number of tokens than the server counted."


def test_a_server_that_knows_only_openais_fields_is_asked_in_those(tokenizer):
    def respond(request, number):
        return (400, {"error": "unknown field top_k"}) if "top_k" in request else answer()

    with serving(respond) as server:
        generator = client(server, tokenizer, concurrency=1)
        assert generator(PROMPTS, SETTINGS, 0) == [Completion([7, EOS], True)] * 3
    # refused once, and remembered
    assert ["top_k" in request.json for request in server.seen] == [True, False, False, False]
    assert [request.json["prompt"] for request in server.seen[1:]] == PROMPTS
    (note,) = generator.notes()
    assert "does not know the fields top_k, min_p and repetition_penalty" in note


def test_a_server_that_takes_no_ids_gets_text(tokenizer):
    def respond(request, number):
        if not isinstance(request["prompt"], str):
            return 422, {"error": "prompt must be a string"}
        return {"choices": [{"text": "3", "finish_reason": "stop"}], "usage": {"prompt_tokens": 5}}

    with serving(respond) as server:
        generator = client(server, tokenizer, concurrency=1)
        completions = generator([tokenizer("1 + 2 =").input_ids] * 2, SETTINGS, 0)
    assert completions == [Completion([*tokenizer("3").input_ids, EOS], True)] * 2
    assert server.seen[-1].json["prompt"] == "1 + 2 =" and len(server.seen) == 4
    notes = generator.notes()
    assert notes[-1] == "The server takes no token ids: prompts were sent as text."
    assert "2 completions follow a prompt that the server tokenised to another length than we did." in notes


BAD = {
    "HTTP 500": (500, b"oops"),
    "HTTP 503": (503, b""),
    "HTTP 429": (429, {"error": "slow down"}),
    "an answer that is no JSON": b"<html>",
    "an answer that is no JSON ": b"\xff\xfe",
    "an answer without choices": {"choices": []},
    "an answer without choices ": [1, 2],
    "an answer without choices  ": {"object": "error"},
    "finish_reason None": answer(reason=None),
    "finish_reason 'content_filter'": answer(reason="content_filter"),
    "an empty completion": answer([]),
    "an empty completion ": {"choices": [{"text": "", "finish_reason": "stop"}]},
    "an empty completion  ": answer(token_ids="7 8"),
    "an answer without text": {"choices": [{"text": None, "finish_reason": "stop"}]},
    "token ids outside the vocabulary": answer([7, 100_000]),
    "token ids outside the vocabulary ": answer([-1, EOS]),
    "token ids outside the vocabulary  ": answer([7, "8"]),
    "token ids outside the vocabulary   ": answer([True, 7.0]),
}


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_answer_is_asked_for_again(tokenizer, reason):
    with serving(lambda request, number: BAD[reason] if number < 2 else answer()) as server:
        generator = client(server, tokenizer, concurrency=1)
        assert generator([[20]], SETTINGS, 0) == [Completion([7, EOS], True)]
    assert len(server.seen) == 3
    assert generator.notes() == ["2 requests had to be repeated."]


@pytest.mark.parametrize("reason", BAD)
def test_a_completion_that_stays_bad_is_skipped_with_its_reason(tokenizer, reason):
    def respond(request, number):
        return BAD[reason] if request["prompt"] == [21, 22] else answer()

    with serving(respond) as server:
        first, second, third = client(server, tokenizer, attempts=3)(PROMPTS, SETTINGS, 0)
    assert first == third == Completion([7, EOS], True)
    assert isinstance(second, Skipped) and second.reason.startswith(reason.strip())
    assert len(server.seen) == 5


def test_a_request_that_is_refused_is_not_repeated(tokenizer):
    def respond(request, number):
        return (400, {"error": "the prompt is too long"}) if request["prompt"] == [23] else answer()

    with serving(respond) as server:
        completions = client(server, tokenizer, concurrency=1)(PROMPTS, SETTINGS, 0)
    assert completions[2] == Skipped('refused: HTTP 400: {"error": "the prompt is too long"}')
    assert len(server.seen) == 3


def test_one_prompt_that_is_always_refused_does_not_stop_a_run_however_often_it_is_sampled(tokenizer):
    with serving(lambda request, number: (400, b"too long")) as server:
        completions = client(server, tokenizer)([[20]] * 8, SETTINGS, 0)
    assert set(completions) == {Skipped("refused: HTTP 400: too long")}


def test_a_server_that_answers_too_late_is_asked_again_and_then_skipped(tokenizer):
    release = threading.Event()

    def respond(request, number):
        if request["prompt"] == [21, 22] or number == 0:
            release.wait(5)
        return answer()

    with serving(respond) as server:
        generator = client(server, tokenizer, timeout_seconds=0.2, attempts=2, concurrency=1)
        completions = generator(PROMPTS, SETTINGS, 0)
        release.set()
    assert completions[0] == completions[2] == Completion([7, EOS], True)
    assert isinstance(completions[1], Skipped) and completions[1].reason == "no answer within 0.2 seconds"


@pytest.mark.parametrize("reason", ["HTTP 500", "an answer that is no JSON", "an empty completion"])
def test_a_server_that_gives_nothing_any_more_stops_the_run(tokenizer, reason):
    prompts = [[20 + row] for row in range(50)]
    with serving(lambda request, number: answer() if number < 10 else BAD[reason]) as server:
        generator = client(server, tokenizer, attempts=2)
        with pytest.raises(ConnectionError, match=f"nothing usable for 4 completions in a row, .*{reason}. Look at"):
            generator(prompts, SETTINGS, 0)
    assert len(server.seen) < 30  # not all fifty were tried


def test_a_server_that_is_not_there_stops_the_run(tokenizer):
    with serving(lambda request, number: answer()) as server:
        pass
    with pytest.raises(ConnectionError, match=r"nothing usable for 1 completions in a row.*Connection refused"):
        client(server, tokenizer, attempts=2)([[20]], SETTINGS, 0)


def test_a_server_that_comes_back_is_waited_for(tokenizer):
    with serving(lambda request, number: (503, b"loading") if number < 6 else answer()) as server:
        completions = client(server, tokenizer, attempts=8)(PROMPTS, SETTINGS, 0)
    assert completions == [Completion([7, EOS], True)] * 3


def test_the_wait_doubles_with_every_attempt(tokenizer):
    times = []

    def respond(request, number):
        times.append(time.monotonic())
        return BAD["HTTP 500"] if number < 3 else answer()

    with serving(respond) as server:
        client(server, tokenizer, backoff_seconds=0.1)([[20]], SETTINGS, 0)
    first, second, third = (after - before for before, after in pairwise(times))
    assert first >= 0.05 and second >= 0.1 and third >= 0.2  # half of each wait is random


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_wrong_address_name_or_key_is_an_error_at_once(tokenizer, status):
    with serving(lambda request, number: (status, {"error": "no model m"})) as server:
        with pytest.raises(ValueError, match=rf"for the model 'm' \(HTTP {status}: .*no model m.*Check the address"):
            client(server, tokenizer)([[20]] * 50, SETTINGS, 0)
        assert len(server.seen) < 10


@pytest.mark.parametrize(
    "options, message",
    [
        ({"url": "host:8000"}, "server_url must begin with http:// or https://, got 'host:8000'"),
        ({"concurrency": 0}, "concurrency and attempts must be at least 1, got 0 and 5"),
        ({"attempts": 0}, "concurrency and attempts must be at least 1, got 64 and 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ServerGenerator(**{"url": "http://host", "model": "m", "tokenizer": build_tokenizer(), **options})
