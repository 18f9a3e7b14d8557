"""Every shipped suite with images makes the right prompts of two rows in the form of its data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
from tests.suites.pictures import image_dataset, picture

from vsdbench.suites.images import pixels_sha256
from vsdbench.suites.loaders import load_config, load_suite

SHIPPED = Path(__file__).parents[2] / "suites"
ONE = datasets.Image()
MANY = datasets.List(datasets.Image())
EXPLAIN = "\nPlease answer with an explanation."
READ = (
    "\nPerform an OCR task on the provided image. Please extract the text accurately and provide a detailed "
    "explanation of the process. Ensure the response is comprehensive and well-structured."
)


def _mmmu(number: int, kind: str, options: str, images: int) -> dict[str, Any]:
    names = ("explanation", "img_type", "answer", "topic_difficulty", "subfield")
    row: dict[str, Any] = {
        "id": f"validation_Art_{number}",
        "question": f"See <image 1>, {number}?",
        "options": options,
    }
    row |= {"question_type": kind, **dict.fromkeys(names, "")}
    return row | {f"image_{n}": picture(10 * number + n) if n <= images else None for n in range(1, 8)}


SCIENCE = ("task", "grade", "topic", "category", "skill", "lecture", "solution")
CASES: dict[str, dict[str, Any]] = {
    "scienceqa": {
        "at": ("lmms-lab/ScienceQA", "ScienceQA-IMG", "test"),
        "rows": [
            {"question": "Which?", "choices": ["x", "y"], "answer": 0, "hint": "", "subject": "natural science"},
            {
                "question": "Who?",
                "choices": ["u", "v", "w"],
                "answer": 2,
                "hint": "A map.",
                "subject": "social science",
            },
        ],
        "unused": dict.fromkeys(SCIENCE, ""),
        "prompts": [
            (
                "00000",
                "natural science",
                "Context: N/A\nQuestion: Which?\nOptions: (A) x (B) y\n"
                'Your answer should begin with "The answer is". Please answer with an explanation. Answer:',
            ),
            (
                "00001",
                "social science",
                "Context: A map.\nQuestion: Who?\nOptions: (A) u (B) v (C) w\n"
                'Your answer should begin with "The answer is". Please answer with an explanation. Answer:',
            ),
        ],
    },
    "mmvet": {
        "at": ("lmms-lab/MMVet", None, "test"),
        "rows": [
            {"question_id": "v1_0", "question": "What is x?", "answer": "-1", "capability": "ocr,math"},
            {"question_id": "v1_1", "question": "Who is it?", "answer": "A cat", "capability": "rec"},
        ],
        "unused": {"image_source": "a.png"},
        "prompts": [("v1_0", "ocr,math", f"What is x?{EXPLAIN}"), ("v1_1", "rec", f"Who is it?{EXPLAIN}")],
    },
    "textvqa": {
        "at": ("lmms-lab/textvqa", None, "validation"),
        "rows": [
            {"question_id": 34602, "question": "what brand is it?", "answers": ["a"], "ocr_tokens": ["A"]},
            {"question_id": 34603, "question": "what does it say?", "answers": ["b"], "ocr_tokens": []},
        ],
        "unused": {"image_id": "00", "question_tokens": ["what"], "image_width": 4, "set_name": "val"},
        "prompts": [
            ("34602", "reading", f"what brand is it?{READ}"),
            ("34603", "reading", f"what does it say?{READ}"),
        ],
    },
    "mme": {
        "at": ("lmms-lab/MME", None, "test"),
        "rows": [
            {
                "question_id": "code_reasoning/0020.png",
                "question": f"Is it {n}? Please answer yes or no.",
                "answer": "No",
            }
            for n in range(2)
        ],
        "unused": {"category": "code_reasoning"},
        "prompts": [(f"0000{n}", "code_reasoning", f"Is it {n}? Please answer yes or no.{EXPLAIN}") for n in range(2)],
    },
    "coco-captions": {
        "at": ("lmms-lab/COCO-Caption2017", None, "val"),
        "rows": [{"question_id": f"00000017976{n}.jpg", "id": n, "answer": ["A bike."]} for n in range(2)],
        "unused": {
            "question": "Please carefully observe the image and come up with a caption for the image.",
            "license": 3,
            "file_name": "a.jpg",
            "coco_url": "a",
            "height": 3,
            "width": 4,
            "date_captured": "2013",
        },
        "prompts": [
            (f"00000017976{n}.jpg", "caption", "Please provide a detailed description of the given image.")
            for n in range(2)
        ],
    },
    "vizwiz": {
        "at": ("lmms-lab/VizWiz-VQA", None, "val"),
        "rows": [
            {"question_id": "VizWiz_val_0", "question": "What is this?", "category": "other"},
            {"question_id": "VizWiz_val_1", "question": "Is it on?", "category": "yes/no"},
        ],
        "unused": {"answers": ["a"]},
        "prompts": [
            ("VizWiz_val_0", "other", f"What is this?{EXPLAIN}"),
            ("VizWiz_val_1", "yes/no", f"Is it on?{EXPLAIN}"),
        ],
    },
    "llava-wild": {
        "at": ("lmms-lab/llava-bench-in-the-wild", None, "train"),
        "rows": [
            {"question_id": 0, "question": "What is its name?", "category": "conv"},
            {"question_id": 1, "question": "Describe it.", "category": "detail"},
        ],
        "unused": {"image_id": "001.jpg", "caption": "A hill.", "gpt_answer": "It is a hill."},
        "prompts": [("0", "conv", "What is its name?"), ("1", "detail", "Describe it.")],
    },
    "gqa": {
        "at": ("lmms-lab/GQA", "testdev_balanced_instructions", "testdev"),
        "rows": [
            {"id": "201307251", "imageId": "n1", "question": "Is it overcast?", "answer": "no"},
            {"id": "201640614", "imageId": "n0", "question": "Who is it?", "answer": "woman"},
        ],
        "unused": {"fullAnswer": "No.", "isBalanced": True, "types": {"structural": "verify"}, "semanticStr": "s"},
        "prompts": [
            ("201307251", "question", f"Is it overcast?{EXPLAIN}"),
            ("201640614", "question", f"Who is it?{EXPLAIN}"),
        ],
        "images": [[1], [0]],
        "features": {},
    },
    "seedbench": {
        "at": ("lmms-lab/SEED-Bench", None, "test"),
        "rows": [
            {"question_id": "101669", "question": "How many?", "data_type": "image", "image": [picture(5)]},
            {"question_id": "v1", "question": "Then?", "data_type": "video", "image": [picture(6), picture(7)]},
        ],
        "unused": {
            **{f"choice_{letter}": f"is {letter}" for letter in "abcd"},
            "answer": "A",
            "data_id": "1",
            "question_type_id": 5,
            "segment": [0],
        },
        "prompts": [("101669", "choice", f"How many?\nA. is a\nB. is b\nC. is c\nD. is d{EXPLAIN}")],
        "images": [[5]],
        "features": {"image": MANY},
    },
    "chartqa": {
        "at": ("lmms-lab/ChartQA", None, "test"),
        "rows": [
            {"type": "human_test", "question": "How many bars?", "answer": "3"},
            {"type": "augmented_test", "question": "Which year?", "answer": "2015"},
        ],
        "prompts": [
            ("00000", "human_test", f"How many bars?{EXPLAIN}"),
            ("00001", "augmented_test", f"Which year?{EXPLAIN}"),
        ],
    },
    "mmmu": {
        "at": ("lmms-lab/MMMU", None, "validation"),
        "rows": [_mmmu(1, "multiple-choice", "['$6', '<image 2>']", 2), _mmmu(2, "open", "[]", 1)],
        "prompts": [
            ("validation_Art_1", "choice", f"See <image 1>, 1?\nA. $6\nB. <image 2>\n{EXPLAIN}"),
            ("validation_Art_2", "open", f"See <image 1>, 2?\n{EXPLAIN}"),
        ],
        "images": [[11, 12], [21]],
        "features": {f"image_{n}": ONE for n in range(1, 8)},
    },
    "pope": {
        "at": ("lmms-lab/POPE", None, "test"),
        "rows": [
            {"id": "0", "question_id": "1", "question": "Is there a cat?", "answer": "yes", "category": "adversarial"},
            {"id": "1", "question_id": "1", "question": "Is there a dog?", "answer": "no", "category": "popular"},
        ],
        "unused": {"image_source": "COCO_val2014_0"},
        "prompts": [
            ("00000", "adversarial", f"Is there a cat?{EXPLAIN}"),
            ("00001", "popular", f"Is there a dog?{EXPLAIN}"),
        ],
    },
}


@pytest.mark.parametrize("name", CASES)
def test_a_shipped_suite_reads_rows_of_its_data(name: str, image_hub: dict[Any, Any]) -> None:
    case = CASES[name]
    features = case.get("features", {"image": ONE})
    rows = [{**case.get("unused", {}), **row} for row in case["rows"]]
    if "images" not in case:
        rows = [{**row, "image": picture(number)} for number, row in enumerate(rows)]
    image_hub[case["at"]] = image_dataset(rows, features)
    pictures = [{"id": f"n{number}", "image": picture(number)} for number in range(2)]
    image_hub["lmms-lab/GQA", "testdev_balanced_images", "testdev"] = image_dataset(pictures, {"image": ONE})
    suite = load_suite(SHIPPED / f"{name}.yaml")
    found = [(prompt.id.partition("/")[2], prompt.category, prompt.turns) for prompt in suite.prompts]
    assert found == [(identifier, category, (text,)) for identifier, category, text in case["prompts"]]
    expected = case.get("images", [[0], [1]])
    assert [[image.sha256 for image in prompt.images] for prompt in suite.prompts] == [
        [pixels_sha256(picture(number)) for number in numbers] for numbers in expected
    ]
    assert suite.notes == ()


def test_the_shipped_suites_are_samples_of_a_hundred_with_seed_42() -> None:
    for name in CASES:
        config, _, _ = load_config(SHIPPED / f"{name}.yaml")
        assert config.seed == 42
        limits = [source.limit for source in config.sources]
        assert limits == [None] if name == "llava-wild" else sum(limit or 0 for limit in limits) == 100
        assert all(source.fields.images for source in config.sources)
        assert config.target == "llava-hf/llava-1.5-7b-hf"
