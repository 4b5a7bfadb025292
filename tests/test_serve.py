"""The server, asked by OpenAI's own client over a real socket."""

import http.client
import json
import socket
import threading
import time
from functools import partial
from urllib.parse import urlsplit

import pytest
import torch
import transformers

import actome as ac
from actome.core.errors import ActomeError

openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")

from actome.steer.serving import Engine, Job, Limits, make_app  # noqa: E402
from actome.steer.serving.decoder import Decoder  # noqa: E402
from actome.steer.serving.rows import Rows  # noqa: E402

PROMPT = "def main("
CONSTANT = [ac.Add("blocks.2.resid.post", torch.randn(112, generator=torch.Generator().manual_seed(0)), scale=2.0)]
FIRST_ONLY = [CONSTANT[0].at(steps=0)]
LATER = [CONSTANT[0].at(steps=[2, 3])]


def ask(server, method, path, content=None, stream=False):
    """Status and parsed body; with `stream` the open connection and its answer."""
    connection = http.client.HTTPConnection(urlsplit(server).netloc, timeout=30)
    connection.request(method, path, content, {"content-type": "application/json"})
    answer = connection.getresponse()
    if stream:
        return connection, answer
    return answer.status, json.loads(answer.read())


@pytest.fixture(scope="module")
def model():
    return ac.demo()


@pytest.fixture(scope="module")
def server(model):
    """Its address."""
    model.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    limits = Limits(new=64, default_new=12, seconds=60, body=20_000, running=8, waiting=40)
    app = make_app(model, {"bent": CONSTANT, "first": FIRST_ONLY, "later": LATER}, name="demo", limits=limits)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    while not running.started:
        assert thread.is_alive()
        thread.join(0.05)
    yield f"http://127.0.0.1:{port}"
    running.should_exit = True
    thread.join(20)
    model.tokenizer.chat_template = None


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)


def said(client, clamps=(), **options):
    options = {"model": "demo", "prompt": PROMPT, "max_tokens": 12, "temperature": 0, **options}
    return client.completions.create(extra_body={"clamps": list(clamps)}, **options).choices[0].text


def wanted(model, *clamps, new=12):
    """By transformers' own generate."""
    if not clamps:
        return model.generate(PROMPT, max_new_tokens=new).text[0]
    with model.clamp(*clamps):
        return model.generate(PROMPT, max_new_tokens=new).text[0]


def test_answers_are_those_of_generate(client, model):
    assert said(client) == wanted(model)


def test_a_request_chooses_its_clamps(client, model):
    assert said(client, ["bent"]) == wanted(model, *CONSTANT)
    assert said(client, [{"name": "bent", "scale": -0.5}]) == wanted(model, CONSTANT[0].at(scale=-1.0))
    assert said(client, ["bent"]) != said(client)
    everything = client.completions.create(model="demo", prompt=PROMPT, max_tokens=12, temperature=0).choices[0].text
    assert everything == wanted(model, *CONSTANT, *FIRST_ONLY, *LATER)  # all apply where none is chosen


def test_a_clamp_of_some_steps_is_counted_by_request(client, model):
    assert said(client, ["first"]) == wanted(model, *FIRST_ONLY)
    assert said(client, ["later"]) == wanted(model, *LATER)
    assert said(client, ["later"]) not in (said(client), said(client, ["first"]))


def test_streams_give_the_same_text_in_pieces(client, model):
    stream = client.completions.create(
        model="demo", prompt=PROMPT, max_tokens=12, temperature=0, stream=True,
        stream_options={"include_usage": True}, extra_body={"clamps": []},
    )  # fmt: skip
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == wanted(model)
    assert len(chunks) > 4
    assert chunks[-1].usage.completion_tokens == 12
    assert chunks[-2].choices[0].finish_reason == "length"


def test_chats(client, model):
    messages = [{"role": "user", "content": "import"}, {"role": "user", "content": [{"type": "text", "text": "def f"}]}]
    options = {"model": "demo", "messages": messages, "max_tokens": 8, "temperature": 0, "extra_body": {"clamps": []}}
    whole = client.chat.completions.create(**options)
    ids = model.tokenizer("import\ndef f\n", add_special_tokens=False, return_tensors="pt")["input_ids"]
    assert whole.choices[0].message.content == model.generate(ids, max_new_tokens=8).text[0]
    pieces = client.chat.completions.create(**options, stream=True)
    assert "".join(p.choices[0].delta.content or "" for p in pieces) == whole.choices[0].message.content


def test_eight_streams_at_once_each_under_its_own_clamps(server, model):
    clients = [openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0) for _ in range(8)]
    scales = [0.25 * i for i in range(8)]
    got, errors = [""] * 8, []

    def one(i):
        try:
            clamps = [{"name": "bent", "scale": scales[i]}] if i else []
            options = {"max_tokens": 24, "temperature": 0, "stream": True, "extra_body": {"clamps": clamps}}
            stream = clients[i].completions.create(model="demo", prompt=PROMPT + "x" * i, **options)
            got[i] = "".join(chunk.choices[0].text for chunk in stream)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=one, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    for i in range(8):
        clamps = [CONSTANT[0].at(scale=2.0 * scales[i])] if i else []
        if not clamps:
            alone = model.generate(PROMPT, max_new_tokens=24).text[0]
        else:
            with model.clamp(*clamps):
                alone = model.generate(PROMPT + "x" * i, max_new_tokens=24).text[0]
        assert got[i] == alone, i


def test_sampling_is_of_its_seed(client):
    options = {"temperature": 1.0, "top_p": 0.9, "max_tokens": 16}
    one, two, other = (said(client, seed=seed, **options) for seed in (1, 1, 2))
    assert one == two != other


def test_stop_strings_end_the_text_and_are_not_in_it(client, model):
    whole = wanted(model, new=12)
    stop = whole[4:7]
    text = said(client, stop=[stop])
    assert text == whole[: whole.index(stop)]


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        ({"model": "gpt-4"}, 404, "no model 'gpt-4'"),
        ({"prompt": []}, 400, "no tokens"),
        ({"prompt": [5, 99_999]}, 400, "token ids are 0 to"),
        ({"prompt": ["a", "b"]}, 400, "one prompt a request"),
        ({"prompt": "word " * 900}, 400, "at most"),
        ({"max_tokens": 65}, 400, "at most 64"),
        ({"max_tokens": 0}, 400, "greater than or equal to 1"),
        ({"temperature": -1}, 400, "temperature"),
        ({"n": 2}, 400, "n=2 is not supported"),
        ({"logprobs": 3}, 400, "logprobs=3 is not supported"),
        ({"extra_body": {"clamps": ["bend"]}}, 400, "no clamp 'bend'; nearest: bent"),
        ({"extra_body": {"clamps": [{"name": "bent", "scale": 1000}]}}, 400, "less than or equal to 100"),
        ({"extra_body": {"steer": 1}}, 400, "no parameter 'steer'"),
    ],
)
def test_bad_requests_are_refused_in_words(client, options, status, words):
    options = {"model": "demo", "prompt": PROMPT, "max_tokens": 4, **options}
    with pytest.raises(openai.APIStatusError, match=words) as caught:
        client.completions.create(**options)
    assert caught.value.status_code == status


def test_malformed_and_oversized_bodies_and_unknown_paths(server):
    for content, status in [
        ("{", 400),
        ("[]", 400),
        ('{"prompt": {}}', 400),
        (json.dumps({"prompt": "a" * 30_000}), 413),
    ]:
        got, body = ask(server, "POST", "/v1/completions", content)
        assert got == status, content[:20]
        assert body["error"]["message"]
    assert ask(server, "GET", "/v2/models")[1]["error"]["message"]
    assert ask(server, "GET", "/v1/models")[1]["data"][0]["id"] == "demo"
    assert ask(server, "GET", "/v1/clamps")[1]["data"][0]["name"] == "bent"


def test_a_client_that_leaves_frees_its_place(server):
    begun = {"model": "demo", "prompt": PROMPT, "max_tokens": 64, "temperature": 0, "stream": True, "clamps": []}
    for _ in range(12):  # more than run at once
        connection, answer = ask(server, "POST", "/v1/completions", json.dumps(begun), stream=True)
        assert answer.readline().startswith(b"data: ")
        connection.close()
    deadline = time.monotonic() + 20
    while (load := ask(server, "GET", "/health")[1])["running"] or load["waiting"]:
        assert time.monotonic() < deadline, load
    assert said(openai.OpenAI(base_url=f"{server}/v1", api_key="none"), max_tokens=2)


# -- the engine by itself ---------------------------------------------------------------------------------------------


def collected(engine, jobs):
    """The tokens of each job, and why it ended."""
    tokens, ends, done = [[] for _ in jobs], [None] * len(jobs), threading.Semaphore(0)

    def on_end(i, why, error):
        ends[i] = (why, error)
        done.release()

    for i, options in enumerate(jobs):
        on_token = lambda token, i=i: tokens[i].append(token) is None  # noqa: E731
        engine.submit(Job(on_token=on_token, on_end=partial(on_end, i), **options))
    for _ in jobs:
        assert done.acquire(timeout=60)
    return tokens, ends


def tiny(kind="llama", **options):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
    torch.manual_seed(0)
    if kind == "llama":
        config = transformers.LlamaConfig(**sizes, intermediate_size=48, max_position_embeddings=128, **options)
        return ac.wrap(transformers.LlamaForCausalLM(config).eval())
    if kind == "gpt2":
        config = transformers.GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=64, n_positions=128)
        config.bos_token_id = config.eos_token_id = 1
        return ac.wrap(transformers.GPT2LMHeadModel(config).eval())
    config = transformers.MistralConfig(
        **sizes, intermediate_size=48, num_key_value_heads=2, sliding_window=8, max_position_embeddings=128
    )
    return ac.wrap(transformers.MistralForCausalLM(config).eval())


@pytest.mark.parametrize("kind", ["llama", "gpt2", "windowed"])
def test_sequences_that_come_and_go_are_those_decoded_alone(kind):
    model = tiny(kind)
    vectors = [
        ac.Add("blocks.0.resid.post", torch.randn(32, generator=torch.Generator().manual_seed(i))) for i in range(3)
    ]
    prompts = [[3, 4, 5, 6, 7, 8, 9], [10, 11], [12, 13, 14, 15], [16]]
    clamps = [[vectors[0]], [], [vectors[1], vectors[2]], [vectors[0].at(positions=-1)]]
    jobs = [
        {"ids": p, "clamps": c, "max_tokens": 6 + 5 * i} for i, (p, c) in enumerate(zip(prompts, clamps, strict=True))
    ]
    with Engine(model, most=3) as engine:
        got, ends = collected(engine, jobs)
    assert [why for why, _ in ends] == ["length"] * 4
    for i, job in enumerate(jobs):
        ids = torch.tensor(job["ids"])
        if job["clamps"]:
            with model.clamp(*job["clamps"]):
                alone = model.generate(ids, max_new_tokens=job["max_tokens"], eos_token_id=None)
        else:
            alone = model.generate(ids, max_new_tokens=job["max_tokens"], eos_token_id=None)
        assert got[i] == alone.new[0].tolist(), i


def test_a_job_that_fails_fails_alone():
    model = tiny()
    wrong = ac.Add("blocks.0.resid.post", torch.ones(31))
    endless = ac.Add("blocks.0.resid.post", torch.full((32,), float("nan")))
    jobs = [{"ids": [3, 4], "clamps": [wrong]}, {"ids": [5, 6], "max_tokens": 3}, {"ids": [3], "clamps": [endless]}]
    with Engine(model) as engine:
        got, ends = collected(engine, jobs)
    assert [why for why, _ in ends] == ["error", "length", "error"]
    assert "does not fit" in str(ends[0][1])
    assert "not finite" in str(ends[2][1])
    assert len(got[1]) == 3
    assert not got[0]


def test_the_queue_is_bounded_and_deadlines_hold():
    model = tiny()
    with Engine(model, most=1, waiting=1) as engine:
        _, ends = collected(engine, [{"ids": [3], "deadline": time.monotonic() - 1}])
        assert ends[0][0] == "timeout"
    from actome.steer.serving.engine import Busy

    with pytest.raises(Busy, match="shutting down"):
        engine.submit(Job([1], lambda t: True, lambda why, error: None))
    idle = Engine(model, waiting=1)  # never started: what waits stays
    idle.submit(Job([1], lambda t: True, lambda why, error: None))
    with pytest.raises(Busy, match="waiting already"):
        idle.submit(Job([1], lambda t: True, lambda why, error: None))


def test_rows_let_go_of_columns_that_nobody_needs():
    rows = Rows(tiny())
    rows.join(list(range(3, 23)), [])
    rows.join([5, 6], [])
    rows.keep([1])
    assert rows._mask_BT.shape == (1, 2)
    assert rows._cache.layers[0].keys.shape[-2] == 2


def test_what_cannot_be_served_is_refused():
    with pytest.raises(ActomeError, match="no tokenizer"):
        make_app(tiny())
    demo = ac.demo()
    with pytest.raises(ActomeError, match="no site"):
        make_app(demo, {"x": [ac.Add("blocks.9.resid.post", 1.0)]})
    bare = ac.wrap(demo.module.model, demo.tokenizer)
    with pytest.raises(ActomeError, match="cannot generate"):
        make_app(bare)


def test_half_characters_and_half_stop_strings_are_held_back():
    tokenizer = ac.demo().tokenizer
    text = "na\u00efve \u2014 return of the re turn"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    decoder = Decoder(tokenizer)
    pieces = [decoder.push(i) for i in ids] + [decoder.finish()]
    assert "".join(pieces) == tokenizer.decode(ids)
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    decoder = Decoder(tokenizer, stop=["the re turnip"])
    assert "".join([decoder.push(i) for i in ids] + [decoder.finish()]) == tokenizer.decode(ids)
    assert not decoder.stopped
