"""A tiny random target with a real tokenizer, a suite of local prompts, and two ways of giving commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
from typer.testing import CliRunner

from vsdbench.cli import app
from vsdbench.store.store import RunStore

SENTENCES = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind.",
    "Write a function that returns the sum of two numbers, and explain it.",
    "A train leaves the station at noon; when does it arrive in the city?",
]
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
PROMPTS = [
    {"id": "fox", "category": "chat", "turns": ["The quick brown fox jumps over what?", "And does the dog mind?"]},
    {"id": "noon", "category": "chat", "turns": ["When does the train arrive?"]},
    {"id": "city", "category": "chat", "turns": ["Describe the city and the station."]},
    {"id": "sum", "category": "code", "turns": ["Write a function: sum of two numbers, sum of three numbers."]},
    {"id": "minus", "category": "code", "turns": ["Explain a function that returns a difference."]},
]
NUM_TURNS = sum(len(prompt["turns"]) for prompt in PROMPTS)
METHODS = ("autoregressive", "hf-generate", "ngram", "itself")


def save_model(folder: Path, seed: int = 0) -> Path:
    """Save a random Llama of two thousand weights or so, with a byte-level tokenizer trained on three sentences."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,  # the narrowest that native kernels take
        max_position_embeddings=256,
        bos_token_id=fast.eos_token_id,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.eos_token_id,
    )
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    model.save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Result:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def said(self) -> str:
        """Standard error with its line breaks taken out."""
        return " ".join(self.err.split())


class Workspace:
    """A folder with a model, a suite and the runs made from it."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model
        self.results = folder / "results"
        self.write_prompts(PROMPTS)
        self.suite = self.write_suite()

    def write_prompts(self, prompts: list[dict], name: str = "prompts.jsonl") -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(prompt) + "\n" for prompt in prompts)
        (self.folder / name).write_text(text, encoding="utf-8")

    def write_suite(self, name: str = "tiny", **changes) -> Path:
        fields = {"turns": "turns", "category": "category", "id": "id"}
        source = {"name": "local", "loader": "jsonl", "path": "prompts.jsonl", "licence": "CC0-1.0", "fields": fields}
        tree = {"kind": "dynamic", "budget": 6, "depth": 3, "top_k": 2}
        suite = {
            "name": name,
            "version": 1,
            "description": "Five prompts for tests.",
            "licence": "CC0-1.0",
            "target": str(self.model),
            "sources": [source],
            "generation": {"max_new_tokens": 16},
            "modes": [
                {"name": "greedy", "temperature": 0, "rule": "greedy"},
                {"name": "stochastic", "temperature": 1, "rule": "coupled"},
            ],
            "repeats": 2,
            "drafters": [
                {"name": "ngram", "type": "ngram", "tree": tree},
                {"name": "itself", "type": "draft_model", "options": {"model": str(self.model)}, "tree": tree},
            ],
        }
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(suite | changes), encoding="utf-8")
        return path

    def command(self, *words: str | Path, suite: Path | None = None) -> list[str]:
        fixed = ["--device", "cpu", "--dtype", "fp32", "--results", str(self.results)]
        return ["run", str(suite or self.suite), *fixed, *map(str, words)]

    def run(self, *words: str | Path, suite: Path | None = None) -> Result:
        """Give the command in this process."""
        result = CliRunner().invoke(app, self.command(*words, suite=suite), catch_exceptions=False)
        return Result(result.exit_code, result.stdout, result.stderr)

    def start(self, *words: str | Path) -> subprocess.Popen:
        """Give the command in a process of its own."""
        # A shell that starts a job in the background has its children ignore Ctrl-C; this one is meant to hear it.
        hear = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
        program = f"{hear}; from vsdbench.cli import main; main()"
        return subprocess.Popen(
            [sys.executable, "-c", program, *self.command(*words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        )

    @property
    def runs(self) -> list[Path]:
        return sorted(self.results.glob("*/manifest.json"))

    @property
    def only_run(self) -> Path:
        (manifest,) = self.runs
        return manifest.parent


def slow_second_repeats(patch: pytest.MonkeyPatch) -> None:
    """Make every second repeat take about three times as long as the first."""
    append = RunStore.append

    def slower(self, record, token_ids=None):
        factor = 3 + len(record.prompt_id) % 2 if record.repeat else 1
        seconds = 0.01 * (record.num_output_tokens - 1) * factor
        append(self, record.model_copy(update={"decode_s": seconds}), token_ids)

    patch.setattr(RunStore, "append", slower)


def lines_of(run: Path) -> list[dict]:
    """The records of a run as plain JSON, a torn last line included as an error."""
    return [json.loads(line) for line in (run / "records.jsonl").read_text(encoding="utf-8").splitlines()]


KEY = ("suite", "prompt_id", "turn", "method", "mode", "temperature", "repeat")


def outcomes_of(run: Path) -> dict[tuple, tuple]:
    """What must not depend on how often a run was interrupted, by the record's key."""
    fields = ("output_sha256", "order_in_block", "seed", "stop_reason", "lossless")
    return {
        tuple(line[name] for name in KEY): (*(line[name] for name in fields), line["steps"]["num_emitted"])
        for line in lines_of(run)
    }
