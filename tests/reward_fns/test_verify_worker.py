import io
import json
import subprocess
import sys

import pytest

from reward_fns.verify_worker import is_equal


@pytest.mark.parametrize(
    ("gold", "answer", "equal"),
    [
        ("p - q", "-q + p", True),
        ("p - q", "q - p", False),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \pi/2)", True),
        (r"\frac{1}{2}, 3", "3, 1/2", True),
        (r"\begin{pmatrix} 1/3 \\ 2 \end{pmatrix}", "\\begin{pmatrix}\n \\frac{1}{3} \\\\ 2 \\end{pmatrix}", True),
        ("7", r"\begin{", False),
        ("7", "{" * 200 + "7", False),
        ("7", "\ud800\x00", False),
        (r"\frac{", r"\frac{", True),
    ],
)
def test_expressions_are_equal_by_computer_algebra(gold, answer, equal):
    assert is_equal(gold, answer, extract=False) is equal


def test_answer_can_be_extracted_from_a_text():
    assert is_equal("7", "Three and four, so the final answer is 7.", extract=True)
    assert not is_equal("7", "Seven, so the final answer is 8.", extract=True)


def test_process_replies_to_each_question_and_ends_with_its_input():
    questions = [
        {"id": 5, "gold": "p - q", "answer": "-q + p", "extract": False, "seconds": 30.0},
        {"id": 6, "gold": "p - q", "answer": "p", "extract": False, "seconds": 30.0},
    ]
    done = subprocess.run(
        [sys.executable, "-m", "reward_fns.verify_worker"],
        input="".join(json.dumps(question) + "\n" for question in questions).encode(),
        capture_output=True,
        timeout=60,
        check=True,
    )
    replies = [json.loads(line) for line in io.BytesIO(done.stdout)]
    assert replies == [{"ready": True}, {"id": 5, "equal": True}, {"id": 6, "equal": False}]
    assert done.stderr == b""
