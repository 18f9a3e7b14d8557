"""Targets that read images: a prefill is the model's own forward, and all that follows is as with text."""

from __future__ import annotations

import functools

import pytest
import torch
from tests.decoding.tiny import AdversarialDrafter, plain, settings, tree_of
from tests.decoding.tiny import make_target as make_text_target
from tests.models.tiny_vision import BUILDERS, SPECIAL, TEMPLATE, VOCAB, make_image, make_parts, make_target
from transformers.models.smolvlm import processing_smolvlm

from vsdbench.bench.lossless import compare
from vsdbench.decoding.baseline import hf_generate
from vsdbench.decoding.engine import decode
from vsdbench.errors import ConfigError, EnvironmentProblemError
from vsdbench.models.encoding import ImageEncoder
from vsdbench.models.image_prompt import ImagePrompt, followed_by
from vsdbench.models.target import Target
from vsdbench_drafters.architectures.ngram import NgramDrafter

FAMILIES = list(BUILDERS)
FIRST = len(SPECIAL)
"""The first token that is a byte, and no placeholder of anything."""
TREE = tree_of([FIRST + i for i in range(5, 12)], [-1, 0, 0, -1, 1, 4, 3])
TOLERANCE = {"rtol": 0.0, "atol": 1e-4}


@functools.cache
def built(family, dtype=torch.float64):
    return make_target(family, dtype=dtype)


@functools.cache
def stock(family):
    model, _ = make_parts(family)
    return model.eval()


def question(*seeds, text="What is it?"):
    images = [make_image(seed, (20 + 6 * seed, 22)) for seed in seeds]
    return {"role": "user", "content": text, "images": images}


@functools.cache
def prompt_of(family, *seeds):
    return built(family).encode_chat([question(*seeds)])


def stock_forward(family, prompt, features=(0,)):
    """Logits of an untouched model, what enters the layers in ``features``, and what leaves the last, normed."""
    inputs = prompt.inputs_for(len(prompt)) if isinstance(prompt, ImagePrompt) else {}
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    ids = torch.tensor([list(prompt)])
    decoder, entered = stock(family).get_decoder(), {}

    def keep(layer, args, kwargs):
        entered[layer] = args[0] if args else kwargs["hidden_states"]

    hooks = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in decoder.layers]
    hooks.append(decoder.register_forward_hook(lambda _, args, output: entered.update(last=output.last_hidden_state)))
    with torch.no_grad():
        output = stock(family)(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **inputs)
    for hook in hooks:
        hook.remove()
    states = [entered[key][0] for key in (*(decoder.layers[index] for index in features), "last")]
    return output.logits[0], torch.cat(states, dim=-1)


def begun(target, prompt, root=FIRST + 4):
    state = target.prefill(prompt, len(prompt) + 40)
    state.tokens.append(root)
    return state


def path_of(row):
    nodes = []
    while row > 0:
        nodes.append(row - 1)
        row = TREE.parents[row - 1] + 1
    return nodes[::-1]


def errors(family, prompt, output, root):
    """Largest deviation of every row's logits from a plain forward over its path."""
    found = []
    for row in range(len(TREE) + 1):
        path = [root, *(int(TREE.tokens[node]) for node in path_of(row))]
        logits, _ = stock_forward(family, followed_by(prompt, path))
        found.append(float((output.logits[row] - logits[-1]).abs().max()))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_is_the_models_own_forward(family):
    target, prompt = built(family), prompt_of(family, 1, 2)
    assert target.attention == "vsdbench"
    assert isinstance(prompt, ImagePrompt)
    state = target.prefill(prompt, len(prompt) + 8)
    logits, features = stock_forward(family, prompt, target.feature_layers)
    torch.testing.assert_close(state.next_logits.double(), logits[-1], **TOLERANCE)
    torch.testing.assert_close(state.features, features, **TOLERANCE)
    assert state.tokens == list(prompt)
    assert state.image_mask.sum() == prompt.num_image_tokens > 0
    looked_up = target.embed_tokens(torch.tensor(list(prompt)))
    same = (state.embeddings == looked_up).all(-1)
    assert same.tolist() == (~prompt.image_mask).tolist()
    others = target.prefill(prompt_of(family, 3, 4), 400).next_logits
    assert float((others - state.next_logits).abs().max()) > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_tree_forward_is_one_plain_forward_per_path(family):
    target, prompt = built(family), prompt_of(family, 1, 2)
    state = begun(target, prompt)
    output = target.forward_tree(state, TREE)
    assert max(errors(family, prompt, output, state.tokens[-1])) < 1e-4
    if family.startswith("qwen"):  # an image of h x w tokens takes max(h, w) positions
        assert state.position_offset < 0
        state.position_offset = 0
        assert max(errors(family, prompt, target.forward_tree(state, TREE), state.tokens[-1])) > 1e-2
    else:
        assert state.position_offset == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_cache_after_commit_is_a_fresh_prefill_with_the_images(family):
    target, prompt = built(family), prompt_of(family, 1)
    state = begun(target, prompt)
    target.forward_tree(state, TREE)
    path = [0, 1, 4]
    state.commit(path, [*(int(TREE.tokens[node]) for node in path), FIRST + 12])
    after = target.forward_tree(state, TREE)
    other = make_target(family)
    fresh = other.prefill(followed_by(prompt, state.tokens[len(prompt) : -1]), 200)
    assert fresh.cache.length == len(fresh.features) == len(fresh.embeddings) == len(fresh.image_mask)
    _, features = stock_forward(family, followed_by(prompt, state.tokens[len(prompt) : -1]), target.feature_layers)
    torch.testing.assert_close(fresh.features, features, **TOLERANCE)
    fresh.tokens.append(state.tokens[-1])
    expected = other.forward_tree(fresh, TREE)
    torch.testing.assert_close(after.logits, expected.logits, **TOLERANCE)
    torch.testing.assert_close(after.features, expected.features, **TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_are_those_of_generate_whatever_is_drafted(family, temperature):
    target, prompt = built(family, torch.float32), prompt_of(family, 1, 2)
    chosen = settings(16, temperature=temperature, seed=3)
    reference = plain(target, prompt, chosen)
    assert hf_generate(target, prompt, chosen).token_ids == reference
    assert target.model.config._attn_implementation == target.attention
    adversary = AdversarialDrafter(reference, len(prompt), seed=1, vocab=VOCAB)
    assert decode(target, adversary, prompt, chosen).token_ids == reference
    assert adversary.num_accepted > 0
    assert decode(target, NgramDrafter(), prompt, chosen).token_ids == reference
    assert compare(target, prompt, reference, reference, chosen) == ("equal", None)
    wrong = [*reference[:5], (reference[5] + 1) % VOCAB, *reference[6:]]
    assert compare(target, prompt, reference, wrong, chosen)[0] == "violation"


@pytest.mark.parametrize("family", ["llava", "qwen2.5-vl", "gemma3"])
def test_images_stay_in_later_turns(family):
    target = built(family, torch.float32)
    first = target.encode_chat([question(1, 2)])
    answer = {"role": "assistant", "content": "It is."}
    messages = [{"role": "system", "content": "Be short."}, question(1, 2), answer, question(text="And why?")]
    second = target.encode_chat(messages)
    assert second.num_image_tokens == first.num_image_tokens
    text = target.tokenizer.decode(list(second))
    assert text.startswith("s:Be short.<|end|>u:")
    assert text.endswith("What is it?<|end|>a:It is.<|end|>u:And why?<|end|>a:")
    chosen = settings(10)
    assert hf_generate(target, second, chosen).token_ids == plain(target, second, chosen)


@pytest.mark.parametrize("family", FAMILIES)
def test_text_alone_is_a_plain_list_and_decodes(family):
    target = built(family, torch.float32)
    prompt = target.encode_chat([{"role": "user", "content": "Hello there, hello there."}])
    assert type(prompt) is list
    assert target.tokenizer.decode(prompt) == "u:Hello there, hello there.<|end|>a:"
    target.prefill(prompt_of(family, 1), 300)  # what an image left behind must not matter
    state = target.prefill(prompt, 80)
    assert state.embeddings is None
    assert state.image_mask is None
    logits, _ = stock_forward(family, prompt)
    torch.testing.assert_close(state.next_logits.double(), logits[-1], rtol=0.0, atol=1e-3)
    chosen = settings(12)
    assert hf_generate(target, prompt, chosen).token_ids == plain(target, prompt, chosen)


@pytest.mark.parametrize("family", ["llava", "qwen2-vl", "idefics3"])
def test_a_placeholder_in_the_answer_is_a_token_like_any_other(family):
    target, prompt = built(family), prompt_of(family, 1)
    placeholder = prompt[prompt.image_mask.tolist().index(True)]
    state = begun(target, prompt, root=placeholder)
    output = target.forward_tree(state, tree_of([], []))
    replayed = target.prefill(followed_by(prompt, [placeholder]), 200)
    torch.testing.assert_close(replayed.next_logits.double(), output.logits[0], **TOLERANCE)


def test_plain_text_around_images():
    target = built("llava")
    prompt = target.encode_text("What?", [make_image(1)])
    assert target.tokenizer.decode(list(prompt)[prompt.num_image_tokens :]) == "\nWhat?"
    assert target.encode_text("What?") == list(target.tokenizer("What?")["input_ids"])
    without = ImageEncoder(make_parts("llava")[1], name="bare", config=target.model.config)
    without.processor.chat_template = None
    said = without.chat([{"role": "user", "content": "a"}, question(1, text="b")])
    assert target.tokenizer.decode(list(said)[said.num_image_tokens :]) == "\na\n\nb"
    assert built("llava").template_hash == target.template_hash != make_text_target().template_hash


# ---- from a folder ----


def save(folder, family):
    model, processor = make_parts(family, dtype=torch.float32)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def load(folder):
    return Target.load(folder, name="tiny", fingerprint="0", device=torch.device("cpu"), dtype=torch.float32)


@pytest.mark.parametrize("family", ["llava", "llava-next", "qwen2.5-vl", "smolvlm", "idefics3", "internvl"])
def test_a_folder_is_loaded_with_its_processor(family, tmp_path):
    target = load(save(tmp_path, family))
    assert isinstance(target.model, type(stock(family)))
    prompt, expected = target.encode_chat([question(1, 2)]), prompt_of(family, 1, 2)
    assert list(prompt) == list(expected)
    logits = target.prefill(prompt, len(prompt)).next_logits
    torch.testing.assert_close(logits, built(family).prefill(expected, 200).next_logits, rtol=0.0, atol=1e-3)


def test_a_folder_without_a_processor_is_one_sentence(tmp_path):
    save(tmp_path, "llava")
    (tmp_path / "processor_config.json").unlink()
    with pytest.raises(ConfigError, match="'tiny' reads images, but its processor cannot be loaded"):
        load(tmp_path)


def test_a_processor_that_needs_another_package_names_it(tmp_path, monkeypatch):
    save(tmp_path, "smolvlm")
    monkeypatch.setattr(processing_smolvlm, "num2words", None)
    with pytest.raises(EnvironmentProblemError, match=r"'tiny' cannot run here: .*pip install num2words"):
        load(tmp_path)


# ---- what is refused ----


def test_a_text_target_refuses_images():
    target = make_text_target()
    with pytest.raises(ConfigError, match="The prompt has 2 images and 'llama' reads text alone"):
        target.encode_chat([question(1, 2)])
    with pytest.raises(ConfigError, match="The prompt has 1 image and 'llama' reads text alone"):
        target.encode_text("a", [make_image()])


def test_a_template_that_leaves_images_out_is_refused():
    target = make_target("llava")
    target.encoder.processor.chat_template = TEMPLATE.replace("PLACEHOLDER", "")
    with pytest.raises(ConfigError, match=r"'llava'.*image"):
        target.encode_chat([question(1)])


def test_a_text_that_writes_a_placeholder_is_refused():
    with pytest.raises(ConfigError, match="'llava' cannot read a prompt with 1 images"):
        built("llava").encode_chat([question(1, text="Is this an <image>?")])


def test_a_config_without_a_placeholder_is_refused():
    processor = make_parts("llava")[1]
    with pytest.raises(ConfigError, match="'odd' marks no tokens"):
        ImageEncoder(processor, name="odd", config=object())


def test_a_language_model_that_needs_the_images_later_is_refused():
    target = make_target("llava")

    def add(_decoder, args, kwargs):
        return args, {**kwargs, "cross_attention_states": torch.ones(1, 2)}

    target.model.get_decoder().register_forward_pre_hook(add, with_kwargs=True)
    with pytest.raises(ConfigError, match="'llava' gives its language model 'cross_attention_states'"):
        target.prefill(prompt_of("llava", 1), 200)


def test_the_families_are_what_transformers_loads():
    assert {type(stock(family)).__name__ for family in FAMILIES} == {
        "LlavaForConditionalGeneration", "LlavaNextForConditionalGeneration", "Qwen2VLForConditionalGeneration",
        "Qwen2_5_VLForConditionalGeneration", "Qwen3VLForConditionalGeneration", "Idefics3ForConditionalGeneration",
        "SmolVLMForConditionalGeneration", "InternVLForConditionalGeneration", "Gemma3ForConditionalGeneration",
    }  # fmt: skip
