"""Tiny random targets of real transformers classes, and drafters whose behaviour is known, for the decode tests."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import AutoConfig as Config
from transformers import AutoModelForCausalLM, GenerationConfig

from vsdbench.decoding.engine import Autoregressive, DecodeSettings, decode
from vsdbench.decoding.interfaces import TokenTree, TreeShape
from vsdbench.decoding.sampling import KeyedNoise, SamplingParams
from vsdbench.decoding.verify import Case
from vsdbench.models.device import fetch
from vsdbench.models.target import Target

VOCAB = 48
WINDOW = 7
_COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_MIXED = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]
FAMILIES = {
    "llama": ("llama", {}),
    "llama-mha": ("llama", {"num_key_value_heads": 4}),
    "qwen2": ("qwen2", {}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": _MIXED}),
    "qwen3": ("qwen3", {}),
    "mistral-window": ("mistral", {"sliding_window": WINDOW}),
    "phi3-window": ("phi3", {"sliding_window": WINDOW}),
    "olmo2": ("olmo2", {}),
    "gpt2": ("gpt2", {}),
    "gpt-neox": ("gpt_neox", {}),
    "gemma2": ("gemma2", {"sliding_window": WINDOW, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}),
    "gemma3": ("gemma3_text", {"sliding_window": WINDOW, "layer_types": _MIXED, "query_pre_attn_scalar": 8}),
}
"""Name -> transformers model type and what differs from the common dimensions."""

SHAPES = [
    TreeShape(kind="chain", budget=4, depth=4, top_k=1),
    TreeShape(kind="static", budget=9, depth=4, top_k=3),
    TreeShape(kind="dynamic", budget=9, depth=4, top_k=3),
    TreeShape(kind="sampled", budget=9, depth=4, top_k=3),
    TreeShape(kind="coupled", budget=9, depth=4, top_k=3),
]


def make_model(family="llama", *, seed=0, dtype=torch.float64, spread=0.3, **changes):
    """A random model whose next tokens are not all the same; its weights are spread wide enough for clear choices."""
    kind, special = FAMILIES[family]
    torch.manual_seed(seed)
    config = Config.for_model(kind, **(_COMMON | {"vocab_size": VOCAB} | special | changes))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # the same weights in every dtype
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=spread)
    model.generation_config = GenerationConfig()
    return model.to(dtype)


def make_target(family="llama", *, device="cpu", **changes) -> Target:
    model = make_model(family, **changes).to(device)
    return Target(model, None, name=family, fingerprint="0" * 16)


def make_prompt(length, seed=0, vocab=VOCAB):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab, (length,), generator=generator).tolist()


def settings(max_new_tokens=24, *, temperature=0.0, rule=None, seed=0, eos_ids=(), shape=SHAPES[1], **sampling):
    return DecodeSettings(
        max_new_tokens=max_new_tokens,
        shape=shape,
        rule=rule or ("coupled" if temperature else "greedy"),
        sampling=SamplingParams(temperature=temperature, **sampling),
        seed=seed,
        eos_ids=frozenset(eos_ids),
    )


def verify(rule, tree, logits, *, params, seed, position, generator):
    """The verdict over one tree, as the engine has it."""
    case = Case(rule, tree, logits, params=params, noise=KeyedNoise(seed), position=position)
    return case.decide(fetch(case.asked), generator)


def plain(target, prompt, chosen):
    """The tokens of plain decoding."""
    return decode(target, Autoregressive(), prompt, chosen).token_ids


def tree_of(tokens: Sequence[int], parents: Sequence[int], device="cpu") -> TokenTree:
    depths: list[int] = []
    for parent in parents:
        depths.append(1 if parent < 0 else depths[parent] + 1)
    ids = torch.tensor(list(tokens), dtype=torch.int64, device=device)
    return TokenTree(ids, list(parents), depths, torch.zeros(len(ids), device=device))


def random_tree(generator, num_nodes, vocab=VOCAB, device="cpu") -> TokenTree:
    """Any tree: node i hangs under any earlier row; siblings may even repeat a token."""
    parents = [int(torch.randint(-1, i, (), generator=generator)) for i in range(num_nodes)]
    return tree_of(torch.randint(0, vocab, (num_nodes,), generator=generator).tolist(), parents, device)


class AdversarialDrafter:
    """Proposes random trees of random sizes, sometimes none, with the right continuation grafted in at random."""

    name = "adversarial"

    def __init__(self, answer: Sequence[int], prompt_length: int, seed: int, vocab=VOCAB) -> None:
        self._answer, self._prompt_length, self._vocab = list(answer), prompt_length, vocab
        self._generator = torch.Generator().manual_seed(seed)

    def begin(self, state, max_length):
        self.num_accepted = 0

    def propose(self, state, shape, *, temperature, generator):
        num_nodes = int(torch.randint(0, shape.budget + 1, (), generator=self._generator))
        tree = random_tree(self._generator, num_nodes, self._vocab)
        tokens = tree.tokens.tolist()
        done = len(state.tokens) - self._prompt_length
        for node, depth in enumerate(tree.depths):
            right = self._answer[done + depth - 1 : done + depth]
            if right and float(torch.rand((), generator=self._generator)) < 0.7:
                tokens[node] = right[0]
        return tree_of(tokens, tree.parents, state.next_logits.device)

    def commit(self, state, num_accepted, features):
        assert len(features) == num_accepted + 1
        self.num_accepted += num_accepted


class KnowingDrafter:
    """Proposes one chain of the known answer (``offset`` 0), or of tokens that are always wrong (any other)."""

    name = "knowing"

    def __init__(self, answer: Sequence[int], prompt_length: int, offset: int = 0, vocab=VOCAB) -> None:
        self._answer, self._prompt_length, self._offset, self._vocab = list(answer), prompt_length, offset, vocab

    def begin(self, state, max_length):
        pass

    def propose(self, state, shape, *, temperature, generator):
        done = len(state.tokens) - self._prompt_length
        ahead = self._answer[done : done + shape.depth]
        ahead += [0] * (shape.depth - len(ahead))
        return tree_of(
            [(token + self._offset) % self._vocab for token in ahead],
            range(-1, shape.depth - 1),
            state.next_logits.device,
        )

    def commit(self, state, num_accepted, features):
        pass
